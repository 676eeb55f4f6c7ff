"""Ways out for a data set of which a part is bad: episodes left out, and times by a clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tutti.config import load_config
from tutti.data.episodes import EpisodeStore
from tutti.data.formats.lerobot.writer import EpisodeRecord, Storage, write_lerobot
from tutti.data.sources import SourceConfig, check_unchanged
from tutti.types import UserError

VIEW = "observation.images.front"
LENGTHS = (8, 6, 7, 9)
FPS = 10
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])
DATA, TABLE = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"


def grey(row: int) -> int:
    """The brightness of the picture of frame `row`: every frame carries its number."""
    return 20 + 7 * row


def write(folder: Path, storage: Storage = "image") -> Path:
    episodes = []
    for start, length in zip(STARTS.tolist(), LENGTHS, strict=False):
        rows = np.arange(start, start + length)
        pictures = np.array([grey(row) for row in rows], np.uint8)[:, None, None, None]
        episodes.append(
            EpisodeRecord(
                images={VIEW: np.broadcast_to(pictures, (length, 64, 64, 3)).copy()},
                states=np.stack([rows, rows + 0.5], axis=1).astype(np.float32),
                actions=rows[:, None].astype(np.float32),
                instruction=f"task {start}",
            )
        )
    return write_lerobot(folder, episodes, fps=FPS, views=(VIEW,), robot_type="arm", storage=storage)


def change(folder: Path, key: str, values: Callable[[np.ndarray], Any], name: str = DATA) -> None:
    """Puts other values into a column of a table."""
    table = pq.read_table(folder / name)
    place = table.column_names.index(key)
    found = values(np.array(table[key].to_pylist()))
    array = pa.array(found.tolist(), type=table[key].type)
    pq.write_table(table.set_column(place, key, array), folder / name)


def opened(folder: Path, **keys: Any) -> EpisodeStore:
    return SourceConfig.model_validate({"path": folder, **keys}).open()


def rows_of(*episodes: int) -> np.ndarray:
    return np.concatenate([np.arange(STARTS[e], STARTS[e + 1]) for e in episodes])


def check_rows(store: EpisodeStore, rows: np.ndarray) -> None:
    """The store has the numbers and pictures of these rows of the files, in this order."""
    np.testing.assert_array_equal(store.actions[:, 0], rows)
    assert store.spec.num_frames == len(rows) == sum(episode.length for episode in store.episodes)
    seen = store.frames(VIEW, np.arange(len(rows))).mean((1, 2, 3))
    assert np.abs(seen - [grey(row) for row in rows]).max() < 3
    for episode in store.episodes:
        assert store.actions[episode.start, 0] == STARTS[episode.index]
        assert episode.instruction == f"task {STARTS[episode.index]}"


def spoil_length(folder: Path) -> None:
    """Episode 1 keeps one frame; the other rows of it are dropped."""
    kept = np.setdiff1d(np.arange(STARTS[-1]), np.arange(STARTS[1] + 1, STARTS[2]))
    table = pq.read_table(folder / DATA).take(kept)
    index = table.column_names.index("index")
    pq.write_table(table.set_column(index, "index", pa.array(range(len(kept)))), folder / DATA)
    lengths = np.array([8, 1, 7, 9])
    ends = np.cumsum(lengths)
    change(folder, "dataset_from_index", lambda _: ends - lengths, TABLE)
    change(folder, "dataset_to_index", lambda _: ends, TABLE)
    change(folder, "length", lambda _: lengths, TABLE)
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_frames": 25}))


def spoil_numbers(folder: Path) -> None:
    def change_row(values: np.ndarray) -> np.ndarray:
        values[STARTS[1] + 2, 1] = np.nan
        return values

    change(folder, "observation.state", change_row)


def spoil_times(folder: Path) -> None:
    change(folder, "timestamp", lambda times: times + (np.arange(len(times)) // 3 == 3))


def spoil_picture(folder: Path) -> None:
    def change_row(cells: np.ndarray) -> np.ndarray:
        cells[STARTS[1] + 1]["bytes"] = b"no picture"
        return cells

    change(folder, VIEW, change_row)


def spoil_texts(folder: Path) -> None:
    change(folder, "tasks", lambda texts: np.where(np.arange(4)[:, None] == 1, "other", texts), TABLE)


def test_episodes_are_chosen_by_numbers_and_ranges(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    check_rows(opened(folder, episodes=["0-1", 3]), rows_of(0, 1, 3))
    check_rows(opened(folder, episodes=2), rows_of(2))
    check_rows(opened(folder, exclude=["1-2"]), rows_of(0, 3))
    check_rows(opened(folder, episodes="1-3", exclude=2), rows_of(1, 3))
    assert [episode.index for episode in opened(folder, exclude=[0]).episodes] == [1, 2, 3]


def test_episodes_of_a_video_are_chosen(tmp_path: Path) -> None:
    check_rows(opened(write(tmp_path / "set", "video"), exclude=[1]), rows_of(0, 2, 3))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"episodes": [4]}, r"sources\.episodes names episode 4.*\n.*0 to 3"),
        ({"exclude": ["2-9"]}, r"sources\.exclude names episode 9.*\n.*0 to 3"),
        ({"exclude": ["0-3"]}, "leave no episode"),
        ({"episodes": [1], "exclude": [1]}, "leave no episode"),
        ({"episodes": []}, "leave no episode"),
        ({"episodes": ["3-1"]}, "rising ranges.*found '3-1'"),
        ({"episodes": ["1-"]}, "rising ranges.*found '1-'"),
        ({"exclude": [-1]}, "rising ranges.*found -1"),
        ({"exclude": True}, "rising ranges.*found True"),
        ({"tolerance": 0}, "greater than 0"),
    ],
)
def test_numbers_that_are_no_episodes_are_refused(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        opened(write(tmp_path / "set"), **keys)


@pytest.mark.parametrize("spoil", [spoil_length, spoil_numbers, spoil_times, spoil_picture, spoil_texts])
def test_a_bad_episode_is_named_with_its_way_out_and_can_be_left_out(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = write(tmp_path / "set")
    spoil(folder)
    with pytest.raises(UserError, match=r"sources\.exclude=\[1\]$"):
        check_rows(opened(folder), rows_of(0, 1, 2, 3))
    store = opened(folder, exclude=[1])
    check_rows(store, rows_of(0, 2, 3))
    with pytest.raises(UserError):
        check_rows(opened(folder, exclude=[0]), rows_of(1, 2, 3))


def test_a_damaged_or_missing_video_of_an_episode_that_is_left_out_is_not_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "video")
    change(folder, f"videos/{VIEW}/file_index", lambda _: np.array([0, 1, 0, 0]), TABLE)
    with pytest.raises(UserError, match=r"is missing.*\n.*sources\.exclude=\[1\]"):
        opened(folder)
    check_rows(opened(folder, exclude=[1]), rows_of(0, 2, 3))
    (folder / f"videos/{VIEW}/chunk-000/file-001.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"sources\.exclude=\[1\]"):
        check_rows(opened(folder), rows_of(0, 1, 2, 3))
    check_rows(opened(folder, exclude=[1]), rows_of(0, 2, 3))


def test_what_contradicts_the_whole_set_is_refused_whatever_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    change(folder, "dataset_to_index", lambda ends: ends + (np.arange(4) == 1), TABLE)
    with pytest.raises(UserError, match="dataset_from_index of row 2"):
        opened(folder, exclude=[1])


def test_an_excluded_episode_does_not_count_and_excluding_one_later_is_another_training(
    tmp_path: Path,
) -> None:
    folder, other = write(tmp_path / "set"), write(tmp_path / "other")
    spoil_numbers(other)
    spoil_texts(other)
    before, spoilt = (opened(path, exclude=[1]) for path in (folder, other))
    assert before.fingerprint == spoilt.fingerprint != opened(folder).fingerprint
    kept = tmp_path / "data_content.json"
    kept.write_text(json.dumps({"sources": [opened(folder).content.to_dict()]}))
    with pytest.raises(UserError, match="it had 4 episodes and has 3"):
        check_unchanged([before], kept)
    with pytest.raises(UserError, match="other episodes of it are used"):
        kept.write_text(json.dumps({"sources": [opened(folder, exclude=[2]).content.to_dict()]}))
        check_unchanged([before], kept)


def test_a_change_is_told_by_the_number_that_an_episode_has_in_its_set(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "set"), write(tmp_path / "other")
    change(other, "action", lambda values: values + (np.arange(len(values)) >= STARTS[3]))
    before, after = (opened(path, exclude=[1]).content for path in (folder, other))
    assert after.differences(type(before).from_dict(before.to_dict())) == ["actions differ in episode 3"]


def jitter(folder: Path, most: float) -> None:
    """Times by a clock: up to `most` frames off, each episode from 0 on."""
    off = np.random.default_rng(0).uniform(-most, most, STARTS[-1])
    off[STARTS[:-1]], off[3] = 0.0, -most
    change(folder, "timestamp", lambda times: np.maximum(0, times + off / FPS))


@pytest.mark.parametrize("storage", ["image", "video"])
def test_times_by_a_clock_are_refused_with_their_cure_and_taken_with_it(
    tmp_path: Path, storage: Storage
) -> None:
    folder = write(tmp_path / "set", storage)
    jitter(folder, 0.8)
    with pytest.raises(UserError, match=r"tolerance=0\.8[12]: the largest deviation is 0\.80 frames"):
        opened(folder)
    check_rows(opened(folder, tolerance=0.85), rows_of(0, 1, 2, 3))
    check_rows(opened(folder, tolerance=0.85, exclude=[0, 2]), rows_of(1, 3))


def test_without_as_many_frames_as_rows_the_nearest_frame_is_taken(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "video")
    # Episode 0 claims a span in which one frame more lies than it has rows.
    change(folder, f"videos/{VIEW}/to_timestamp", lambda ends: ends + 0.1 * (np.arange(4) == 0), TABLE)
    jitter(folder, 0.45)
    check_rows(opened(folder, tolerance=1.01), rows_of(0, 1, 2, 3))
    # The frame that the last rows name is not in the video: none of another episode is taken for it.
    change(folder, f"videos/{VIEW}/from_timestamp", lambda starts: starts + 0.4 * (np.arange(4) == 3), TABLE)
    change(folder, f"videos/{VIEW}/to_timestamp", lambda ends: ends + 0.4 * (np.arange(4) == 3), TABLE)
    with pytest.raises(UserError, match=r"too few for episode 3 of.*\n.*\n.*exclude=\[3\]"):
        check_rows(opened(folder, tolerance=1.01), rows_of(0, 1, 2, 3))


def test_a_wide_tolerance_does_not_hide_a_wrong_rate(tmp_path: Path) -> None:
    folder = write_lerobot(
        tmp_path / "set",
        [
            EpisodeRecord(
                images={VIEW: np.zeros((60, 16, 16, 3), np.uint8)},
                states=np.zeros((60, 1), np.float32),
                actions=np.zeros((60, 1), np.float32),
                instruction="wait",
            )
        ],
        fps=FPS,
        views=(VIEW,),
        robot_type="arm",
    )
    change(folder, "timestamp", lambda times: times * 1.05)
    with pytest.raises(UserError, match=r"timestamp of row 6 is") as refused:
        opened(folder)
    assert "sources.tolerance" not in str(refused.value)
    with pytest.raises(UserError, match=r"the timestamps count 9\.524 frames a second; fps .* is 10"):
        opened(folder, tolerance=5)


def test_files_that_macos_lays_beside_others_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
        (path.parent / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    check_rows(opened(folder), rows_of(0, 1, 2, 3))


def test_the_keys_are_taken_from_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "data:\n  sources:\n  - {path: set, episodes: [0-1, 3], exclude: 1, tolerance: 0.5, state: none}\n"
    )
    (source,) = load_config(path).data.sources
    assert source.episodes == ("0-1", 3) and source.exclude == (1,) and source.state == "none"
