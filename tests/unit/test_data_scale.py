"""The index of a large data set: made once, mapped by all, renewed with the data; no object an episode."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import data_scale
import numpy as np
import pytest

from fixtures import squares_data
from fixtures.format_sets import RLDS, write_robomimic, write_zarr
from tutti.data import DataConfig, opened
from tutti.data.content import digest
from tutti.data.episodes import Episode, Episodes, bounds_of, mask_of, rows_of
from tutti.data.formats import index
from tutti.data.formats.lerobot import reader
from tutti.data.formats.mapped import MappedStore
from tutti.data.sources import SourceConfig, open_parts
from tutti.storage import arrays
from tutti.storage.arrays import kept, stamp
from tutti.types import DataNeeds

MADE = {
    "numbers": np.arange(50_000, dtype=np.float32).reshape(-1, 2),
    "flags": np.array([True, False, True]),
    "none": np.empty((3, 0), np.float32),
}


def making(folder: Path, start: Any, said: Any) -> None:
    """In a process of its own: asks for the arrays at the same time as another."""

    def make() -> dict[str, np.ndarray]:
        with (folder.parent / "made").open("a") as file:
            file.write("once\n")
        return MADE

    start.wait()
    found = kept(folder, "these", make)
    said.put((float(found["numbers"].sum()), isinstance(found["numbers"].base, np.memmap)))


def test_two_processes_make_arrays_once_and_both_map_them(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(2), context.Queue()
    both = [context.Process(target=making, args=(tmp_path / "index", start, said)) for _ in range(2)]
    for one in both:
        one.start()
    assert [said.get(timeout=60) for _ in both] == [(float(MADE["numbers"].sum()), True)] * 2
    for one in both:
        one.join()
    assert (tmp_path / "made").read_text() == "once\n"


def test_arrays_are_made_anew_where_they_are_damaged_or_of_something_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return MADE

    def asked(of: str | None = "these") -> int:
        found = kept(tmp_path, of, make)
        assert all(np.array_equal(found[name], values) for name, values in MADE.items())
        return len(calls)

    assert (asked(), asked()) == (1, 1)
    assert not kept(tmp_path, "these", make)["numbers"].flags.writeable
    path, marker = tmp_path / "arrays", tmp_path / "complete.json"
    whole, said = bytearray(path.read_bytes()), marker.read_text()
    whole[123_456] ^= 1
    for name, content in (
        ("arrays", bytes(whole)),
        ("arrays", whole[:1000]),
        ("complete.json", b"{"),
        ("complete.json", said.replace('"<f4"', '"|O"').encode()),
    ):
        before = len(calls)
        (tmp_path / f"new-{name}").write_bytes(content)
        (tmp_path / f"new-{name}").replace(tmp_path / name)
        assert (asked(), asked()) == (before + 1, before + 1)
        assert f"{tmp_path} is damaged" in caplog.text
        caplog.clear()
    before = len(calls)
    assert (asked("others"), asked("others"), asked(None)) == (before + 1, before + 1, before + 2)
    (readable := tmp_path / "no-folder").write_text("a file is in its place")
    assert kept(readable, "these", make) is MADE


def test_a_stamp_is_another_one_where_a_file_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "one").write_text("1")
    (tmp_path / "inside" / "loop").symlink_to(tmp_path)
    assert stamp(tmp_path) is None  # it may be written again within the same moment
    monkeypatch.setattr(arrays, "FRESH", 0)
    found = [stamp(tmp_path), stamp(tmp_path)]
    (tmp_path / "inside" / "one").write_text("2")
    found.append(stamp(tmp_path))
    (tmp_path / "two").write_text("")
    found += [stamp(tmp_path), stamp(tmp_path / "two"), stamp(tmp_path / "none")]
    assert found[0] == found[1] and len(set(found)) == 5 and found[-1] is None


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also small data sets have an index, and such as were written just now."""
    monkeypatch.setattr(arrays, "FRESH", 0)
    for module in (index, opened):
        monkeypatch.setattr(module, "KEPT_FROM", 1)


@pytest.mark.parametrize("name", ["lerobot", "hdf5", "rlds", "zarr"])
@pytest.mark.usefixtures("any_size")
def test_a_data_set_is_read_once_and_again_when_it_changes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = squares_data.episodes(3)
    path = {
        "lerobot": lambda: squares_data.write(tmp_path / "lerobot", records),
        "hdf5": lambda: write_robomimic(tmp_path / "hdf5" / "squares.hdf5", records),
        "rlds": lambda: shutil.copytree(RLDS, tmp_path / "rlds", copy_function=shutil.copy),
        "zarr": lambda: write_zarr(tmp_path / "squares.zarr", records),
    }[name]()
    said = {"zarr": {"fps": 10, "labels": {"text": False}}, "rlds": {"fps": 20}}.get(name, {})
    source = SourceConfig.model_validate({"path": path, **said})
    reads: list[int] = []
    plain, mapped = reader.read_numbers, MappedStore._read
    monkeypatch.setattr(reader, "read_numbers", lambda *a: reads.append(1) or plain(*a))
    monkeypatch.setattr(MappedStore, "_read", lambda *a: reads.append(1) or mapped(*a))

    def opened_by(home: Path | None) -> Any:
        (part,) = open_parts([source], home=home)
        return part.store

    without, first, again = (opened_by(home) for home in (None, tmp_path / "cache", tmp_path / "cache"))
    assert len(reads) == 2
    for store in (first, again):
        assert isinstance(store.instruction_of.base, np.memmap) and store.fingerprint == without.fingerprint
        assert store.episodes == without.episodes and store.instructions == without.instructions
        for array in ("states", "actions", "instruction_of"):
            np.testing.assert_array_equal(getattr(store, array), getattr(without, array))
        (view, *_), rows = store.spec.views, np.array([3, 0])
        np.testing.assert_array_equal(store.frames(view, rows), without.frames(view, rows))
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1
    touched = next(one for one in (path, *path.rglob("*")) if one.is_file() and one.suffix != ".lock")
    touched.write_bytes(touched.read_bytes())
    assert opened_by(tmp_path / "cache").fingerprint == without.fingerprint
    assert len(reads) == 3 and len(list((tmp_path / "cache" / "index").iterdir())) == 1


@pytest.mark.usefixtures("any_size")
def test_batches_are_the_same_bits_with_an_index_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares_data.write(tmp_path / "data", squares_data.episodes(4))
    base = {"sources": [{"path": tmp_path / "data"}], "image_size": 8, "horizon": 2, "prefetch": 0}

    def drawn(home: str, **values: Any) -> tuple[str, list[int]]:
        config = DataConfig.model_validate({**base, "cache": {"folder": tmp_path / home}, **values})
        data = config.build(DataNeeds(states=("next_key", "last"), futures=("last",)))
        bits = []
        for batch in (next(data.train), *data.validation):
            every = (batch.actions, batch.action_mask, batch.instruction_id, batch.progress)
            later = (batch.later_states.values, batch.later_states.mask) if batch.later_states else ()
            seen = (batch.observation.images, batch.observation.state, batch.observation.text)
            bits.append(digest(*(one.numpy().tobytes() for one in (*every, *later, *seen))))
        return data.train.state_dict()["identity"], bits

    first = drawn("with")
    assert drawn("with") == first
    other = drawn("with", normalization="standard")
    assert other[1] != first[1] and drawn("with") == first
    for module in (index, opened):
        monkeypatch.setattr(module, "KEPT_FROM", 2**16)
    assert drawn("without") == first and drawn("without", normalization="standard") == other


def test_episodes_are_as_a_tuple_of_them() -> None:
    few = tuple(Episode(2 * n, 5 * n, 5 - n % 2, f"task {n % 3}") for n in range(7))
    many = Episodes.of(few)
    assert many == few and list(many) == list(few) and len(many) == 7 and many != few[1:]
    assert many[-1] == few[-1] and many[2:5] == few[2:5]
    chosen = np.array([True, False] * 3 + [True])
    assert many.where(chosen) == few[::2] and many.where(np.array([5, 1])) == (few[5], few[1])
    assert Episodes.joined((many, few)) == few * 2
    np.testing.assert_array_equal(bounds_of(many), bounds_of(few))
    np.testing.assert_array_equal(np.flatnonzero(mask_of(many, 40)), rows_of(few))


def test_four_thousand_episodes_take_no_python_objects_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "FRESH", 0)
    block = data_scale.first_block(tmp_path / "block")
    sets = [data_scale.multiplied(block, tmp_path / str(blocks), blocks) for blocks in (1, 40)]
    counts = list[int]()
    for folder in (sets[0], *sets):  # the first fills what is made once a process
        config = DataConfig.model_validate(
            {
                "sources": [{"path": folder}],
                "cache": {"kind": "none", "folder": tmp_path / "cache", "memory": 0},
                "image_size": data_scale.EDGE,
                "batch_size": 4,
                "prefetch": 0,
            }
        )
        tracemalloc.start()
        data = config.build(DataNeeds())
        next(data.train)
        gc.collect()
        counts.append(sum(one.count for one in tracemalloc.take_snapshot().statistics("filename")))
        tracemalloc.stop()
        assert len(data.parts[0].store.episodes) * 100 == len(data.windows)
    # There are 3,900 episodes more, in 39 files more of rows and of pictures, of some 37 objects each; what
    # the interpreter keeps beside them differs by up to 300 from run to run.
    assert counts[2] - counts[1] < 3900 / 2
