"""Kinds of the frame cache: raw, jpeg, none and auto give batches, resume and refuse as they say."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cache_kinds
import numpy as np
import pytest
import torch
from jaxtyping import Int64, UInt8
from test_data_loading import digest, write_set

from fixtures import hdf5_sets, lerobot_sets, pair_sets, zarr_sets
from fixtures.cache_builder import MemoryStore
from tutti.data.bundle import DataBundle
from tutti.data.cache import CacheConfig, LiveFrames, building, cached_frames, choice, decide
from tutti.data.cache.jpeg import jpeg_frames
from tutti.data.config import DataConfig
from tutti.data.episodes import EpisodeStore
from tutti.data.sources import SourceConfig
from tutti.distributed.ranks import Ranks
from tutti.storage.reading import read_json
from tutti.types import DataNeeds, UserError

TINY_RLDS = Path(__file__).resolve().parents[1] / "data" / "formats" / "rlds" / "tiny_rlds"


def hdf5(write: Callable[[Path], object], **more: Any) -> Callable[[Path], SourceConfig]:
    def made(folder: Path) -> SourceConfig:
        folder.mkdir()
        write(folder)
        return SourceConfig(path=folder, fps=20, **more)

    return made


SETS: dict[str, Callable[[Path], SourceConfig]] = {
    "lerobot v3, PNG": lambda folder: SourceConfig(path=lerobot_sets.write_v3(folder)),
    "lerobot v3, video": lambda folder: SourceConfig(path=lerobot_sets.write_v3(folder, video=True)),
    "lerobot v2.1, PNG": lambda folder: SourceConfig(path=lerobot_sets.write_v21(folder)),
    "LIBERO": hdf5(hdf5_sets.libero),
    "robomimic": hdf5(hdf5_sets.robomimic, text={"say": "lift"}),
    "ALOHA": hdf5(hdf5_sets.aloha, text={"say": "lift"}),
    "Zarr": lambda folder: SourceConfig(
        path=zarr_sets.write(folder, zarr_sets.diffusion()), fps=10, text={"say": "push"}
    ),
    "RLDS": lambda _: SourceConfig(path=TINY_RLDS, fps=10),
    **{
        f"pairs, {layout}": lambda folder, layout=layout: SourceConfig(path=pair_sets.write(folder, layout))
        for layout in pair_sets.LAYOUTS
    },
}


@pytest.mark.parametrize("name", SETS)
def test_what_is_decoded_when_asked_for_is_what_a_raw_cache_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In any order, rows twice, whatever is kept, and on several threads; the cache itself as well."""
    source, size, random = SETS[name](tmp_path / "set"), 16, np.random.default_rng(0)
    raw = cached_frames(source.open(), tmp_path / "one", size)
    monkeypatch.setattr(building, "SHARD_ROWS", 3)
    monkeypatch.setattr(building, "usable_cores", lambda: 4)
    np.testing.assert_array_equal(cached_frames(source.open(), tmp_path / "four", size), raw)
    row_bytes = raw[0].nbytes
    for memory, threads in ((0, 1), (3 * row_bytes, 1), (2**20, 3)):
        frames = LiveFrames(source.open(), size, memory=memory, threads=threads)
        assert frames.shape == raw.shape and len(frames) == len(raw)
        for _ in range(4):
            wanted = [random.integers(0, len(raw), count) for count in (7, 0, 5)]
            for rows, found in zip(wanted, frames.gather(wanted), strict=True):
                np.testing.assert_array_equal(found, raw[rows])


class CountingStore(MemoryStore):
    """Notes which rows it was asked for."""

    def __init__(self, num_frames: int, size: int) -> None:
        super().__init__(num_frames, size)
        self.asked: list[list[int]] = []

    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        if view == "left":
            self.asked.append(rows.tolist())
        return super().frames(view, rows)


def test_a_row_is_decoded_once_for_a_batch_in_rising_order_and_the_last_used_are_kept() -> None:
    store = CountingStore(40, 8)
    frames = LiveFrames(store, 8, memory=4 * 2 * 3 * 64)  # four rows
    frames.gather([np.array([9, 3, 3]), np.array([5, 9])])
    frames.gather([np.array([30, 3])])  # 3 is kept; 3, 30, and of the others the last used
    frames.gather([np.array([3, 30, 5, 9])])
    frames.gather([np.array([1, 2])])
    frames.gather([np.array([3, 5])])
    assert store.asked == [[3, 5, 9], [30], [1, 2], [3, 5]]


# --- batches


def kinds(tmp_path: Path) -> dict[str, dict[str, object]]:
    return {kind: {"folder": tmp_path / "cache", "kind": kind} for kind in ("raw", "none", "jpeg")}


def mixed(home: Path, cache: dict[str, object]) -> DataBundle:
    """A robot's set and pairs, whose picture is one of its two views."""
    if not home.exists():
        write_set(home / "robot")
        pair_sets.write(home / "pairs", "lines")
    sources = [SourceConfig(path=home / "robot"), SourceConfig(path=home / "pairs")]
    sections = {"horizon": 4, "batch_size": 6, "image_size": 8, "validation_fraction": 0.25, "cache": cache}
    config = DataConfig.model_validate({"sources": sources, **sections})
    return config.build(DataNeeds(futures=(3, "last")))


def opened(data: Path, cache: dict[str, object], **changes: object) -> DataBundle:
    settings = {"horizon": 4, "batch_size": 6, "image_size": 8, "validation_fraction": 0.25, "cache": cache}
    config = DataConfig.model_validate({"sources": (SourceConfig(path=data),), **settings, **changes})
    return config.build(DataNeeds(futures=(3,)))


def pictures(bundle: DataBundle, count: int) -> list[torch.Tensor]:
    batches = list(itertools.islice(bundle.train, count))
    seen = [o.images for b in batches for o in (b.observation, *(f.observation for f in b.futures.values()))]
    return [*seen, *(batch.observation.images for batch in bundle.validation)]


def test_batches_of_a_mixture_are_the_same_without_a_cache_and_others_of_jpeg(tmp_path: Path) -> None:
    home = tmp_path / "sets"
    raw, none, packed = (pictures(mixed(home, cache), 8) for cache in kinds(tmp_path).values())
    assert len(raw) == len(none) == len(packed) > 24
    for one, other in zip(raw, none, strict=True):
        assert torch.equal(one, other)
    assert not any(torch.equal(one, other) for one, other in zip(raw, packed, strict=True))
    assert {path.suffix for path in (tmp_path / "cache").glob("*/*") if path.name != ".lock"} == {
        *(".u8", ".jpegs", ".i64", ".json")
    }


@pytest.mark.parametrize("kind", ["raw", "jpeg", "none"])
def test_a_resume_goes_on_to_the_same_bits_with_threads_ranks_and_prefetching(
    tmp_path: Path, kind: str
) -> None:
    cache, data = kinds(tmp_path)[kind], write_set(tmp_path / "set")
    whole = opened(data, cache, prefetch=0)
    expected = [digest(batch) for batch in itertools.islice(whole.train, 12)]
    first = opened(data, cache | {"threads": 3, "memory": 0})
    got = [digest(batch) for batch in itertools.islice(first.train, 5)]
    state = first.train.state_dict()
    second = opened(data, cache)
    second.train.load_state_dict(state)
    got += [digest(batch) for batch in itertools.islice(second.train, 7)]
    assert got == expected
    shares = [opened(data, cache) for _ in range(2)]
    for number, bundle in enumerate(shares):
        bundle.train.share(Ranks(number, 2))
    halves = [next(bundle.train).observation.images for bundle in shares]
    for bundle in (first, second, *shares):
        bundle.train.close()
    own = whole.train.batch_at(0)
    joined = torch.empty_like(own.observation.images)
    for number, half in enumerate(halves):
        joined[Ranks(number, 2).rows(6)] = half
    assert torch.equal(joined, own.observation.images)


def test_a_checkpoint_of_other_pictures_is_refused_and_of_the_same_ones_is_not(tmp_path: Path) -> None:
    data, sets = write_set(tmp_path / "set"), kinds(tmp_path)
    made = {kind: opened(data, cache, prefetch=0).train for kind, cache in sets.items()}
    rough = opened(data, sets["jpeg"] | {"quality": 50}, prefetch=0).train
    made["none"].load_state_dict(made["raw"].state_dict())
    for one, other in ((made["raw"], made["jpeg"]), (made["jpeg"], made["none"]), (made["jpeg"], rough)):
        with pytest.raises(UserError, match="identity"):
            one.load_state_dict(other.state_dict())


def together(frames: Any, raw: np.ndarray) -> None:
    """Many threads gather at once, each other rows."""

    def gather(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, len(raw), 9)
        return np.array_equal(frames[rows], raw[rows])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(gather, range(24)))


@pytest.mark.parametrize("name", ["lerobot v3, video", "LIBERO", "RLDS", "pairs, parquet"])
def test_several_threads_gather_at_once(tmp_path: Path, name: str) -> None:
    source = SETS[name](tmp_path / "set")
    raw = cached_frames(source.open(), tmp_path / "cache", 16)
    together(LiveFrames(source.open(), 16, memory=3 * raw[0].nbytes, threads=2), raw)
    packed = jpeg_frames(source.open(), tmp_path / "cache", 16, threads=2)
    together(packed, packed[np.arange(len(raw))])


# --- JPEG


class SmoothStore(MemoryStore):
    """Pictures that JPEG is made for: gradients and a square."""

    def __init__(self, num_frames: int, size: int, fatal_row: int = -1) -> None:
        super().__init__(num_frames, size, fatal_row)
        y, x = np.mgrid[0:size, 0:size] * (255 // size)
        for view, row in np.ndindex(2, num_frames):
            self.pictures[view, row] = np.stack([x, y, np.full_like(x, 5 * row % 256)], -1)
            self.pictures[view, row, row % 16 : row % 16 + 16, :16] = 40 + 90 * view


def content(folder: Path) -> dict[str, bytes]:
    (home,) = folder.iterdir()
    return {path.name: path.read_bytes() for path in home.iterdir() if path.name != ".lock"}


def test_jpeg_is_near_small_and_the_same_bytes_on_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, size = SmoothStore(30, 64), 64
    raw = cached_frames(store, tmp_path / "raw", size).astype(int)
    rows = np.random.default_rng(0).permutation(30)
    found = {q: jpeg_frames(store, tmp_path / str(q), size, quality=q)[rows] for q in (90, 30)}
    errors = [np.abs(found[q] - raw[rows]).mean() for q in (90, 30)]
    assert errors[0] < 2 < errors[0] + errors[1] and errors[0] < errors[1]
    sizes = [sum(map(len, content(tmp_path / str(q)).values())) for q in (30, 90)]
    assert sizes[0] < sizes[1] < raw.size / 4
    monkeypatch.setattr(building, "SHARD_ROWS", 4)
    monkeypatch.setattr(building, "usable_cores", lambda: 3)
    monkeypatch.setattr(store, "another_reader", lambda: SmoothStore(30, 64))
    again = jpeg_frames(store, tmp_path / "again", size, threads=3)
    np.testing.assert_array_equal(again[rows], found[90])
    assert content(tmp_path / "again") == content(tmp_path / "90")


def test_an_interrupted_jpeg_cache_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD_ROWS", 4)
    jpeg_frames(SmoothStore(30, 16), tmp_path / "whole", 16)
    with pytest.raises(KeyboardInterrupt):
        jpeg_frames(SmoothStore(30, 16, fatal_row=17), tmp_path / "cut", 16)
    (partial,) = (tmp_path / "cut").glob("*/0.partial")
    with partial.open("ab") as file:  # written, but not said to be
        file.write(b"half a picture")
    asked: list[int] = []
    jpeg_frames(SmoothStore(30, 16, fatal_row=3), tmp_path / "cut", 16, progress=lambda n, _: asked.append(n))
    assert asked == [20, 24, 28, 30]
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_pillow_and_simplejpeg_decode_to_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    store, rows = MemoryStore(20, 64), np.arange(20)
    with_it = jpeg_frames(store, tmp_path, 64)[rows]
    calls = [0]

    def hidden(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "simplejpeg":
            calls[0] += 1
            raise ImportError
        return imported(name, *args, **kwargs)

    imported = __import__
    monkeypatch.setattr("builtins.__import__", hidden)
    np.testing.assert_array_equal(jpeg_frames(store, tmp_path, 64)[rows], with_it)
    assert calls[0] and simplejpeg


@pytest.mark.parametrize("damage", ["cut", "cut index", "no marker", "half a marker", "no pictures"])
def test_a_jpeg_cache_that_is_not_complete_is_built_anew(tmp_path: Path, damage: str) -> None:
    store = SmoothStore(20, 16)
    jpeg_frames(store, tmp_path, 16)
    expected, (home,) = content(tmp_path), tmp_path.iterdir()
    if damage.startswith("cut"):
        os.truncate(home / ("1-offsets.i64" if "index" in damage else "1.jpegs"), 100)
    elif damage == "half a marker":
        os.truncate(home / "complete.json", 20)
    else:
        (home / {"no marker": "complete.json", "no pictures": "0.jpegs"}[damage]).unlink()
    jpeg_frames(store, tmp_path, 16)
    assert content(tmp_path) == expected


def test_a_damaged_picture_is_named_with_what_to_delete(tmp_path: Path) -> None:
    store = SmoothStore(20, 16)
    jpeg_frames(store, tmp_path, 16)
    (home,) = tmp_path.iterdir()
    begin = np.fromfile(home / "1-offsets.i64", np.int64)[7]
    with (home / "1.jpegs").open("r+b") as file:
        file.seek(begin)
        file.write(b"no picture")
    frames = jpeg_frames(store, tmp_path, 16)
    frames[np.arange(7)]
    with pytest.raises(
        UserError, match=r"1\.jpegs: the picture of frame row 7[\s\S]*delete the folder.*16px"
    ):
        frames[np.array([3, 7])]


def test_a_disk_that_jpeg_does_not_fit_on_is_said_after_the_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD_ROWS", 4)
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000))
        with pytest.raises(
            UserError, match=r"the disk is full[\s\S]*needed: 0\.1 MiB[\s\S]*kind=jpeg or none"
        ):
            jpeg_frames(MemoryStore(60, 16), tmp_path, 16, progress=lambda n, _: asked.append(n))
    assert not asked
    jpeg_frames(MemoryStore(60, 16), tmp_path, 16, progress=lambda n, _: asked.append(n))
    assert asked[0] == 8, "what was finished is kept"


# --- none


@pytest.mark.parametrize("name", SETS)
def test_a_file_that_changes_while_a_run_goes_on_is_one_message(tmp_path: Path, name: str) -> None:
    source = SETS[name](tmp_path / "set")
    if name == "RLDS":
        source = source.model_copy(update={"path": shutil.copytree(TINY_RLDS, tmp_path / "set")})
    frames = LiveFrames(source.open(), 16, memory=0)
    frames[np.arange(2)]
    files = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    for said in ("has changed", "has gone"):
        for path in files:
            path.write_bytes(path.read_bytes()[::-1]) if said == "has changed" else path.unlink()
        expected = rf"{said} since this run opened the data set[\s\S]*cure: put it back"
        with pytest.raises(UserError, match=expected):
            frames[np.arange(3)]


def test_the_prefetching_thread_says_it_too_and_goes_on_once_the_file_is_back(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set")
    bundle = opened(data, {"kind": "none", "memory": 0, "folder": tmp_path / "nowhere"})
    expected = digest(bundle.train.batch_at(1))
    next(bundle.train)
    bundle.train.close()
    (path,) = data.glob("data/*/*.parquet")
    path.rename(tmp_path / "away")
    with pytest.raises(UserError, match="has gone since this run opened"):
        next(bundle.train)
    (tmp_path / "away").rename(path)
    assert digest(next(bundle.train)) == expected
    bundle.train.close()
    assert not (tmp_path / "nowhere").exists(), "nothing is written"


# --- auto


def free_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(choice.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def chosen(stores: Sequence[EpisodeStore], folder: Path, kept: Path | None = None) -> str:
    return decide(stores, CacheConfig(kind="auto", folder=folder), 64, kept).kind


def test_auto_takes_what_the_disk_has_room_for_and_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tutti")
    store = SmoothStore(400, 64)
    size = 400 * 2 * 3 * 64 * 64
    monkeypatch.setattr(choice.time, "perf_counter", itertools.count(0, 5).__next__)
    for free, kind in ((2 * size, "raw"), (size, "jpeg"), (size // 100, "none")):
        free_disk(monkeypatch, free)
        assert chosen([store], tmp_path) == kind
    assert not list(tmp_path.iterdir())
    raw, packed, none = caplog.messages
    # 32 rows were decoded in 5 s and encoded in 5 s.
    assert raw.startswith("frame cache: raw by data.cache.kind=auto: raw takes 9.4 MiB, jpeg about ")
    assert raw.endswith(f"of 18.8 MiB that are free at {tmp_path}; built in about 0:01:02")
    assert packed.startswith("frame cache: jpeg by") and packed.endswith("built in about 0:02:05")
    assert none.startswith("frame cache: none by") and "is decoded in about 1.6e+02 ms" in none


def test_auto_takes_a_raw_cache_that_is_there_and_counts_what_an_interrupted_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD_ROWS", 40)
    with pytest.raises(KeyboardInterrupt):
        cached_frames(SmoothStore(400, 64, fatal_row=380), tmp_path, 64)
    store = SmoothStore(400, 64)
    with monkeypatch.context() as patch:
        free_disk(patch, 400 * 2)
        assert chosen([store], tmp_path) == "raw"
    cached_frames(store, tmp_path, 64)
    free_disk(monkeypatch, 0)
    assert chosen([store], tmp_path) == "raw"
    assert chosen([store, SmoothStore(401, 64)], tmp_path) == "none"


def test_what_auto_decided_stays_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, kept = SmoothStore(40, 64), tmp_path / "frame_cache.json"
    free_disk(monkeypatch, 0)
    assert chosen([store], tmp_path, kept) == "none"
    free_disk(monkeypatch, 2**40)
    assert chosen([store], tmp_path, kept) == "none" and read_json(kept) == {"kind": "none"}
    assert decide([store], CacheConfig(kind="jpeg"), 64, kept).kind == "jpeg"
    kept.write_text('{"kind": "zip"}')
    with pytest.raises(
        UserError, match=r"frame_cache\.json: kind is .zip[\s\S]*expected: one of raw, jpeg, none"
    ):
        chosen([store], tmp_path, kept)


def test_the_benchmark_measures_every_kind_in_one_run(tmp_path: Path) -> None:
    sizes = {"episodes": 2, "length": 6, "edge": 16, "rounds": 2, "batches": 2, "batch-size": 4}
    given = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert cache_kinds.main([*given, "--output", str(tmp_path / "out")]) == 0
    rates = read_json(tmp_path / "out.json")["rates"]
    assert {kind: len(each["gathering"]) for kind, each in rates.items()} == {"raw": 2, "jpeg": 2, "none": 2}
    assert all(rate > 0 for each in rates.values() for many in each.values() for rate in many)
