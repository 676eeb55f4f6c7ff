"""Reads and checks the meta folder of a LeRobotDataset v3.0: info.json, tasks and episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutti.errors import UserError
from tutti.storage.reading import read_json, shown

COPY_AGAIN = "copy or record the data set again."


def data_error(
    problem: str, *, expected: object = "", found: object = "", cure: str = COPY_AGAIN
) -> UserError:
    """The message for a data set that is wrong; `expected` and `found` where `problem` does not say them."""
    lines = {"expected": expected, "found": found, "cure": cure}
    texts = [f"\n  {name + ':':9} {text}" for name, text in lines.items() if text]
    return UserError(problem + "".join(texts))


def check_column(
    where: Path, key: str, found: np.ndarray, expected: np.ndarray, why: str = "", *, cure: str = COPY_AGAIN
) -> None:
    """Raises: UserError naming the first row in which a column is not what it must be."""
    wrong = found != expected
    if wrong.any():
        row = int(np.argmax(wrong))
        text = f"{where}: {key} of row {row} is {found[row]}; expected {expected[row]}{why}."
        raise data_error(text, cure=cure)


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turns what Arrow raises for a damaged Parquet file, and a column it lacks, into a UserError."""
    if not path.is_file():
        raise data_error(f"{path} is missing.", expected="a Parquet file of the data set")
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        problem = f"{path} cannot be read as Parquet: it is truncated or damaged."
        raise data_error(problem, expected="a complete file", found=str(error).splitlines()[0]) from error


def read_parquet(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Columns of a Parquet file, of the `optional` ones those that are there.

    Raises: UserError if the file is missing or damaged, or lacks a needed column.
    """
    with explain_damage(path):
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        for column in needed:
            if column not in names:
                raise data_error(f"{path}: the column {column!r} is missing.", expected=needed, found=names)
        chosen = [*needed, *(name for name in optional if name in names)]
        return file.read(columns=chosen, use_threads=False)


class Feature(BaseModel):
    """One feature of info.json. `names` are those of the dimensions."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[int]
    names: Any = None


class Info(BaseModel):
    """What is read of info.json."""

    model_config = ConfigDict(strict=True)

    fps: float = Field(gt=0, allow_inf_nan=False)
    robot_type: str | None = None
    total_episodes: int
    total_frames: int
    total_tasks: int
    data_path: str | None = None
    video_path: str | None = None
    features: dict[str, Feature]

    def check_total(self, key: str, found: int, where: Path) -> None:
        """Raises: UserError if what was counted in the tables is not the `total_` of this key."""
        if found != (total := getattr(self, f"total_{key}")):
            raise data_error(
                f"{where} has {found} {key} in all, but meta/info.json says total_{key} = {total}."
            )


@dataclass(frozen=True, slots=True)
class VideoTable:
    """Where each episode's video lies: its file, and the second in that file at which it starts."""

    paths: tuple[Path, ...]
    from_timestamp: Float64[np.ndarray, " e"]


@dataclass(frozen=True, slots=True)
class LeRobotMeta:
    """The checked content of `meta/`. `starts` and `lengths` of the episodes are in frame rows."""

    folder: Path
    info: Info
    tasks: tuple[str, ...]
    starts: Int64[np.ndarray, " e"]
    lengths: Int64[np.ndarray, " e"]
    data_files: tuple[Path, ...]
    videos: dict[str, VideoTable]

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
    tasks = _read_tasks(folder / "meta" / "tasks.parquet", info)
    views = [key for key, feature in info.features.items() if feature.dtype == "video"]
    table = _read_episodes(folder / "meta" / "episodes", views)
    starts, lengths = _check_episodes(table, folder / "meta" / "episodes", info)
    if "data/chunk_index" in table and "data/file_index" in table:
        _named_files(folder, "data_path", info.data_path, table, "data")
    data_files = tuple(sorted((folder / "data").glob("*/*.parquet")))
    if not data_files:
        raise data_error(f"{folder / 'data'} holds no Parquet file.")
    videos = {
        view: VideoTable(
            _named_files(folder, "video_path", info.video_path, table, f"videos/{view}", video_key=view),
            table[f"videos/{view}/from_timestamp"].astype(np.float64),
        )
        for view in views
    }
    return LeRobotMeta(folder, info, tasks, starts, lengths, data_files, videos)


def _read_info(folder: Path) -> Info:
    path = folder / "meta" / "info.json"
    if not path.is_file():
        cure = "give the folder that contains meta/ and data/ (sources.path), or record one first."
        raise data_error(f"{folder} is no LeRobot data set: meta/info.json is missing.", cure=cure)
    values = read_json(path, cure=f"Cure: {COPY_AGAIN}")
    version = str(values.get("codebase_version"))
    if not version.removeprefix("v").startswith("3."):
        cure = "convert an older data set with LeRobot's script convert_dataset_v21_to_v30."
        problem = f"{path}: codebase_version is {version!r:.40}; expected 'v3.x'."
        raise data_error(problem, cure=cure)
    try:
        return Info.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{path}: {shown('.'.join(map(str, first['loc'])), quoted=False)} is wrong."
        raise data_error(problem, expected=first["msg"], found=shown(first["input"])) from None


def _read_tasks(path: Path, info: Info) -> tuple[str, ...]:
    # pandas calls an index without a name __index_level_0__.
    table = read_parquet(path, ["task_index"], ["task", "__index_level_0__"])
    if len(table.column_names) < 2:
        raise data_error(f"{path}: expected the columns task_index and task, found {table.column_names}.")
    why = ": readers that take the row and readers that take the index would disagree on instructions"
    cure = "sort the table by task_index; then check some episodes' instructions by eye."
    check_column(path, "task_index", table["task_index"].to_numpy(), np.arange(len(table)), why, cure=cure)
    info.check_total("tasks", len(table), path)
    return tuple(str(task) for task in table[table.column_names[1]].to_pylist())


def _read_episodes(folder: Path, views: Sequence[str]) -> dict[str, np.ndarray]:
    """The needed columns of the episode table, all files joined in path order."""
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise data_error(f"{folder} holds no Parquet file; expected the episode table.")
    needed = ["episode_index", "dataset_from_index", "dataset_to_index"]
    for view in views:
        needed += [f"videos/{view}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    first = read_parquet(files[0], needed, ["length", "data/chunk_index", "data/file_index"])
    parts = [first, *(read_parquet(path, first.column_names) for path in files[1:])]
    return {name: np.concatenate([part[name].to_numpy() for part in parts]) for name in first.column_names}


def _check_episodes(
    table: dict[str, np.ndarray], folder: Path, info: Info
) -> tuple[Int64[np.ndarray, " e"], Int64[np.ndarray, " e"]]:
    count = len(table["episode_index"])
    info.check_total("episodes", count, folder)
    check_column(folder, "episode_index", table["episode_index"], np.arange(count))
    starts = table["dataset_from_index"].astype(np.int64)
    ends = table["dataset_to_index"].astype(np.int64)
    before = np.concatenate([[0], ends[:-1]])
    check_column(folder, "dataset_from_index", starts, before, ", where the episode before ends")
    lengths = ends - starts
    cure = "remove this episode from the data set (LeRobot: lerobot-edit-dataset)."
    check_column(folder, "dataset_to_index", ends, starts + np.maximum(lengths, 2), " or more", cure=cure)
    if "length" in table:
        check_column(folder, "length", table["length"], lengths, ", by dataset_from_index and _to_index")
    info.check_total("frames", int(lengths.sum()), folder)
    return starts, lengths


def _named_files(
    folder: Path, key: str, pattern: str | None, table: dict[str, np.ndarray], columns: str, **names: str
) -> tuple[Path, ...]:
    """The file of each episode by a pattern of info.json; each must be there."""
    pairs = [table[f"{columns}/{name}_index"].tolist() for name in ("chunk", "file")]
    found: dict[tuple[int, int], Path] = {}
    for chunk, file in dict.fromkeys(zip(*pairs, strict=True)):
        values = {**names, "chunk_index": chunk, "file_index": file}
        try:
            found[chunk, file] = path = folder / str(pattern).format(**values)
        except (KeyError, IndexError, ValueError) as error:
            where = folder / "meta" / "info.json"
            problem = f"{where}: {key} is {pattern!r:.200}; expected a pattern of {tuple(values)}."
            raise data_error(problem) from error
        if not path.is_file():
            raise data_error(f"{path} is missing; meta/episodes names it.")
    return tuple(found[pair] for pair in zip(*pairs, strict=True))
