"""Shards: what any number of processes writes any other reads, and a damaged folder is refused unread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fixtures import hostile
from fixtures.small_model import relist
from tutti.storage import shards
from tutti.storage.manifest import Manifest
from tutti.storage.tensors import read
from tutti.types import UserError

TYPES = sorted(shards.NAMES, key=str)
SPREADS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "one": ((1,), (Shard(0),)),
    "two": ((2,), (Shard(0),)),
    "three": ((3,), (Shard(0),)),
    "seven": ((7,), (Shard(0),)),
    "columns": ((3,), (Shard(1),)),
    "copies": ((4,), (Replicate(),)),
    "shares and copies": ((2, 2), (Replicate(), Shard(0))),
    "grid": ((2, 3), (Shard(0), Shard(1))),
    "twice": ((2, 2), (Shard(0), Shard(0))),
}

PAIRS = [
    *zip(SPREADS, [*list(SPREADS)[1:], "one"], strict=True),
    *[("seven", "two"), ("three", "seven"), ("one", "three"), ("grid", "copies")],
]


def tensors() -> dict[str, Tensor]:
    """Shares of these are uneven or empty for most numbers of processes; names as in a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    found = {
        "model/rows": torch.randn(10, 6, generator=generator),
        "model/narrow": torch.randn(2, 5, generator=generator).bfloat16(),
        "ema/deep": torch.randn(5, 4, 3, generator=generator, dtype=torch.float64),
        "optimizer/0/step": torch.tensor(3.0),
        "model/count": torch.tensor(7),
        "model/none": torch.zeros(0, 4),
        "model/no_column": torch.zeros(4, 0, dtype=torch.int8),
    }
    kinds = {f"buffers/{kind}": torch.arange(12).view(4, 3).remainder(2).to(kind) for kind in TYPES}
    return found | kinds


@contextmanager
def as_rank(rank: int, sizes: Sequence[int]) -> Iterator[DeviceMesh]:
    """Inside the block this process is one of several, which cannot talk to each other."""
    count = int(torch.tensor(sizes).prod())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield init_device_mesh("cpu", tuple(sizes))
    finally:
        dist.destroy_process_group()


def on_each(spread: str, make: Callable[[int, dict[str, Tensor]], Any]) -> list[Any]:
    """`make(rank, what it holds)`: what has two dimensions or more in shares, the rest whole."""
    sizes, placements = SPREADS[spread]
    found: list[Any] = []
    for rank in range(int(torch.tensor(sizes).prod())):
        with as_rank(rank, sizes) as mesh:
            own = {
                name: distribute_tensor(value, mesh, placements, src_data_rank=None)
                if value.ndim > 1
                else value
                for name, value in tensors().items()
            }
            found.append(make(rank, own))
    return found


def write(folder: Path, spread: str = "one") -> Path:
    everywhere = on_each(spread, lambda rank, own: shards.local_pieces(own))
    on_each(spread, lambda rank, own: shards.write(folder / "shards", own, everywhere, rank))
    return relist(folder) / "shards"


def manifest(folder: Path) -> Manifest:
    return Manifest.of(folder.parent)


def read_changed(folder: Path) -> None:
    """Reads it after a stranger has made the checksums fit."""
    read(manifest(relist(folder.parent) / "shards"))


def same(one: Tensor, other: Tensor) -> bool:
    as_bytes = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_any_number_of_processes_reads_what_any_other_has_written(
    before: str, after: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, before)
    whole = read(manifest(folder))
    assert whole.keys() == tensors().keys()
    assert [name for name, value in tensors().items() if not same(whole[name], value)] == []

    def wrong(rank: int, own: dict[str, Tensor]) -> list[str]:
        found = read(manifest(folder), forms=own)
        kinds = [name for name, value in own.items() if type(found[name]) is not type(value)]
        return kinds + [n for n, value in own.items() if not same(local(found[n]), local(value))]

    assert on_each(after, wrong) == [[]] * len(on_each(after, lambda rank, own: rank))


def test_a_process_opens_only_the_files_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "seven")

    def opened(rank: int, own: dict[str, Tensor]) -> set[str]:
        seen: list[str] = []
        monkeypatch.setattr(Manifest, "check", lambda _, name: seen.append(name))
        read(manifest(folder), "model/rows", own)
        return set(seen) - {"shards/index.json"}

    assert on_each("two", opened) == [
        {f"shards/rank-{rank:05d}.safetensors" for rank in ranks} for ranks in ((0, 1, 2), (2, 3, 4))
    ]


def test_names_that_do_not_begin_so_are_not_read(tmp_path: Path) -> None:
    assert read(manifest(write(tmp_path)), "ema/").keys() == {"ema/deep"}


def test_what_all_hold_is_written_once_and_the_work_is_divided(tmp_path: Path) -> None:
    own = {f"w{number}": torch.randn(100, number + 1) for number in range(9)}
    everywhere = [shards.local_pieces(own)] * 3
    sizes = [shards.write(tmp_path, own, everywhere, rank) for rank in range(3)]
    written = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert sorted(name for one in written for name in one) == sorted(own)
    heavy = [sum(value.nbytes for value in one.values()) for one in written]
    assert max(heavy) < 1.2 * sum(heavy) / 3
    for name, size in {name: size for one in sizes for name, size in one.items()}.items():
        assert (tmp_path / name).stat().st_size == size["bytes"]


def test_the_files_are_what_safetensors_itself_would_read(tmp_path: Path) -> None:
    found = load_file(write(tmp_path) / "rank-00000.safetensors")
    assert all(same(found[name], value) for name, value in tensors().items() if value.numel())


def test_processes_that_hold_different_tensors_write_no_index(tmp_path: Path) -> None:
    one, other = ([shards.Piece("w", "F32", (4,), (start,), (2,))] for start in (0, 1))
    with pytest.raises(ValueError, match="do not cover it exactly once"):
        shards.write(tmp_path, {"w": torch.zeros(2)}, [one, other], 0)
    assert not (tmp_path / "index.json").exists()


def test_numbers_that_the_format_does_not_know_are_refused_with_the_cure() -> None:
    with pytest.raises(UserError, match=r"complex128 cannot be saved in shards.*checkpoints\.format=whole"):
        shards.local_pieces({"w": torch.zeros(2, dtype=torch.complex128)})


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


def of(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Another entry for model/rows, whose shape is (10, 6)."""
    return lambda index: index["tensors"]["model/rows"].update(changes)


HUGE = 10**12
INDEXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda index: [1],
    "no tensors": lambda index: index.pop("tensors") and None,
    "tensors a list": lambda index: index.update(tensors=[1]),
    "another format": lambda index: index.update(format=2),
    "a file above": lambda index: index.update(files=["../rank-00000.safetensors"]),
    "an absolute file": lambda index: index.update(files=["/etc/passwd"]),
    "a file of another kind": lambda index: index.update(files=["index.json"]),
    "files a text": lambda index: index.update(files="rank-00000.safetensors"),
    "no files": lambda index: index.update(files=[]),
    "a number as a file": lambda index: index.update(files=[0]),
    "an unknown type": of(dtype="F33"),
    "a type that is a list": of(dtype=["F32"]),
    "another type": of(dtype="I32"),
    "a wider type": of(dtype="F64"),
    "a shape below 0": of(shape=[-10, -6]),
    "a shape of fractions": of(shape=[10.0, 6.0]),
    "a shape of truths": of(shape=[True, 60], pieces=[[0, [0, 0], [1, 60]]]),
    "too large": of(shape=[HUGE, 6]),
    "too large with a piece": of(shape=[HUGE, 6], pieces=[[0, [0, 0], [HUGE, 6]]]),
    "too large beyond counting": of(shape=[HUGE] * 9, pieces=[[0, [0] * 9, [HUGE] * 9]]),
    "too many dimensions": of(shape=[1] * 99, pieces=[[0, [0] * 99, [1] * 99]]),
    "empty but too large": of(shape=[0, HUGE, HUGE], pieces=[]),
    "empty with a piece": of(shape=[0, 6]),
    "another shape": of(shape=[6, 10], pieces=[[0, [0, 0], [6, 10]]]),
    "smaller": of(shape=[9, 6], pieces=[[0, [0, 0], [9, 6]]]),
    "no piece": of(pieces=[]),
    "a piece twice": of(pieces=[[0, [0, 0], [10, 6]]] * 2),
    "half of it": of(pieces=[[0, [0, 0], [5, 6]]]),
    "overlapping": of(pieces=[[0, [0, 0], [6, 6]], [0, [5, 0], [5, 6]]]),
    "a hole": of(pieces=[[0, [0, 0], [4, 6]], [0, [5, 0], [5, 6]]]),
    "halves that the file has not": of(pieces=[[0, [0, 0], [5, 6]], [0, [5, 0], [5, 6]]]),
    "outside": of(pieces=[[0, [1, 0], [10, 6]]]),
    "a piece of no size": of(pieces=[[0, [0, 0], [10, 6]], [0, [0, 0], [0, 6]]]),
    "a place below 0": of(pieces=[[-1, [0, 0], [10, 6]]]),
    "a place beyond": of(pieces=[[1, [0, 0], [10, 6]]]),
    "another rank": of(pieces=[[0, [0], [60]]]),
    "a piece too short": of(pieces=[[0, [0, 0]]]),
    "a piece of text": of(pieces="abc"),
    "pieces null": of(pieces=None),
    "a tensor that no file has": lambda index: index["tensors"].update(
        new=index["tensors"]["model/rows"] | {"shape": [10, 6]}
    ),
}


@pytest.mark.parametrize("how", [*INDEXES, *hostile.JSON])
def test_an_index_that_is_wrong_is_refused(how: str, tmp_path: Path) -> None:
    folder = write(tmp_path)
    if how in INDEXES:
        changed(folder, INDEXES[how])
    else:
        (folder / "index.json").write_bytes(hostile.JSON[how])
    with pytest.raises(UserError, match="damaged"):
        read_changed(folder)


def test_an_index_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path)
    monkeypatch.setattr(shards, "MAX_INDEX", 100)
    with pytest.raises(UserError, match="at most 100"):
        shards.index_of(folder)


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"1234")


def other_header(path: Path) -> None:
    path.write_bytes((10**15).to_bytes(8, "little") + path.read_bytes()[8:])


def other_tensors(path: Path) -> None:
    path.unlink()
    save_file({"model/rows": torch.zeros(3)}, path)


FILES = [shorter, longer, other_header, other_tensors, hostile.as_link_outside, Path.unlink]
FILES += hostile.SPECIAL.values()


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json"])
@pytest.mark.parametrize("damage", FILES)
def test_a_file_that_is_wrong_is_refused(damage: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    damage(folder / name)
    with pytest.raises(UserError):
        read(manifest(folder))
    if name != "index.json" and damage is not hostile.as_sparse:
        # What is not listed is not read; and nobody makes a checksum of 50 GB.
        with pytest.raises(UserError):
            read_changed(folder)


def test_a_pickled_index_is_not_opened_and_the_cure_is_said(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"no pickle at all")
    with pytest.raises(UserError, match=r"older Tutti, whose index \.metadata is a pickle.*the version that"):
        shards.index_of(tmp_path)
