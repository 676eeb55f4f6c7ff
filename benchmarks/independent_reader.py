"""An independent reader of LeRobot v3.0 sets, with pyarrow, Pillow and PyAV, without any of Tutti's code.

`judge(folder)` says what must become of a data set: either it says one thing (its content), or it contradicts
itself or is hostile, and why.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STATE, ACTION = "observation.state", "action"
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
MAX_EDGE, MAX_DIM, MAX_TEXT = 8192, 4096, 4096
"""Largest picture edge (pixels), vector length and instruction (characters) that a data set may have."""


class Refuse(Exception):
    """The set contradicts itself, is damaged or is hostile: it must be refused."""


@dataclass(frozen=True)
class Content:
    """What a sound set says: numbers row by row, the text of each row, each picture's bytes."""

    fps: float
    lengths: tuple[int, ...]
    states: np.ndarray
    actions: np.ndarray
    texts: tuple[str, ...]
    pictures: dict[str, np.ndarray]

    def equals(self, other: Content) -> bool:
        """Bit for bit."""
        return (
            (self.fps, self.lengths, self.texts) == (other.fps, other.lengths, other.texts)
            and np.array_equal(self.states, other.states)
            and np.array_equal(self.actions, other.actions)
            and self.pictures.keys() == other.pictures.keys()
            and all(np.array_equal(self.pictures[view], other.pictures[view]) for view in self.pictures)
        )


def judge(folder: Path) -> Content:
    """What the set says.

    Raises Refuse with the reason where it contradicts itself, is damaged or is hostile.
    """
    info = _info(folder)
    fps, features = info["fps"], info["features"]
    tasks = _tasks(folder, info)
    episodes = _table(folder / EPISODES)
    lengths = _episodes(episodes, info)
    table = _table(folder / info["data_path"].format(chunk_index=0, file_index=0))
    rows = sum(lengths)
    _need(table.num_rows == rows, "rows of data against total_frames")
    episode_of = np.repeat(np.arange(len(lengths)), lengths)
    frame_of = np.concatenate([np.arange(n) for n in lengths])
    wanted = {"episode_index": episode_of, "frame_index": frame_of, "index": np.arange(rows)}
    for name, values in wanted.items():
        if name in table.column_names or name == "episode_index":
            _need(np.array_equal(_numbers(table, name, integer=True), values), name)
    if "timestamp" in table.column_names:
        times = _numbers(table, "timestamp")
        _need(
            bool((np.abs(times - frame_of / fps) < 0.25 / fps).all()), "timestamp against frame_index / fps"
        )
    task_of = _numbers(table, "task_index", integer=True)
    _need(bool(((task_of >= 0) & (task_of < len(tasks))).all()), "task_index")
    texts = tuple(tasks[int(task)] for task in task_of)
    if "tasks" in episodes.column_names:
        for number, said in enumerate(episodes["tasks"].to_pylist()):
            used = {text for text, of in zip(texts, episode_of, strict=True) if of == number}
            _need(isinstance(said, list) and set(said) == used, "texts of an episode")
    vectors = {}
    for key in (STATE, ACTION):
        vectors[key] = _vectors(table, key, features[key]["shape"])
    views = [key for key, value in features.items() if value["dtype"] in ("image", "video")]
    pictures = {
        key: _png_view(info, table, key)
        if features[key]["dtype"] == "image"
        else _video_view(folder, info, episodes, key, lengths)
        for key in views
    }
    return Content(float(fps), tuple(lengths), vectors[STATE], vectors[ACTION], texts, pictures)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise Refuse(what)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _need(len({key for key, _ in pairs}) == len(pairs), "a key twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise Refuse(f"{name} in JSON")


def _info(folder: Path) -> dict[str, Any]:
    text = (folder / "meta" / "info.json").read_bytes()
    _need(len(text) < 2**20, "size of info.json")
    try:
        info = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refuse(str(error)[:100]) from None
    _need(isinstance(info, dict), "info.json is no object")
    _need(str(info.get("codebase_version")).removeprefix("v").startswith("3."), "codebase_version")
    fps = info.get("fps")
    _need(type(fps) in (int, float) and 0.01 <= fps <= 10_000, "fps")
    robot = info.get("robot_type")
    _need(robot is None or (isinstance(robot, str) and len(robot) <= 200), "robot_type")
    for key in ("total_episodes", "total_frames", "total_tasks"):
        _need(type(info.get(key)) is int and 0 < info[key] < 10**7, key)
    features = info.get("features")
    _need(isinstance(features, dict), "features")
    for key, feature in features.items():
        _need(isinstance(feature, dict) and isinstance(feature.get("dtype"), str), f"feature {key!r:.50}")
        shape: Any = feature.get("shape")
        _need(isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape), "shape")
        if feature["dtype"] in ("image", "video"):
            _need(key.startswith("observation.") and "/" not in key and ".." not in key, f"view {key!r:.50}")
            _need(len(shape) == 3 and shape[2] == 3 and max(shape) <= MAX_EDGE, "shape of a picture")
    for key in (STATE, ACTION):
        _need(key in features and len(features[key]["shape"]) == 1, key)
        _need(features[key]["shape"][0] <= MAX_DIM, f"length of {key}")
    known = {"data_path": DATA, "video_path": "videos/{video_key}/chunk-000/file-000.mp4"}
    for key, path in known.items():
        pattern = info.get(key)
        if key == "video_path" and pattern is None:
            continue
        _need(isinstance(pattern, str) and len(pattern) < 500, key)
        try:
            named = pattern.format(video_key="{video_key}", chunk_index=0, file_index=0)
        except (LookupError, ValueError, AttributeError, TypeError, MemoryError, OverflowError):
            raise Refuse(key) from None
        _need(named == path, key)
    return info


def _table(path: Path) -> pa.Table:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        meta = file.metadata
        size = sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))
        _need(size < 64 * 2**20 and meta.num_rows < 10**6, f"size of {path.name}")
        names = file.schema_arrow.names
        _need(len(set(names)) == len(names), "a column twice")
        # Statistics are for people: a set with a damaged one still says the same.
        used = [name for name in names if not name.startswith(("stats/", "meta/"))]
        return file.read(columns=used, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise Refuse(f"{path.name}: {str(error)[:80]}") from None


def _numbers(table: pa.Table, name: str, integer: bool = False) -> np.ndarray:
    _need(name in table.column_names, f"column {name}")
    column = table[name]
    right = pa.types.is_integer(column.type) if integer else pa.types.is_floating(column.type)
    _need(right and column.null_count == 0, f"type of {name}")
    values = column.to_numpy().astype(np.int64 if integer else np.float64)
    _need(bool(np.isfinite(values).all()), f"{name} is finite")
    return values


def _tasks(folder: Path, info: dict[str, Any]) -> list[str]:
    table = _table(folder / "meta" / "tasks.parquet")
    _need(len(table) == info["total_tasks"], "total_tasks")
    _need(np.array_equal(_numbers(table, "task_index", integer=True), np.arange(len(table))), "task_index")
    _need("task" in table.column_names, "task")
    column = table["task"]
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    _need(text and column.null_count == 0, "type of task")
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        raise Refuse("a text that is no UTF-8") from None
    _need(all(one.strip() and len(one) <= MAX_TEXT for one in texts), "a text is empty or too long")
    return texts


def _episodes(table: pa.Table, info: dict[str, Any]) -> list[int]:
    _need(len(table) == info["total_episodes"], "total_episodes")
    _need(
        np.array_equal(_numbers(table, "episode_index", integer=True), np.arange(len(table))), "episode_index"
    )
    first, last = (_numbers(table, f"dataset_{end}_index", integer=True) for end in ("from", "to"))
    _need(first[0] == 0 and np.array_equal(first[1:], last[:-1]), "dataset_from_index")
    lengths = last - first
    _need(bool((lengths >= 2).all()) and int(last[-1]) == info["total_frames"], "lengths")
    if "length" in table.column_names:
        _need(np.array_equal(_numbers(table, "length", integer=True), lengths), "length")
    for name in ("data/chunk_index", "data/file_index"):
        if name in table.column_names:
            _need(not _numbers(table, name, integer=True).any(), name)
    return lengths.tolist()


def _vectors(table: pa.Table, key: str, shape: list[int]) -> np.ndarray:
    _need(key in table.column_names and table[key].null_count == 0, key)
    kind = table[key].type
    lists = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    _need(lists and pa.types.is_floating(kind.value_type), f"type of {key}")
    rows = table[key].to_pylist()
    _need(all(len(row) == shape[0] and None not in row for row in rows), f"length of {key}")
    with np.errstate(over="ignore"):
        values = np.asarray(rows, dtype=np.float64).astype(np.float32)
    _need(bool(np.isfinite(values).all()), f"{key} is finite")
    return values


def _png_view(info: dict[str, Any], table: pa.Table, key: str) -> np.ndarray:
    shape = tuple(info["features"][key]["shape"])
    _need(key in table.column_names and pa.types.is_struct(table[key].type), f"column {key}")
    out = []
    for cell in table[key].to_pylist():
        _need(isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes), f"bytes of {key}")
        try:
            with Image.open(io.BytesIO(cell["bytes"]), formats=("PNG", "JPEG", "WEBP")) as picture:
                _need((picture.height, picture.width) == shape[:2], "size of a picture")
                deep = picture.format == "PNG" and cell["bytes"][24] != 8
                _need(picture.mode == "RGB" and not deep, f"mode {picture.mode}, 16 bits: {deep}")
                out.append(np.asarray(picture))
        except Refuse:
            raise
        except Exception as error:
            raise Refuse(f"picture: {str(error)[:60]}") from None
    return np.stack(out)


def _video_view(
    folder: Path, info: dict[str, Any], episodes: pa.Table, key: str, lengths: list[int]
) -> np.ndarray:
    fps, shape = info["fps"], tuple(info["features"][key]["shape"])
    for name in ("chunk_index", "file_index"):
        _need(not _numbers(episodes, f"videos/{key}/{name}", integer=True).any(), name)
    start = _numbers(episodes, f"videos/{key}/from_timestamp")
    spans = np.asarray(lengths) / fps
    if f"videos/{key}/to_timestamp" in episodes.column_names:
        end = _numbers(episodes, f"videos/{key}/to_timestamp")
        _need(bool((np.abs(end - start - spans) < 0.5 / fps).all()), "to_timestamp against the length")
    order = np.argsort(start)
    gaps = start[order][1:] - (start + spans)[order][:-1]
    _need(bool((start >= 0).all()) and bool((gaps > -0.5 / fps).all()), "spans of a video overlap")
    path = folder / "videos" / key / "chunk-000" / "file-000.mp4"
    _need(path.is_file(), "video is missing")
    try:
        with av.open(str(path), format="mp4") as container:
            frames = [
                (float(frame.time or 0), frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)
            ]
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise Refuse(f"video: {str(error)[:60]}") from None
    times = np.array([time for time, _ in frames])
    out = []
    for number, length in enumerate(lengths):
        for frame in range(length):
            near = np.abs(times - start[number] - frame / fps)
            _need(len(near) > 0 and near.min() < 0.25 / fps, "no frame at that time")
            picture = frames[int(near.argmin())][1]
            _need(picture.shape == shape, "size of the video")
            out.append(picture)
    return np.stack(out)
