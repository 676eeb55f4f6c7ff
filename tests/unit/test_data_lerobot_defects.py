"""What public LeRobot data sets get wrong, in v2.1 and in v3 where it occurs there: what becomes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av.error
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fixtures.lerobot_sets import (
    FPS,
    LENGTHS,
    V3_EPISODES,
    VIEW,
    data_files,
    edit_data,
    edit_info,
    grey,
    record,
    set_tasks,
    with_column,
    write_v3,
    write_v21,
)
from tutti.data.episodes import EpisodeStore
from tutti.data.sources import SourceConfig
from tutti.errors import UserError

WRITE: dict[str, Callable[..., Path]] = {"v2": write_v21, "v3": write_v3}
VIDEO_OF_1 = {
    "v2": f"videos/chunk-000/{VIEW}/episode_000001.mp4",
    "v3": f"videos/{VIEW}/chunk-000/file-000.mp4",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """A sound set of each version, with pictures in the data files or as videos."""
    home = tmp_path_factory.mktemp("sound")
    return {
        (version, video): write(home / f"{version}-{video}", video=video)
        for version, write in WRITE.items()
        for video in (False, True)
    }


@pytest.fixture(params=("v2", "v3"))
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(sound: dict[tuple[str, bool], Path], version: str, tmp_path: Path) -> Path:
    """A copy of the one with pictures in the data files."""
    return shutil.copytree(sound[version, False], tmp_path / "set")


@pytest.fixture
def filmed(sound: dict[tuple[str, bool], Path], version: str, tmp_path: Path) -> Path:
    """A copy of the one with videos."""
    return shutil.copytree(sound[version, True], tmp_path / "filmed")


def opened(folder: Path, **keys: Any) -> EpisodeStore:
    return SourceConfig.model_validate({"path": folder, **keys}).open()


def assert_right(store: EpisodeStore, tolerance: float = 4.0) -> None:
    """The numbers are those that were recorded, and each frame is its own."""
    for episode in store.episodes:
        rows, made = np.arange(episode.start, episode.end), record(episode.index, LENGTHS[episode.index])
        np.testing.assert_array_equal(store.actions[rows], made.actions)
        seen = store.frames(store.spec.views[0], rows).mean((1, 2, 3))
        assert np.abs(seen - grey(episode.index, np.arange(episode.length))).max() < tolerance


def refused(folder: Path, **keys: Any) -> str:
    """The message for a set that is refused when it is opened or its pictures are read."""
    with pytest.raises(UserError) as caught:
        store = opened(folder, **keys)
        for view in store.spec.views:
            store.frames(view, np.arange(store.spec.num_frames))
    assert "cure:" in str(caught.value).lower()
    return str(caught.value)


def test_sound_sets_are_the_same_in_each_version(sound: dict[tuple[str, bool], Path]) -> None:
    stores = {kind: opened(folder) for kind, folder in sound.items()}
    for store in stores.values():
        assert_right(store)
        assert store.remarks == ()
    for video in (False, True):
        v2, v3 = stores["v2", video], stores["v3", video]
        assert v2.spec == v3.spec and v2.episodes == v3.episodes
        assert v2.content.episodes["states"].tolist() == v3.content.episodes["states"].tolist()
        assert v2.content.episodes["instructions"].tolist() == v3.content.episodes["instructions"].tolist()
    # Pictures in the data files are compared as they are stored, so here both are one data set.
    assert stores["v2", False].fingerprint == stores["v3", False].fingerprint


def test_blank_lines_at_the_end_of_jsonl_are_passed_over(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set")
    for path in (folder / "meta").glob("*.jsonl"):
        path.write_text(f"{path.read_text()}\n  \n")
    assert_right(opened(folder))


def test_lines_of_jsonl_may_lie_in_any_order(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set")
    for path in (folder / "meta").glob("*.jsonl"):
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    store = opened(folder)
    assert_right(store)
    assert [one.instruction for one in store.episodes] == ["open it", "close it", "push it"]


def test_empty_texts_are_counted_and_masked_where_that_is_asked(folder: Path) -> None:
    set_tasks(folder, ["open it", " ", "push it"])
    message = refused(folder)
    assert "1 of 3 have no instruction" in message and "sources.labels.text=where_present" in message
    store = opened(folder, labels={"text": "where_present"})
    spoken = [store.present["text"][e.start : e.end].tolist() for e in store.episodes]
    assert [set(one) for one in spoken] == [{True}, {False}, {True}]


def test_a_set_without_tasks_has_no_text(folder: Path) -> None:
    next((folder / "meta").glob("tasks.*")).unlink()
    edit_info(folder, lambda info: info.update(total_tasks=0))
    edit_data(folder, lambda table: table.drop(["task_index"]))
    assert "is missing" in refused(folder) or "cannot be read" in refused(folder)
    for use in ("where_present", False):
        store = opened(folder, labels={"text": use})
        assert not store.present["text"].any()
        assert_right(store)


def test_an_empty_table_of_tasks_is_none(folder: Path, version: str) -> None:
    edit_info(folder, lambda info: info.update(total_tasks=0))
    if version == "v2":
        (folder / "meta/tasks.jsonl").write_text("\n")
    else:
        schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())])
        pq.write_table(schema.empty_table(), folder / "meta/tasks.parquet")
    assert "sources.labels.text=where_present" in refused(folder)
    assert not opened(folder, labels={"text": False}).present["text"].any()


def test_one_text_for_all_is_taken(folder: Path) -> None:
    set_tasks(folder, ["do it", "do it", "do it"])
    assert {one.instruction for one in opened(folder).episodes} == {"do it"}


def test_an_index_of_the_tasks_without_a_name_is_accepted(tmp_path: Path) -> None:
    folder = write_v3(tmp_path / "set")
    path = folder / "meta/tasks.parquet"
    table = pq.read_table(path).replace_schema_metadata()
    pq.write_table(table.rename_columns(["task_index", "__index_level_0__"]), path)
    assert_right(opened(folder))


def test_times_by_a_clock_are_named_and_taken_by_number_where_that_is_allowed(filmed: Path) -> None:
    """With as many frames as rows frame k is frame k, whatever the clock said."""
    edit_data(filmed, with_column("timestamp", lambda t: t + 0.04 * np.sin(np.arange(len(t)) * 3.0) + 0.01))
    assert "sources.tolerance=" in refused(filmed)
    assert_right(opened(filmed, tolerance=0.6))


def test_a_video_with_more_frames_than_rows_is_read_by_time_and_remarked(
    version: str, tmp_path: Path
) -> None:
    if version == "v2":
        folder = write_v21(tmp_path / "set", video=True, extra_frames={0: 3, 2: 1})
        store = opened(folder)
        assert_right(store)
        assert "2 of 3 videos" in store.remarks[0] and VIEW in store.remarks[0]
        return
    # A take was discarded: its rows are gone, its frames are still in the video.
    folder = write_v3(tmp_path / "set", video=True)
    table = pq.read_table(folder / V3_EPISODES).take([0, 2])
    for key, values in {
        "episode_index": [0, 1],
        "dataset_from_index": [0, 5],
        "dataset_to_index": [5, 11],
    }.items():
        table = table.set_column(table.column_names.index(key), key, pa.array(values))
    pq.write_table(table, folder / V3_EPISODES)
    edit_info(folder, lambda info: info.update(total_episodes=2, total_frames=11))
    rows = pq.read_table(path := data_files(folder)[0]).take([*range(5), *range(9, 15)])
    for key, values in {"episode_index": [0] * 5 + [1] * 6, "index": list(range(11))}.items():
        rows = rows.set_column(rows.column_names.index(key), key, pa.array(values))
    pq.write_table(rows, path)
    store = opened(folder)
    assert "1 of 1 videos" in store.remarks[0]
    seen = store.frames(VIEW, np.arange(11)).mean((1, 2, 3))
    assert np.abs(seen - np.r_[grey(0, np.arange(5)), grey(2, np.arange(6))]).max() < 4


def test_a_video_with_fewer_frames_than_rows_names_its_episode(version: str, tmp_path: Path) -> None:
    if version == "v2":
        folder = write_v21(tmp_path / "set", video=True, extra_frames={1: -2})
    else:  # also what a merge with wrong offsets looks like: to_timestamp lies behind the end of the mp4
        folder = write_v3(tmp_path / "set", video=True)
        other = write_v3(tmp_path / "short", video=True, lengths=LENGTHS[:2])
        shutil.copy(other / VIDEO_OF_1["v3"], folder / VIDEO_OF_1["v3"])
    message, bad = refused(folder), {"v2": 1, "v3": 2}[version]
    assert f"too few for episode {bad} of" in message and f"sources.exclude=[{bad}]" in message
    assert_right(opened(folder, exclude=[bad]))


def test_a_merge_that_names_a_wrong_offset_is_refused(tmp_path: Path) -> None:
    folder = write_v3(tmp_path / "set", video=True)
    table = pq.read_table(folder / V3_EPISODES)
    for name in ("from", "to"):
        key = f"videos/{VIEW}/{name}_timestamp"
        moved = [*table[key].to_pylist()[:2], table[key].to_pylist()[2] + 0.4]
        table = table.set_column(table.column_names.index(key), key, pa.array(moved))
    pq.write_table(table, folder / V3_EPISODES)
    assert "too few for episode 2 of" in refused(folder)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    filmed: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeRobot joins videos into files of mode 0600. A test may run as root, who reads everything."""
    video, whole = filmed / VIDEO_OF_1[version], av.open

    def forbidding(path: str, *given: Any, **keys: Any) -> Any:
        if path == str(video):
            raise av.error.PermissionError(13, "Permission denied", path)
        return whole(path, *given, **keys)

    monkeypatch.setattr(av, "open", forbidding)
    message = refused(filmed)
    assert "permissions" in message and "chmod" in message and "damaged" not in message
    monkeypatch.undo()
    data = data_files(filmed)[-1]
    parquet = pq.ParquetFile

    def forbidden(path: Path, **keys: Any) -> Any:
        if path == data:
            raise PermissionError(13, "Permission denied", str(path))
        return parquet(path, **keys)

    monkeypatch.setattr(pq, "ParquetFile", forbidden)
    message = refused(filmed)
    assert "permissions" in message and str(data) in message and "damaged" not in message


def test_stored_statistics_are_never_read(folder: Path) -> None:
    for name in ("stats.json", "episodes_stats.jsonl"):
        (folder / "meta" / name).write_text('{"action": {"std": [0, NaN')
    assert_right(opened(folder))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([["a", "b", "c"]], ("a", "b", "c")),
        ({"motors": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"motors": [["a"], ["b", "c"]]}, ("a", "b", "c")),
        (None, ("action[0]", "action[1]", "action[2]")),
    ],
)
def test_nested_names_are_flattened(folder: Path, names: Any, expected: tuple[str, ...]) -> None:
    edit_info(folder, lambda info: info["features"]["action"].update(names=names))
    assert opened(folder).spec.action_names == expected


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([3, 64, 64], ["channels", "height", "width"]),
        ([3, 64, 64], None),
        ([3, 64, 64], ["height", "width", "channel"]),
        ([64, 64, 3], ["channel", "height", "width"]),
        ([64, 64, 3], {"axes": ["height", "width", "channels"]}),
    ],
)
def test_the_axis_of_the_channels_is_found(folder: Path, shape: list[int], names: Any) -> None:
    edit_info(folder, lambda info: info["features"][VIEW].update(shape=shape, names=names))
    assert_right(opened(folder))


def test_keys_as_openpi_writes_them_are_guessed_and_told(folder: Path) -> None:
    renamed = {VIEW: "image", "observation.state": "state", "action": "actions"}
    edit_data(folder, lambda t: t.rename_columns([renamed.get(name, name) for name in t.column_names]))
    edit_info(
        folder,
        lambda info: info.update(features={renamed.get(k, k): v for k, v in info["features"].items()}),
    )
    store = opened(folder)
    assert_right(store)
    assert [remark.split(": ", 1)[1] for remark in store.remarks] == [
        "sources.state is auto: state (there is no observation.state; openpi's data sets call it so)",
        "sources.action is auto: actions (there is no action; openpi's data sets call it so)",
    ]
    assert store.spec.views == ("image",)
    assert opened(folder, state="state", action="actions").remarks == ()
    assert "'observation.joints' is missing" in refused(folder, state="observation.joints")


def test_a_state_split_over_features_is_joined(folder: Path) -> None:
    def split(table: pa.Table) -> pa.Table:
        values = np.array(table["observation.state"].to_pylist(), np.float32)
        joints = pa.FixedSizeListArray.from_arrays(pa.array(values[:, :3].ravel()), 3)
        table = table.append_column("joint_position", joints)
        return table.append_column("gripper_position", pa.array(values[:, 3])).drop(["observation.state"])

    whole = opened(folder).states
    edit_data(folder, split)

    def named(info: dict[str, Any]) -> None:
        info["features"].pop("observation.state")
        for key, size in (("joint_position", 3), ("gripper_position", 1)):
            info["features"][key] = {"dtype": "float32", "shape": [size], "names": None}

    edit_info(folder, named)
    store = opened(folder, state=["joint_position", "gripper_position"])
    np.testing.assert_array_equal(store.states, whole)


def test_a_left_over_folder_of_pictures_and_video_info_of_v20_are_no_hindrance(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set", video=True)
    left = folder / f"images/{VIEW}/episode_000000"
    left.mkdir(parents=True)
    (left / "frame_000000.png").write_bytes(b"left over")

    def older(info: dict[str, Any]) -> None:
        info["codebase_version"] = "v2.0"
        depth = {"dtype": "video", "shape": [64, 64, 3], "names": None}
        info["features"]["depth"] = depth | {"video_info": {"video.is_depth_map": True}}
        info["features"][VIEW]["video_info"] = {"video.fps": 10.0, "video.codec": "av1"}

    edit_info(folder, older)
    store = opened(folder)
    assert_right(store)
    assert store.spec.views == (VIEW,) and "depth is a depth map" in store.remarks[0]


def drop_a_row(folder: Path) -> None:
    path = data_files(folder)[1]
    pq.write_table(pq.read_table(path).slice(0, 3), path)


def swap_files(folder: Path) -> None:
    first, second, _ = data_files(folder)
    first.rename(spare := folder / "spare")
    second.rename(first)
    spare.rename(second)


def edit_line(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"meta/{name}.jsonl"
        lines = [json.loads(line) for line in path.open()]
        change(lines[1])
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


BAD_V2: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda f: data_files(f)[1].unlink(), "sources.exclude=[1]"),
    "a row is missing": (drop_a_row, "has 3 rows, but meta/episodes.jsonl says that episode 1 has 4"),
    "files are swapped": (swap_files, "has 4 rows, but meta/episodes.jsonl says that episode 0 has 5"),
    "another length": (edit_line("episodes", lambda e: e.update(length=9)), "total_frames = 15"),
    "an episode twice": (edit_line("episodes", lambda e: e.update(episode_index=0)), "which counts from 0"),
    "no length": (edit_line("episodes", lambda e: e.pop("length")), "line 2: length is null"),
    "other texts": (edit_line("episodes", lambda e: e.update(tasks=["lift it"])), "episode 1 have other"),
    "a text that is none": (edit_line("tasks", lambda t: t.update(task=7)), "tasks.jsonl, line 2: task is 7"),
    "a task twice": (edit_line("tasks", lambda t: t.update(task_index=2)), "which counts from 0"),
    "no JSON": (lambda f: (f / "meta/tasks.jsonl").write_text("{]\n"), "tasks.jsonl, line 1: not valid JSON"),
    "no UTF-8": (lambda f: (f / "meta/tasks.jsonl").write_bytes(b"\xff\n"), "line 1: too long, or not UTF-8"),
    "a surrogate": (edit_line("tasks", lambda t: t.update(task="\ud800")), "task is no text"),
    "more lines": (
        lambda f: (f / "meta/episodes.jsonl").write_text((f / "meta/episodes.jsonl").read_text() * 2),
        "line 4: more lines than meta/info.json says",
    ),
    "a path outside": (
        lambda f: edit_info(f, lambda i: i.update(data_path="../{episode_index}.parquet")),
        "data_path is",
    ),
    "no chunks": (lambda f: edit_info(f, lambda i: i.update(chunks_size=0)), "chunks_size is wrong"),
}


@pytest.mark.parametrize("name", BAD_V2)
def test_a_v21_set_that_contradicts_itself_is_named(
    sound: dict[tuple[str, bool], Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(sound["v2", False], tmp_path / "set")
    change, expected = BAD_V2[name]
    change(folder)
    message = refused(folder)
    assert expected in message and len(message.splitlines()) < 10
    if "exclude" in message and name != "files are swapped":  # where the other one is wrong too
        assert_right(opened(folder, exclude=[int(message.split("exclude=[")[1][0])]))


def test_a_missing_video_names_its_episode(sound: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sound["v2", True], tmp_path / "set")
    (folder / VIDEO_OF_1["v2"]).unlink()
    assert "sources.exclude=[1]" in refused(folder)
    assert_right(opened(folder, exclude=[1]))


def test_what_is_left_out_is_not_read(sound: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sound["v2", False], tmp_path / "set")
    data_files(folder)[1].write_bytes(b"not Parquet")
    assert "episode_000001.parquet" in refused(folder)
    store = opened(folder, exclude=[1])
    assert_right(store)
    assert [(one.index, one.start, one.length) for one in store.episodes] == [(0, 0, 5), (2, 5, 6)]


def damaged(folder: Path, number: int) -> Path:
    """One of many kinds of damage to one of the files, by its number."""
    random = np.random.default_rng(number)
    files = [*sorted((folder / "meta").iterdir()), *data_files(folder)]
    path = files[number % len(files)]
    content = bytearray(path.read_bytes())
    match number // len(files) % 5:
        case 0:
            content = content[: random.integers(len(content))]
        case 1:
            for place in random.integers(len(content), size=8):
                content[place] ^= int(random.integers(1, 256))
        case 2:
            begin, end = sorted(random.integers(len(content), size=2))
            content = content[:begin] + content[end:]
        case 3:
            content = bytearray(random.integers(0, 256, len(content), dtype=np.uint8).tobytes())
        case _:
            begin = int(random.integers(len(content)))
            content[begin:begin] = random.choice([b"\n", b"null", b"[", b"9" * 400, b"\0", b'"'])
    path.write_bytes(bytes(content))
    return path


def test_damaged_files_give_one_message_or_nothing_at_all(
    sound: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """A flipped bit in a text is another text, and no damage that can be seen."""
    folder, refusals = tmp_path / "set", 0
    shutil.copytree(sound["v2", False], folder)
    for number in range(110):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        path = damaged(folder, number)
        try:
            store = opened(folder)
            store.frames(VIEW, np.arange(store.spec.num_frames))
            assert store.spec.num_frames == sum(LENGTHS) and store.spec.fps > 0
        except UserError as error:
            refusals += 1
            assert len(str(error)) < 4000
        path.write_bytes(before[path])
    assert refusals > 70
    assert_right(opened(folder))


def test_many_episodes_are_read_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each episode has a file: none stays open, and of those with pictures a few."""
    folder = write_v21(tmp_path / "set", lengths=(2,) * 70)
    edit_info(folder, lambda info: info.update(total_tasks=3))
    open_files: list[int] = []
    whole = SourceConfig.open

    def counted(self: SourceConfig) -> EpisodeStore:
        store = whole(self)
        store.frames(VIEW, np.arange(140))
        open_files.append(
            sum(1 for fd in Path("/proc/self/fd").iterdir() if str(folder) in str(fd.resolve()))
        )
        return store

    monkeypatch.setattr(SourceConfig, "open", counted)
    opened(folder)
    assert open_files[0] <= 16


assert FPS == 10
