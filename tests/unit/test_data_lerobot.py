"""LeRobotDataset v3.0: what is written is what is read, and every bad input is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fixtures.lerobot_sets import write_v21
from tutti.data.formats.lerobot import reader
from tutti.data.formats.lerobot import writer as lerobot_writer
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.formats.lerobot.writer import EpisodeRecord, Storage, write_lerobot
from tutti.data.formats.pictures import sampled_bytes
from tutti.types import UserError

VIEWS = ("observation.images.right", "observation.images.top")
LENGTHS = (7, 5, 9)
ENVIRONMENT = "observation.environment_state"


def make_episodes(lengths: tuple[int, ...] = LENGTHS, size: int = 16) -> list[EpisodeRecord]:
    episodes = []
    for number, length in enumerate(lengths):
        random = np.random.default_rng(number)
        images = {v: random.integers(0, 256, (length, size, size + 4, 3), dtype=np.uint8) for v in VIEWS}
        vectors = [random.normal(size=(length, k)).astype(np.float32) for k in (4, 3, 1)]
        episodes.append(
            EpisodeRecord(
                images=images,
                states=vectors[0],
                actions=vectors[1],
                instruction=("open it", "close it")[number % 2],
                extra={ENVIRONMENT: vectors[2]},
            )
        )
    return episodes


def write(folder: Path, episodes: list[EpisodeRecord] | None = None, storage: Storage = "image") -> Path:
    chosen = make_episodes() if episodes is None else episodes
    return write_lerobot(folder, chosen, fps=20, views=VIEWS, robot_type="sawyer", storage=storage)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set")


def test_of_many_videos_no_more_is_digested_than_of_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LeRobotStore(write_v21(tmp_path / "set", video=True))
    files = sorted((tmp_path / "set").rglob("*.mp4"))
    for path in files:
        path.write_bytes(path.read_bytes().ljust(300_000))
    read: list[int] = []

    def sampled(*arguments: Any) -> bytes:
        content = sampled_bytes(*arguments)
        read.append(len(content))
        return content

    monkeypatch.setattr(reader, "SAMPLED_BYTES", 3 * 2**15)
    monkeypatch.setattr(reader, "sampled_bytes", sampled)
    before = store.picture_digests()
    assert read == [2**15 + 8] * len(files) == [2**15 + 8] * 3
    files[1].write_bytes(b"x" + files[1].read_bytes()[1:])
    assert (store.picture_digests() != before).tolist() == [False, True, False]


@pytest.mark.parametrize("storage", ["image", "video"])
def test_an_episode_of_more_pictures_than_are_encoded_at_once_keeps_them_all(
    tmp_path: Path, storage: Storage
) -> None:
    (record,) = make_episodes((150,), 64)
    levels = np.linspace(5, 250, 150).astype(np.uint8)[:, None, None, None]
    images = {view: np.broadcast_to(levels, (150, 64, 64, 3)).copy() for view in VIEWS}
    store = LeRobotStore(write(tmp_path / "set", [replace(record, images=images)], storage))
    seen = store.frames(VIEWS[1], np.arange(150)).mean(axis=(1, 2, 3))
    assert np.abs(seen - levels.ravel()).max() <= (0 if storage == "image" else 4.5)


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def edit_info(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def set_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


DATA = Path("data/chunk-000/file-000.parquet")
EPISODES = Path("meta/episodes/chunk-000/file-000.parquet")
TASKS = Path("meta/tasks.parquet")


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system does not tell")
def test_writing_videos_leaves_the_process_as_it_was_scheduled(tmp_path: Path) -> None:
    """The encoder makes root's threads real-time ones, which starved everything beside them."""
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    write(tmp_path / "set", make_episodes(), "video")
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before


def test_png_round_trip_is_exact_to_the_bit_in_any_order(folder: Path) -> None:
    store = LeRobotStore(folder)
    for episode, record in zip(store.episodes, make_episodes(), strict=True):
        rows = np.arange(episode.start, episode.end)
        np.testing.assert_array_equal(store.states[rows], record.states)
        np.testing.assert_array_equal(store.actions[rows], record.actions)
        assert episode.instruction == record.instruction
        for view in VIEWS:
            np.testing.assert_array_equal(store.frames(view, rows), record.images[view])
    rows = np.array([20, 0, 7, 7, 3])
    expected = np.concatenate([e.images[VIEWS[0]] for e in make_episodes()])[rows]
    np.testing.assert_array_equal(store.frames(VIEWS[0], rows), expected)
    assert store.spec.image_shapes[0] == (16, 20)
    assert (store.spec.fps, store.spec.embodiment, store.spec.views) == (20.0, "sawyer", VIEWS)


def test_video_frames_are_the_right_ones_at_any_order(tmp_path: Path) -> None:
    # Frame i of the data set is one flat grey level of its own, so that a wrong frame cannot hide in noise.
    levels = np.linspace(20, 235, sum(LENGTHS)).round()
    start, episodes = 0, []
    for record in make_episodes(size=64):
        stop = start + len(record.actions)
        grey = levels[start:stop, None, None, None].astype(np.uint8)
        images = {view: np.broadcast_to(grey, (stop - start, 64, 64, 3)).copy() for view in VIEWS}
        episodes.append(
            EpisodeRecord(images=images, states=record.states, actions=record.actions, instruction="a")
        )
        start = stop
    store = LeRobotStore(write(tmp_path / "set", episodes, "video"))
    rows = np.random.default_rng(0).permutation(sum(LENGTHS))
    for chosen in (np.sort(rows), rows):
        seen = store.frames(VIEWS[1], chosen).mean((1, 2, 3))
        assert np.abs(seen - levels[chosen]).max() < 4.5  # levels are 10.75 apart


@pytest.mark.parametrize(("height", "width", "apart"), [(64, 64, True), (66, 96, True), (64, 98, False)])
def test_video_frames_channel_by_channel_have_the_same_bytes(
    height: int, width: int, apart: bool, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (6, height // 2, width // 2, 3), np.uint8).repeat(2, 1).repeat(2, 2)
    (episode,) = make_episodes((6,))
    episode = replace(episode, images=dict.fromkeys(VIEWS, pictures))
    store = LeRobotStore(write(tmp_path / "video", [episode], storage="video"))
    view, rows = VIEWS[0], np.arange(store.spec.num_frames)
    for own, picture in zip(store.frames(view, rows), store.rising(view, rows, planes=True), strict=True):
        np.testing.assert_array_equal(picture, own)
        assert picture.transpose(2, 0, 1).flags.c_contiguous == apart


def test_layout_is_that_of_lerobot(folder: Path) -> None:
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 21, 2)
    assert info["video_path"] is None and info["splits"] == {"train": "0:3"} and info["fps"] == 20
    keys = [*VIEWS, "observation.state", "action", ENVIRONMENT]
    keys += ["timestamp", "frame_index", "episode_index", "index", "task_index"]
    assert list(info["features"]) == keys
    data = pq.ParquetFile(folder / DATA)
    assert data.num_row_groups == 3 and data.schema_arrow.names == keys
    table = data.read()
    assert table.schema.field("action").type == pa.list_(pa.float32(), 3)
    assert table.schema.field(ENVIRONMENT).type == pa.float32()
    assert table["index"].to_pylist() == list(range(21))
    assert table["task_index"].to_pylist() == [0] * 7 + [1] * 5 + [0] * 9
    assert table[VIEWS[0]][8]["path"].as_py() == "frame-000001.png"
    np.testing.assert_allclose(table["timestamp"].to_numpy()[7:12], np.arange(5) / 20, rtol=1e-6)
    tasks = pq.read_table(folder / TASKS).to_pandas()
    assert tasks.index.tolist() == ["open it", "close it"] and tasks.index.name == "task"
    episodes = pq.read_table(folder / EPISODES)
    assert episodes["dataset_to_index"].to_pylist() == [7, 12, 21]
    assert episodes["tasks"].to_pylist() == [["open it"], ["close it"], ["open it"]]


def test_stats_are_those_of_all_frames(folder: Path) -> None:
    stats = json.loads((folder / "meta/stats.json").read_text())
    actions = np.concatenate([e.actions for e in make_episodes()]).astype(np.float64)
    names = ["min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"]
    assert all(list(entry) == names for entry in stats.values())
    np.testing.assert_allclose(stats["action"]["q01"], np.quantile(actions, 0.01, axis=0))
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0))
    assert stats["action"]["count"] == [21]
    pictures = np.concatenate([e.images[VIEWS[0]] for e in make_episodes()]) / 255.0
    camera = stats[VIEWS[0]]
    assert np.shape(camera["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(camera["mean"]), pictures.mean((0, 1, 2)))
    np.testing.assert_allclose(np.ravel(camera["std"]), pictures.std((0, 1, 2)))
    np.testing.assert_allclose(
        np.ravel(camera["q90"]), np.quantile(pictures, 0.9, axis=(0, 1, 2)), atol=1 / 255
    )
    episodes = pq.read_table(folder / EPISODES)
    first = make_episodes()[0].states.astype(np.float64)
    np.testing.assert_allclose(episodes["stats/observation.state/max"][0].as_py(), first.max(0))


def test_several_files_list_columns_doubles_and_any_order_are_read(folder: Path) -> None:
    table = pq.read_table(folder / DATA)
    loose = {
        name: pa.array(table[name].to_pylist(), type=pa.list_(pa.float64()))
        for name in ("action", "observation.state")
    }
    table = pa.table({name: loose.get(name, table[name]) for name in reversed(table.column_names)})
    (folder / "data/chunk-001").mkdir()
    pq.write_table(table.slice(0, 12), folder / DATA)
    pq.write_table(table.slice(12), folder / "data/chunk-001/file-000.parquet")
    store = LeRobotStore(folder)
    np.testing.assert_array_equal(store.actions, np.concatenate([e.actions for e in make_episodes()]))
    pictures = np.concatenate([e.images[VIEWS[1]] for e in make_episodes()])
    np.testing.assert_array_equal(store.frames(VIEWS[1], np.arange(21)), pictures)


def test_a_view_can_be_chosen(folder: Path) -> None:
    assert LeRobotStore(folder, views=VIEWS[1:]).spec.views == VIEWS[1:]
    with pytest.raises(UserError, match="is named twice"):
        LeRobotStore(folder, views=VIEWS[1:] * 2)
    with pytest.raises(UserError, match=r"observation\.images\.tap.*no camera"):
        LeRobotStore(folder, views=("observation.images.tap",))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def poison(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def edit(table: pa.Table) -> pa.Table:
            values = np.array(table[key].to_pylist(), dtype=np.float32)
            values[9, 2] = np.nan
            flat = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            return set_column(key, flat)(table)

        edit_table(folder / DATA, edit)

    return change


def break_png(folder: Path) -> None:
    def edit(table: pa.Table) -> pa.Table:
        items = table[VIEWS[0]].to_pylist()
        items[4] = {"bytes": items[4]["bytes"][:60], "path": None}
        return set_column(VIEWS[0], pa.array(items, type=table[VIEWS[0]].type))(table)

    edit_table(folder / DATA, edit)


def short_episode(folder: Path) -> None:
    edit_table(folder / EPISODES, set_column("dataset_to_index", pa.array([7, 8, 21])))
    edit_table(folder / EPISODES, set_column("dataset_from_index", pa.array([0, 7, 8])))


def column(path: Path, name: str, values: list[int]) -> Callable[[Path], None]:
    return lambda folder: edit_table(folder / path, set_column(name, pa.array(values)))


def total(key: str, value: int) -> Callable[[Path], None]:
    return lambda folder: edit_info(folder, lambda info: info.update({f"total_{key}": value}))


BAD_INPUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"no LeRobotDataset: meta/info\.json is missing"),
    "info not JSON": (lambda f: (f / "meta/info.json").write_text("{"), r"info\.json: not valid JSON"),
    "v1.6": (
        lambda f: edit_info(f, lambda i: i.update(codebase_version="v1.6")),
        r"info\.json: .*'v1\.6'; expected 'v2\.0', 'v2\.1' or 'v3\.x'[\s\S]*v1 to v2\.0",
    ),
    "no fps": (lambda f: edit_info(f, lambda i: i.pop("fps")), r"info\.json: fps is wrong"),
    "fps 0": (lambda f: edit_info(f, lambda i: i.update(fps=0)), r"fps is wrong[\s\S]*found: +0"),
    "a shape of text": (
        lambda f: edit_info(f, lambda i: i["features"]["action"].update(shape=["3"])),
        r"features\.action\.shape\.0 is wrong",
    ),
    "no action": (lambda f: edit_info(f, lambda i: i["features"].pop("action")), r"'action' is missing"),
    "wrong action shape": (
        lambda f: edit_info(f, lambda i: i["features"]["action"].update(shape=[5])),
        r"file-000\.parquet: the column 'action'[\s\S]*expected: 5 numbers[\s\S]*found: .*\[3\]",
    ),
    "wrong image shape": (
        lambda f: edit_info(f, lambda i: i["features"][VIEWS[0]].update(shape=[32, 32, 3])),
        r"images\.right in frame row 0 [\s\S]*\(32, 32, 3\)",
    ),
    "wrong total_frames": (total("frames", 99), r"episodes has 21 .*info\.json says total_frames = 99"),
    "wrong total_episodes": (total("episodes", 4), r"has 3 .*info\.json says total_episodes = 4"),
    "wrong total_tasks": (total("tasks", 3), r"has 2 .*info\.json says total_tasks = 3"),
    "missing data": (lambda f: (f / DATA).unlink(), r"file-000\.parquet is missing"),
    "truncated data": (lambda f: truncate(f / DATA), r"file-000\.parquet cannot be read as Parquet"),
    "no pictures": (
        lambda f: edit_table(f / DATA, lambda t: t.drop([VIEWS[0]])),
        r"file-000\.parquet cannot be read[\s\S]*images\.right",
    ),
    "fewer rows than meta": (
        lambda f: edit_table(f / DATA, lambda t: t.slice(0, 20)),
        r"data has 20 .*total_frames = 21",
    ),
    "missing tasks": (lambda f: (f / TASKS).unlink(), r"tasks\.parquet is missing"),
    "swapped tasks": (
        lambda f: edit_table(f / TASKS, lambda t: t.take([1, 0])),
        r"tasks\.parquet: task_index of row 0 is 1; expected 0",
    ),
    "task out of range": (column(DATA, "task_index", [2] * 21), r"task_index of row 0 is 2; .* of 2 in"),
    "no episodes": (lambda f: (f / EPISODES).unlink(), r"meta/episodes holds no Parquet file"),
    "truncated episodes": (lambda f: truncate(f / EPISODES), r"episodes.* cannot be read as Parquet"),
    "swapped episodes": (
        lambda f: edit_table(f / EPISODES, lambda t: t.take([1, 0, 2])),
        r"episode_index of row 0 is 1; expected 0",
    ),
    "gap between episodes": (
        column(EPISODES, "dataset_from_index", [0, 8, 12]),
        r"dataset_from_index of row 1 is 8; expected 7",
    ),
    "episode of one frame": (short_episode, r"dataset_to_index of row 1 is 8; expected 9 or more"),
    "wrong length": (column(EPISODES, "length", [7, 6, 9]), r"length of row 1 is 6; expected 5"),
    "wrong episode_index": (
        column(DATA, "episode_index", [0] * 8 + [1] * 4 + [2] * 9),
        r"episode_index of row 7 is 0; expected 1",
    ),
    "wrong index": (column(DATA, "index", list(range(1, 22))), r"index of row 0 is 1; expected 0"),
    "NaN action": (poison("action"), r"action is nan in episode 1, row 2 of it \(frame row 9\), dimension 2"),
    "NaN state": (poison("observation.state"), r"observation\.state is nan in episode 1, row 2"),
    "damaged picture": (break_png, r"images\.right in frame row 4 cannot be read"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named_with_its_cure(folder: Path, name: str) -> None:
    change, message = BAD_INPUTS[name]
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        LeRobotStore(folder).frames(VIEWS[0], np.arange(21))
    assert "cure" in str(caught.value).lower() and len(str(caught.value).splitlines()) < 10


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("videos") / "set", make_episodes(size=64), "video")


def end_early(video: Path) -> None:
    other = write(video.parents[3] / "short", make_episodes((7, 5), size=64), "video")
    shutil.copy(other / "videos" / video.relative_to(video.parents[2]), video)


BAD_VIDEOS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"top/chunk-000/file-000\.mp4 is missing"),
    "damaged": (lambda v: v.write_bytes(b"\0" * 500), r"top/chunk-000/file-000\.mp4 cannot be decoded"),
    "ends early": (end_early, r"has 12 frames and ends at 0\.6 s: too few for episode 2"),
    "of another size": (
        lambda v: edit_info(v.parents[3], lambda i: i["features"][VIEWS[1]].update(shape=[32, 32, 3])),
        r"file-000\.mp4: a picture .*\(64, 68, 3\); info\.json says \(32, 32, 3\)",
    ),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_a_bad_video_is_named(videos: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(videos, tmp_path / "set")
    change, message = BAD_VIDEOS[name]
    change(folder / f"videos/{VIEWS[1]}/chunk-000/file-000.mp4")
    with pytest.raises(UserError, match=rf"{message}[\s\S]*cure"):
        LeRobotStore(folder).frames(VIEWS[1], np.arange(21))


def test_a_full_disk_says_how_much_and_where_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(pq.ParquetWriter):
        def write_table(self, table: pa.Table, row_group_size: int | None = None) -> None:
            if table["episode_index"][0].as_py() == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write_table(table, row_group_size)

    monkeypatch.setattr(lerobot_writer.pq, "ParquetWriter", FullDisk)
    with pytest.raises(UserError, match=r"disk is full[\s\S]*needed: about [\s\S]*2 were written[\s\S]*cure"):
        write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_data_set_and_the_next_one_finishes(tmp_path: Path) -> None:
    (tmp_path / ".partial-set").mkdir()
    (tmp_path / ".partial-set" / "junk").write_text("from a killed run")
    assert tree_hash(write(tmp_path / "set")) == tree_hash(write(tmp_path / "b"))
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "set")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("actions", np.full((5, 3), np.inf, dtype=np.float32), "action is inf at step=0"),
        ("actions", np.zeros((5, 2), dtype=np.float32), "differs from the first"),
        ("states", np.zeros((4, 4), dtype=np.float32), "one length"),
        ("images", {}, "expected the views"),
    ],
)
def test_the_writer_refuses_what_does_not_fit(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    episodes = make_episodes()
    object.__setattr__(episodes[1], field, value)  # past the shape check, which only tests have
    with pytest.raises(UserError, match=message):
        write(tmp_path / "set", episodes)
    assert not (tmp_path / "set").exists()
