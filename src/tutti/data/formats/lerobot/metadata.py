"""Reads and checks the meta folder of a LeRobotDataset v3.0: info.json, tasks and episodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutti.data.content import spans
from tutti.data.episodes import ALL_USED, Use
from tutti.data.formats.lerobot.features import Feature
from tutti.data.formats.lerobot.tables import (
    COPY_AGAIN,
    check_column,
    data_error,
    episodes_without_text,
    instructions,
    integers,
    numbers,
    read_parquet,
)
from tutti.data.formats.lerobot.video import TOLERANCE
from tutti.errors import UserError
from tutti.storage.reading import read_json, shown
from tutti.types import Label

OTHER = "give the folder that contains meta/ and data/ (sources.path); other formats must be converted first."
MAX_FRAMES = 10**10
"""Largest number of frames that a data set may have."""
_SHOWN = 20


class Info(BaseModel):
    """What is read of info.json."""

    model_config = ConfigDict(strict=True)

    fps: float = Field(ge=0.01, le=10_000)
    robot_type: str | None = Field(None, max_length=200)
    total_episodes: int = Field(gt=0, le=MAX_FRAMES)
    total_frames: int = Field(gt=0, le=MAX_FRAMES)
    total_tasks: int = Field(gt=0, le=MAX_FRAMES)
    data_path: str | None = None
    video_path: str | None = None
    features: dict[Annotated[str, Field(max_length=200)], Feature]

    def check_total(self, key: str, found: int, where: Path) -> None:
        """Raises: UserError if what was counted in the tables is not the `total_` of this key."""
        if found != (total := getattr(self, f"total_{key}")):
            raise data_error(
                f"{where} has {found} {key} in all, but meta/info.json says total_{key} = {total}."
            )


@dataclass(frozen=True, slots=True)
class VideoTable:
    """Where each episode's video lies: its file, and the seconds in that file at which it starts and ends."""

    paths: tuple[Path, ...]
    from_timestamp: Float64[np.ndarray, " e"]
    to_timestamp: Float64[np.ndarray, " e"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What of the episodes is used: those of the ranges `episodes`, all where it is None, without those of
    `exclude`. `tolerance` is how far times may lie off frame number / fps, in frames. Of `labels` those that
    are True must be in every row.
    """

    episodes: tuple[range, ...] | None = None
    exclude: tuple[range, ...] = ()
    tolerance: float = TOLERANCE
    labels: Mapping[Label, Use] = field(default_factory=lambda: ALL_USED)

    def mask(self, count: int, where: Path) -> Bool[np.ndarray, " e"]:
        """Which of `count` episodes are used. Raises: UserError for a number that is none, or no episode."""
        kept = np.full(count, self.episodes is None)
        for key, ranges in (("episodes", self.episodes or ()), ("exclude", self.exclude)):
            for span in ranges:
                if span.stop > count:
                    problem = f"sources.{key} names episode {span.stop - 1}, which {where} does not have."
                    raise data_error(problem, expected=f"0 to {count - 1}", cure="correct the number.")
                kept[span.start : span.stop] = key == "episodes"
        if not kept.any():
            problem = f"sources.episodes and sources.exclude leave no episode of {where}."
            raise data_error(problem, expected=f"at least one of {count}", cure="leave fewer of them out.")
        return kept


ALL = Chosen()


@dataclass(frozen=True, slots=True)
class LeRobotMeta:
    """The checked content of `meta/`. `starts` and `lengths` of the episodes are in frame rows of the files;
    `texts` are the instructions of each, where the episode table names them. `parts` has the episodes of each
    choice and what it asks of their labels. Of episodes that are in none, not `kept`, nothing but their place
    is checked.
    """

    folder: Path
    info: Info
    tasks: tuple[str, ...]
    starts: Int64[np.ndarray, " e"]
    lengths: Int64[np.ndarray, " e"]
    texts: tuple[frozenset[str], ...] | None
    data_files: tuple[Path, ...]
    videos: dict[str, VideoTable]
    kept: Bool[np.ndarray, " e"]
    tolerance: float
    parts: tuple[tuple[Bool[np.ndarray, " e"], Mapping[Label, Use]], ...]

    def asked(self, label: Label, use: Use) -> Bool[np.ndarray, " e"]:
        """The episodes that a choice with this use of the label names."""
        masks = [mask for mask, labels in self.parts if labels[label] == use]
        return np.any([np.zeros_like(self.kept), *masks], axis=0)

    def or_leave_out(self, episodes: Iterable[int]) -> str:
        """The way out of what is wrong with these episodes alone; empty if no other would be left."""
        bad = sorted(set(episodes))
        few = bad and len(bad) < int(self.kept.sum())
        return f" Or leave the episode{'s' * (len(bad) > 1)} out: sources.exclude={_spans(bad)}" * bool(few)


def read_meta(folder: Path, chosen: Sequence[Chosen] = (ALL,)) -> LeRobotMeta:
    """Reads and checks `folder/meta`; every fault is a UserError that names file, key and cure."""
    info = read_info(folder)
    needs_text = all(one.labels["text"] is True for one in chosen)
    tasks = _read_tasks(folder / "meta" / "tasks.parquet", info, needs_text)
    views = [key for key, one in info.features.items() if one.dtype == "video" and not one.no_colours]
    where = folder / "meta" / "episodes"
    table, texts = _read_episodes(where, views)
    masks = [one.mask(len(table["episode_index"]), folder) for one in chosen]
    kept = np.any(masks, axis=0)
    starts, lengths = _check_episodes(table, where, info, kept)
    if "data/chunk_index" in table and "data/file_index" in table:
        _named_files(folder, "data_path", info.data_path, table, "data", kept=kept)
    data_files = _parquet_files(folder / "data", "the rows of the episodes")
    parts = tuple((mask, one.labels) for mask, one in zip(masks, chosen, strict=True))
    tolerance = max(one.tolerance for one in chosen)
    meta = LeRobotMeta(
        folder, info, tasks, starts, lengths, texts, data_files, {}, kept, tolerance, parts=parts
    )
    meta.videos.update((view, _video_table(meta, table, view)) for view in views)
    return meta


def _parquet_files(folder: Path, expected: str) -> tuple[Path, ...]:
    """In path order. Hidden files are none of the set: macOS lays "._file-000.parquet" beside a file."""
    paths = sorted(path for path in folder.glob("*/*.parquet") if not path.name.startswith("."))
    if not paths:
        raise data_error(f"{folder} holds no Parquet file.", expected=expected)
    return tuple(paths)


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as the config takes them: "[3, 7-9]"."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans(numbers)]
    return f"[{', '.join(texts[:_SHOWN])}{', ...' * (len(texts) > _SHOWN)}]"


def read_info(folder: Path) -> Info:
    """Reads and checks `folder/meta/info.json` alone."""
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise data_error(f"{folder} is no LeRobot v3 data set: {_what_it_is(folder)}.", cure=OTHER)
    values = read_json(path, finite=True, links=True, cure=f"Cure: {COPY_AGAIN}")
    version = str(values.get("codebase_version"))
    if not version.removeprefix("v").startswith("3."):
        cure = "LeRobot's convert_dataset_v21_to_v30 converts v2.1; v2.0 and v1 first need its older scripts."
        problem = f"{path}: a LeRobot data set of version {version!r:.40}; expected 'v3.x'."
        raise data_error(problem, cure=cure)
    try:
        return Info.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{path}: {shown('.'.join(map(str, first['loc'])), quoted=False)} is wrong."
        raise data_error(problem, expected=first["msg"], found=shown(first["input"])) from None


def _what_it_is(folder: Path) -> str:
    """What lies at `folder` in place of a LeRobot data set, from the names of its files alone."""
    if re.match(r"\w+:/", str(folder)):
        return "it is an address, and Tutti reads local folders alone"
    if not folder.exists():
        return "there is no such file or folder"
    if folder.is_dir():
        names = [path.name for path, _ in zip(sorted(folder.rglob("*")), range(1000), strict=False)]
    else:
        names = [folder.name]
    if any(name in ("dataset_info.json", "features.json") or ".tfrecord" in name for name in names):
        return "it is a TFDS data set (RLDS)"
    if any(name.endswith((".hdf5", ".h5")) for name in names):
        return "it holds HDF5 files, as robomimic, LIBERO and ALOHA write them"
    if any(name.endswith(".zarr") or name == ".zgroup" for name in names):
        return "it is a Zarr store"
    return "meta/info.json is missing"


def _read_tasks(path: Path, info: Info, needs_text: bool) -> tuple[str, ...]:
    # pandas calls an index without a name __index_level_0__.
    columns = ("task", "__index_level_0__")
    table = read_parquet(path, ["task_index"], columns, columns)
    if len(table.column_names) < 2:
        raise data_error(f"{path}: expected the columns task_index and task, found {table.column_names}.")
    why = ": readers that take the row and readers that take the index would disagree on instructions"
    cure = "sort the table by task_index; then check some episodes' instructions by eye."
    order = integers(table, "task_index", path)
    check_column(path, "task_index", order, np.arange(len(table)), why, cure=cure)
    info.check_total("tasks", len(table), path)
    try:
        return instructions(table, table.column_names[1], path, blank=not needs_text)
    except UserError as error:
        count = episodes_without_text(table[table.column_names[1]], path.parents[1] / "data")
        raise UserError(f"{error}{f'{chr(10)}  episodes: {count}' * bool(count)}") from None


def _read_episodes(
    folder: Path, views: Sequence[str]
) -> tuple[dict[str, np.ndarray], tuple[frozenset[str], ...] | None]:
    """The needed columns of the episode table, all files joined in path order, and each episode's texts."""
    files = _parquet_files(folder, "the episode table")
    needed = ["episode_index", "dataset_from_index", "dataset_to_index"]
    optional = ["length", "data/chunk_index", "data/file_index", "tasks"]
    for view in views:
        needed += [f"videos/{view}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        optional.append(f"videos/{view}/to_timestamp")
    first = read_parquet(files[0], needed, optional)
    parts = [first, *(read_parquet(path, first.column_names) for path in files[1:])]
    columns: dict[str, np.ndarray] = {}
    for name in first.column_names:
        if name != "tasks":
            read = numbers if name.endswith("timestamp") else integers
            read_parts = [read(part, name, path) for part, path in zip(parts, files, strict=True)]
            columns[name] = np.concatenate(read_parts)
    if "tasks" not in first.column_names:
        return columns, None
    kind = first["tasks"].type
    if not (pa.types.is_list(kind) and pa.types.is_string(kind.value_type)):
        raise data_error(f"{folder}: tasks is of another kind.", expected="a list of texts", found=kind)
    return columns, tuple(
        frozenset(filter(None, texts or ())) for part in parts for texts in part["tasks"].to_pylist()
    )


def _check_episodes(
    table: dict[str, np.ndarray], folder: Path, info: Info, kept: Bool[np.ndarray, " e"]
) -> tuple[Int64[np.ndarray, " e"], Int64[np.ndarray, " e"]]:
    count = len(table["episode_index"])
    info.check_total("episodes", count, folder)
    check_column(folder, "episode_index", table["episode_index"], np.arange(count))
    starts, ends = table["dataset_from_index"], table["dataset_to_index"]
    before = np.concatenate([[0], ends[:-1]])
    check_column(folder, "dataset_from_index", starts, before, ", where the episode before ends")
    lengths = ends - starts
    fewest = np.where(kept, 2, 0)
    short = np.flatnonzero(kept & (lengths < 2)).tolist()
    cure = f"leave short episodes out: sources.exclude={_spans(short)}"
    check_column(
        folder, "dataset_to_index", ends, starts + np.maximum(lengths, fewest), " or more", cure=cure
    )
    if "length" in table:
        check_column(folder, "length", table["length"], lengths, ", by dataset_from_index and _to_index")
    info.check_total("frames", int(lengths.sum()), folder)
    return starts, lengths


def _video_table(meta: LeRobotMeta, table: dict[str, np.ndarray], view: str) -> VideoTable:
    """Where the episodes lie in their videos; what from_timestamp says must fit lengths and to_timestamp."""
    name, info, kept = f"videos/{view}", meta.info, meta.kept
    paths = _named_files(meta.folder, "video_path", info.video_path, table, name, kept=kept, video_key=view)
    start, seconds = table[f"{name}/from_timestamp"], meta.lengths / info.fps
    ends = table.get(f"{name}/to_timestamp", start + seconds)
    half, off = 0.5 / info.fps, max(0.5, meta.tolerance) / info.fps
    chunk, file = table[f"{name}/chunk_index"], table[f"{name}/file_index"]
    order = np.lexsort((start, file, chunk))
    order = order[kept[order]]
    in_one_file = (np.diff(chunk[order]) == 0) & (np.diff(file[order]) == 0)
    overlaps = in_one_file & (start[order[1:]] < (start + seconds)[order[:-1]] - half)
    for wrong, problem in (
        (start < 0, "begins before the video"),
        (np.abs(ends - start - seconds) > off, "is as long as its frames by neither to_timestamp nor fps"),
        (np.isin(np.arange(len(start)), order[1:][overlaps]), "begins before the one in front of it ends"),
    ):
        if (wrong & kept).any():
            episode = int(np.argmax(wrong & kept))
            raise data_error(
                f"{meta.folder / 'meta' / 'episodes'}: episode {episode} {problem}: view {view!r}, "
                f"from_timestamp {start[episode]:g} s, to_timestamp {ends[episode]:g} s, "
                f"{meta.lengths[episode]} frames at {info.fps:g} a second.",
                cure=COPY_AGAIN + meta.or_leave_out(np.flatnonzero(wrong & kept).tolist()),
            )
    return VideoTable(paths, start, ends)


def _named_files(
    folder: Path,
    key: str,
    pattern: str | None,
    table: dict[str, np.ndarray],
    columns: str,
    *,
    kept: Bool[np.ndarray, " e"],
    **names: str,
) -> tuple[Path, ...]:
    """The file of each episode by a pattern of info.json; those of the `kept` episodes must be there."""
    pairs = [table[f"{columns}/{name}_index"].tolist() for name in ("chunk", "file")]
    needed = {pair for pair, used in zip(zip(*pairs, strict=True), kept.tolist(), strict=True) if used}
    found: dict[tuple[int, int], Path] = {}
    for chunk, file in dict.fromkeys(zip(*pairs, strict=True)):
        values = {**names, "chunk_index": chunk, "file_index": file}
        found[chunk, file] = path = folder / _fill(folder / "meta" / "info.json", key, pattern, values)
        if (chunk, file) in needed and not path.is_file():
            places = [place for place, pair in enumerate(zip(*pairs, strict=True)) if pair == (chunk, file)]
            cure = f"{COPY_AGAIN} Or leave its episodes out: sources.exclude={_spans(places)}"
            raise data_error(f"{path} is missing; meta/episodes names it.", cure=cure)
    return tuple(found[pair] for pair in zip(*pairs, strict=True))


def _fill(where: Path, key: str, pattern: str | None, values: dict[str, Any]) -> PurePosixPath:
    """The path that a pattern of info.json names: inside of the data set, and with plain fields alone, since
    Python's formats reach into objects and fill the memory."""
    text = ""
    try:
        for literal, field, form, conversion in Formatter().parse(pattern or ""):
            text += literal
            if field is not None:
                if field not in values or conversion or not re.fullmatch(r"(0?\d)?d?", form or ""):
                    raise ValueError(field)
                text += format(values[field], form or "")
    except ValueError:
        text = ""
    path = PurePosixPath(text)
    if not text or len(text) > 500 or path.is_absolute() or ".." in path.parts or "\0" in text:
        problem = f"{where}: {key} is {shown(pattern)}; expected a path in the data set with {tuple(values)}."
        raise data_error(problem)
    return path
