"""Conversion to LeRobot v3.0: what was there is there afterwards, whatever happened on the way."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from independent_reader import judge

from fixtures import squares_data
from fixtures.format_sets import write_robomimic
from fixtures.lerobot_sets import (
    LENGTHS,
    VIEW,
    edit_data,
    edit_info,
    png,
    set_tasks,
    with_column,
    write_v3,
    write_v21,
)
from tutti.data.episodes import EpisodeStore
from tutti.data.formats.lerobot.pieces import Storage
from tutti.data.sources import SourceConfig
from tutti.errors import UserError
from tutti.runs import data_convert
from tutti.runs.data_convert import convert, lenient, view_names

FIXTURES = Path(__file__).resolve().parents[1] / "data" / "formats" / "lerobot_v21"


def source(folder: Path, **keys: Any) -> SourceConfig:
    return lenient(SourceConfig.model_validate({"path": folder, **keys}))


def tree(folder: Path) -> dict[str, str]:
    """A hash of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same(before: EpisodeStore, after: EpisodeStore, levels: float) -> None:
    np.testing.assert_array_equal(before.states, after.states)
    np.testing.assert_array_equal(before.actions, after.actions)
    said = [[store.instructions[i] for i in store.instruction_of] for store in (before, after)]
    assert said[0] == said[1]
    assert [e.length for e in before.episodes] == [e.length for e in after.episodes]
    assert before.spec.dimensions() == after.spec.dimensions()
    assert (before.spec.fps, before.spec.embodiment) == (after.spec.fps, after.spec.embodiment)
    rows = np.arange(before.spec.num_frames)
    for view, name in zip(before.spec.views, after.spec.views, strict=True):
        pictures = [store.frames(one, rows).astype(int) for store, one in ((before, view), (after, name))]
        assert np.abs(pictures[0] - pictures[1]).mean(axis=(1, 2, 3)).max() <= levels


@pytest.mark.parametrize(("name", "storage"), [("v21_video", "video"), ("v21_image", "image")])
def test_lerobots_own_v21_sets_become_v30(name: str, storage: Storage, tmp_path: Path) -> None:
    assert convert(source(FIXTURES / name), tmp_path / "new", storage=storage, workers=0)
    before, after = (SourceConfig(path=path).open() for path in (FIXTURES / name, tmp_path / "new"))
    assert_same(before, after, 6.0 if storage == "video" else 0.0)
    info = json.loads((tmp_path / "new/meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["total_episodes"] == len(before.episodes)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    # A reader without any of Tutti's code says the same.
    content = judge(tmp_path / "new")
    np.testing.assert_array_equal(content.states, before.states)
    assert content.lengths == tuple(e.length for e in before.episodes)
    view = before.spec.views[0]
    seen = after.frames(view, np.arange(after.spec.num_frames))
    np.testing.assert_array_equal(content.pictures[view], seen)


def test_another_format_becomes_v30(tmp_path: Path) -> None:
    """HDF5 of robomimic: its keys are no names for LeRobot, and its roles are guessed."""
    path = write_robomimic(tmp_path / "set" / "squares.hdf5", squares_data.episodes(3))
    convert(source(path), tmp_path / "new", storage="image", workers=0)
    before, after = (SourceConfig(path=one).open() for one in (path, tmp_path / "new"))
    assert_same(before, after, 0.0)
    assert after.spec.views == tuple(view_names(before.spec.views).values())
    assert (after.spec.state_names, after.spec.action_names) == (
        before.spec.state_names,
        before.spec.action_names,
    )


def test_pictures_that_cannot_be_video_name_the_way_out(tmp_path: Path) -> None:
    """A size that is odd."""
    folder = write_v21(tmp_path / "set")
    odd = pa.array([{"bytes": png(np.zeros((63, 64, 3), np.uint8)), "path": None}] * 6)
    edit_data(folder, lambda t: t.set_column(t.column_names.index(VIEW), VIEW, odd.slice(0, len(t))))
    edit_info(folder, lambda info: info["features"][VIEW].update(shape=[63, 64, 3]))
    with pytest.raises(UserError, match="--pictures png"):
        convert(source(folder), tmp_path / "new", workers=0)
    assert convert(source(folder), tmp_path / "other", storage="image", workers=0)


def test_a_conversion_that_is_cut_off_anywhere_goes_on_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source(write_v21(tmp_path / "set", video=True))
    convert(given, tmp_path / "whole", workers=0)
    expected, target = tree(tmp_path / "whole"), tmp_path / "new"
    for owner, name, calls in (
        (data_convert, "save_piece", 0),
        (data_convert, "save_piece", 1),
        (data_convert.DatasetWriter, "join", 1),
        (data_convert.DatasetWriter, "finish", 0),
        (data_convert, "compare", 0),
        (data_convert, "commit_folder", 0),
        (data_convert.shutil, "rmtree", 2),
    ):
        whole, left = getattr(owner, name), [calls]

        def cut(*given: Any, _whole: Any = whole, _left: list[int] = left, **keys: Any) -> Any:
            if not _left[0]:
                raise KeyboardInterrupt
            _left[0] -= 1
            return _whole(*given, **keys)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, cut)
            for _ in range(5):
                convert(given, target, workers=0)
        assert not target.exists() or tree(target) == expected
    assert convert(given, target, workers=0)
    assert tree(target) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "set", "whole"]


def test_shards_end_in_the_same_files_and_the_last_one_joins(tmp_path: Path) -> None:
    given = source(write_v21(tmp_path / "set"))
    convert(given, tmp_path / "whole", storage="image", workers=0)
    for number in (3, 1):
        assert not convert(given, tmp_path / "new", storage="image", shard=(number, 3), workers=0)
        assert not (tmp_path / "new").exists()
    assert convert(given, tmp_path / "new", storage="image", shard=(2, 3), workers=0)
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_a_shard_that_another_one_has_joined_meanwhile_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, target = source(write_v21(tmp_path / "set")), tmp_path / "new"
    write = data_convert._write_pieces

    def overtaken(*arguments: Any) -> None:
        write(*arguments)
        monkeypatch.setattr(data_convert, "_write_pieces", write)
        assert convert(given, target, storage="image", shard=(2, 2), workers=0)

    monkeypatch.setattr(data_convert, "_write_pieces", overtaken)
    assert convert(given, target, storage="image", shard=(1, 2), workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "set"]


@pytest.mark.timeout(900)
def test_a_killed_command_goes_on_and_several_processes_write_what_one_does(tmp_path: Path) -> None:
    """kill -9 of the command after the first episode; two processes write the others."""
    folder = write_v21(tmp_path / "set", video=True, lengths=(40, 30, 35))
    command = [sys.executable, "-m", "tutti", "data", "convert", str(folder), str(tmp_path / "new")]
    process = subprocess.Popen([*command, "--workers", "1"])
    pieces = tmp_path / ".partial-new/pieces/000"
    while process.poll() is None and not (pieces / "000000").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert convert(source(folder), tmp_path / "new", workers=2)
    convert(source(folder), tmp_path / "whole", workers=0)
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_each_process_opens_no_more_than_the_episodes_that_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source(write_v21(tmp_path / "set", lengths=(3,) * 18), exclude=[4, 5])
    opened: list[int] = []

    def alternating(function: Any, count: int, next_job: Any) -> Any:
        """Two workers by turns, in this process."""
        jobs = [job for _ in range(20) for worker in range(count) if (job := next_job(worker))]
        for job in jobs:
            function(job)
            opened.append(len(data_convert._opened[0][1].episodes))
            yield 0, None

    convert(given, tmp_path / "whole", storage="image", workers=0)
    monkeypatch.setattr(data_convert, "run_jobs", alternating)
    convert(given, tmp_path / "new", storage="image", workers=2)
    assert opened == [2] * 16
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_what_is_there_is_kept_and_another_conversion_is_refused(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set")
    convert(source(folder), tmp_path / "new", storage="image", workers=0)
    before = tree(tmp_path / "new")
    assert convert(source(folder), tmp_path / "new", storage="image", workers=0)
    assert tree(tmp_path / "new") == before
    with pytest.raises(UserError, match=r"exists already[\s\S]*other pictures[\s\S]*cure"):
        convert(source(folder), tmp_path / "new", workers=0)
    with pytest.raises(UserError, match=r"exists already[\s\S]*other episodes, frames, content"):
        convert(source(folder, exclude=[1]), tmp_path / "new", storage="image", workers=0)
    path = write_robomimic(tmp_path / "squares.hdf5", squares_data.episodes(2))
    convert(source(path), tmp_path / "upright", storage="image", workers=0)
    with pytest.raises(UserError, match=r"exists already[\s\S]*other flip"):
        convert(source(path, flip="vertical"), tmp_path / "upright", storage="image", workers=0)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"exists already[\s\S]*another folder"):
        convert(source(folder), tmp_path / "mine", workers=0)


def test_blank_texts_missing_numbers_and_tasks_that_change_stay_as_they_are(tmp_path: Path) -> None:
    folder = write_v3(tmp_path / "set")
    set_tasks(folder, ["open it", "", "push it"])
    gone = np.isin(np.arange(sum(LENGTHS)), [0, 1, 7])[:, None]
    edit_data(folder, with_column("action", lambda values: np.where(gone, np.nan, values)))
    convert(source(folder), tmp_path / "new", storage="image", workers=0)
    before, after = (source(path).open() for path in (folder, tmp_path / "new"))
    np.testing.assert_array_equal(before.actions, after.actions)
    assert np.isnan(after.actions).all(axis=1).tolist() == gone[:, 0].tolist()
    assert [one.instruction for one in after.episodes] == ["open it", "", "push it"]
    stats = json.loads((tmp_path / "new/meta/stats.json").read_text())
    assert np.isfinite(stats["action"]["mean"]).all() and stats["action"]["count"] == [12]


def test_videos_without_actions_become_a_set_without_the_feature(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set")
    edit_info(folder, lambda info: info["features"].pop("action"))
    convert(source(folder), tmp_path / "new", storage="image", workers=0)
    info = json.loads((tmp_path / "new/meta/info.json").read_text())
    assert "action" not in info["features"] and "observation.state" in info["features"]
    assert source(tmp_path / "new").open().actions.shape == (15, 0)


def test_parts_that_a_source_chooses_are_converted_alone(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set")
    convert(source(folder, exclude=[0], state="none"), tmp_path / "new", storage="image", workers=0)
    after = source(tmp_path / "new", state="none").open()
    assert [e.length for e in after.episodes] == list(LENGTHS[1:]) and after.states.shape == (10, 0)


def test_views_are_called_as_lerobot_wants_it() -> None:
    assert view_names(
        (
            "observation.images.a",
            "image",
            "steps/observation/rgb",
            "obs.agentview_rgb",
            "observations/images/top",
        )
    ) == {
        "observation.images.a": "observation.images.a",
        "image": VIEW.rsplit(".", 1)[0] + ".image",
        "steps/observation/rgb": "observation.images.rgb",
        "obs.agentview_rgb": "observation.images.agentview_rgb",
        "observations/images/top": "observation.images.top",
    }
    with pytest.raises(UserError, match="called the same"):
        view_names(("a/b", "a.b"))


def test_a_picture_that_is_not_the_sources_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame before, in place of each but the first of an episode."""
    given = source(write_v21(tmp_path / "set", video=True))
    whole = data_convert.StoredPictures.__getitem__

    def late(self: Any, frames: slice) -> np.ndarray:
        return np.concatenate([whole(self, slice(0, 1)), whole(self, slice(0, len(self) - 1))])

    monkeypatch.setattr(data_convert.StoredPictures, "__getitem__", late)
    with pytest.raises(UserError, match=r"pictures of observation\.images\.front \(frame \d\) of episode 0"):
        convert(given, tmp_path / "new", workers=0)
    assert not (tmp_path / "new").exists()


def test_a_number_that_is_not_the_sources_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source(write_v21(tmp_path / "set"))
    store = given.open()
    convert(given, tmp_path / "new", storage="image", workers=0)
    store.states = store.states.copy()
    store.states[6, 1] += 1e-6
    with pytest.raises(UserError, match="states of episode 1"):
        data_convert.compare(store, tmp_path / "new", view_names(store.spec.views), exact=True)
