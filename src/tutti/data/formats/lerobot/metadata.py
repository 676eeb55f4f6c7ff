"""Reads and checks the meta folder of a LeRobotDataset v3.0: info.json, tasks and episodes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from tutti.errors import UserError
from tutti.storage.reading import read_json

COPY_AGAIN = "copy or record the data set again."


def data_error(
    problem: str, *, expected: object = "", found: object = "", cure: str = COPY_AGAIN
) -> UserError:
    """The message for a data set that is wrong; `expected` and `found` where `problem` does not say them."""
    lines = {"expected": expected, "found": found, "cure": cure}
    texts = [f"\n  {name + ':':9} {text}" for name, text in lines.items() if text]
    return UserError(problem + "".join(texts))


def first_true(wrong: np.ndarray) -> int:
    """The first row where `wrong` is true, -1 where it nowhere is."""
    return int(np.argmax(wrong)) if wrong.any() else -1


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet file, or some columns; UserError where it is missing, damaged or lacks a column."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    for column in columns or ():
        if column not in names:
            raise data_error(f"{path}: the column {column!r} is missing.", expected=columns, found=names)
    try:
        return file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """An open Parquet file; UserError where it is missing or damaged."""
    if not path.is_file():
        raise data_error(f"{path} is missing.", expected="a Parquet file of the data set")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    problem = f"{path} cannot be read as Parquet: it is truncated or damaged."
    return data_error(problem, expected="a complete file", found=reason)


@dataclass(frozen=True, slots=True)
class VideoTable:
    """Where each episode's video lies: its file, and the second in that file at which it starts."""

    paths: tuple[Path, ...]
    from_timestamp: Float64[np.ndarray, " e"]


@dataclass(frozen=True, slots=True)
class LeRobotMeta:
    """The checked content of `meta/`."""

    folder: Path
    fps: float
    embodiment: str
    features: dict[str, dict[str, Any]]
    tasks: tuple[str, ...]
    starts: Int64[np.ndarray, " e"]
    lengths: Int64[np.ndarray, " e"]
    data_files: tuple[Path, ...]
    videos: dict[str, VideoTable]

    @property
    def num_frames(self) -> int:
        """All frames of all episodes."""
        return int(self.lengths.sum())

    def fingerprint(self) -> str:
        """A hash of everything in meta/ and of the name and size of every data and video file."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / "meta").rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(self.folder).as_posix().encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        used = {*self.data_files, *(path for table in self.videos.values() for path in table.paths)}
        for path in sorted(used):
            digest.update(f"{path.relative_to(self.folder).as_posix()} {path.stat().st_size}\n".encode())
        return digest.hexdigest()


def read_meta(folder: Path) -> LeRobotMeta:
    """Reads and checks `folder/meta`; every fault is a UserError that names file, key and cure."""
    info = _read_info(folder)
    features: dict[str, dict[str, Any]] = info["features"]
    tasks = _read_tasks(folder / "meta" / "tasks.parquet", info)
    table, source = _read_episodes(folder, [k for k, f in features.items() if f["dtype"] == "video"])
    starts, lengths = _check_episodes(table, source, info)
    data_files = _data_files(folder, info, table)
    videos = {
        key: _video_table(folder, info, table, key)
        for key, feature in features.items()
        if feature["dtype"] == "video"
    }
    embodiment = str(info.get("robot_type") or "unknown")
    return LeRobotMeta(
        folder, float(info["fps"]), embodiment, features, tasks, starts, lengths, data_files, videos
    )


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / "meta" / "info.json"
    if not path.is_file():
        cure = "give the folder that contains meta/ and data/ (sources.path), or record one first."
        raise data_error(f"{folder} is no LeRobot data set: meta/info.json is missing.", cure=cure)
    info = read_json(path, cure=f"Cure: {COPY_AGAIN}")
    version = str(info.get("codebase_version"))
    if version.startswith(("v2", "v1", "2", "1")):
        cure = "convert the data set with LeRobot's script convert_dataset_v21_to_v30."
        raise data_error(f"{path}: codebase_version is {version!r}; expected 'v3.x'.", cure=cure)
    if not version.removeprefix("v").startswith("3."):
        raise UserError(f"{path}: codebase_version is {version!r}; expected 'v3.0' or another 'v3.x'.")
    kinds: dict[str, Any] = {"fps": (int, float), "features": dict}
    kinds |= {"total_episodes": int, "total_frames": int, "total_tasks": int}
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind) or (key == "fps" and not info[key] > 0):
            wanted = "a positive number" if key == "fps" else kind.__name__
            raise data_error(f"{path}: the key {key!r} is {info.get(key, 'missing')!r}; expected {wanted}.")
    for key, feature in info["features"].items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        if (
            not isinstance(shape, list)
            or not all(isinstance(n, int) for n in shape)
            or "dtype" not in feature
        ):
            raise UserError(
                f"{path}: features[{key!r}] is {feature!r}; expected an object with dtype and shape."
            )
    return info


def _read_tasks(path: Path, info: dict[str, Any]) -> tuple[str, ...]:
    table = read_parquet(path)
    # pandas calls an index without a name __index_level_0__.
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise data_error(f"{path}: expected the columns task_index and task, found {table.column_names}.")
    order = table["task_index"].to_pylist()
    if order != list(range(len(order))):
        raise data_error(
            f"{path}: row i must be task i, but task_index reads {order[:8]}.\n"
            "  Readers that take the row and readers that take the index would disagree on instructions.",
            cure="sort the table by task_index; then check some episodes' instructions by eye.",
        )
    if len(order) != info["total_tasks"]:
        total = info["total_tasks"]
        raise data_error(f"{path} has {len(order)} tasks, but meta/info.json says total_tasks = {total}.")
    return tuple(str(task) for task in table[text].to_pylist())


def _read_episodes(folder: Path, video_keys: list[str]) -> tuple[dict[str, np.ndarray], Path]:
    """The needed columns of the episode table, all files joined in path order, and its folder."""
    source = folder / "meta" / "episodes"
    files = sorted(source.glob("*/*.parquet"))
    if not files:
        raise data_error(f"{source} holds no Parquet file; expected the episode table.")
    needed = ["episode_index", "dataset_from_index", "dataset_to_index"]
    for key in video_keys:
        needed += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    optional = ["length", "data/chunk_index", "data/file_index"]
    present = set(open_parquet(files[0]).schema_arrow.names)
    columns = needed + [name for name in optional if name in present]
    parts = [read_parquet(path, columns) for path in files]
    return {name: np.concatenate([part[name].to_numpy() for part in parts]) for name in columns}, source


def _check_episodes(
    table: dict[str, np.ndarray], source: Path, info: dict[str, Any]
) -> tuple[Int64[np.ndarray, " e"], Int64[np.ndarray, " e"]]:
    index = table["episode_index"]
    count, total = len(index), info["total_episodes"]
    if count != total:
        raise data_error(f"{source} has {count} episodes, but meta/info.json says total_episodes = {total}.")
    if (row := first_true(index != np.arange(count))) >= 0:
        raise data_error(f"{source}: row {row} has episode_index {index[row]}; row i must be episode i.")
    starts = table["dataset_from_index"].astype(np.int64)
    ends = table["dataset_to_index"].astype(np.int64)
    expected = np.concatenate([[0], ends[:-1]])
    if (row := first_true(starts != expected)) >= 0:
        raise data_error(
            f"{source}: episode {row} has dataset_from_index {starts[row]}; expected {expected[row]}, where "
            "the one before ends."
        )
    lengths = ends - starts
    if (row := first_true(lengths < 2)) >= 0:
        cure = "remove this episode from the data set (LeRobot: lerobot-edit-dataset)."
        problem = f"{source}: episode {row} has {lengths[row]} frames; expected at least 2."
        raise data_error(problem, cure=cure)
    if "length" in table and (row := first_true(table["length"] != lengths)) >= 0:
        raise data_error(
            f"{source}: episode {row} has length {table['length'][row]}, but dataset_from_index and "
            f"dataset_to_index span {lengths[row]} frames."
        )
    if int(lengths.sum()) != info["total_frames"]:
        raise data_error(
            f"{source}: the episodes have {int(lengths.sum())} frames in all, but meta/info.json says "
            f"total_frames = {info['total_frames']}."
        )
    return starts, lengths


def _format(folder: Path, info: dict[str, Any], key: str, **values: Any) -> Path:
    pattern = info.get(key)
    try:
        return folder / str(pattern).format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{folder / 'meta' / 'info.json'}: {key} is {pattern!r}; expected a pattern of {tuple(values)}."
        ) from error


def _data_files(folder: Path, info: dict[str, Any], table: dict[str, np.ndarray]) -> tuple[Path, ...]:
    files = sorted((folder / "data").glob("*/*.parquet"))
    if "data/chunk_index" in table and "data/file_index" in table:
        pairs = zip(table["data/chunk_index"].tolist(), table["data/file_index"].tolist(), strict=True)
        for chunk, file in sorted(set(pairs)):
            path = _format(folder, info, "data_path", chunk_index=chunk, file_index=file)
            open_parquet(path)
    if not files:
        raise data_error(f"{folder / 'data'} holds no Parquet file.")
    return tuple(files)


def _video_table(folder: Path, info: dict[str, Any], table: dict[str, np.ndarray], key: str) -> VideoTable:
    paths = []
    chunks, files = (table[f"videos/{key}/{name}_index"].tolist() for name in ("chunk", "file"))
    for episode, (chunk, file) in enumerate(zip(chunks, files, strict=True)):
        path = _format(folder, info, "video_path", video_key=key, chunk_index=chunk, file_index=file)
        if not path.is_file():
            raise data_error(f"{path} is missing: the video of view {key!r} from episode {episode} on.")
        paths.append(path)
    return VideoTable(tuple(paths), table[f"videos/{key}/from_timestamp"].astype(np.float64))
