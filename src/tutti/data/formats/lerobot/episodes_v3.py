"""Reads and checks the tables of a LeRobotDataset v3.0: tasks, episodes, where rows and frames lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from tutti.data.formats.chosen import Chosen, Selection, excluding
from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.data.formats.lerobot.metadata import Info, LeRobotMeta, VideoTable, fill_pattern, require_file
from tutti.data.formats.lerobot.modality import Modality
from tutti.data.formats.lerobot.tables import (
    NO_TEXTS,
    check_column,
    instructions,
    integers,
    numbers,
    read_parquet,
)


def read_v3(folder: Path, info: Info, modality: Modality, chosen: Sequence[Chosen]) -> LeRobotMeta:
    """What `folder/meta` says; every fault is a UserError that names file, key and cure."""
    needs_text = all(one.labels["text"] is True for one in chosen)
    tasks = _read_tasks(folder / "meta" / "tasks.parquet", info, needs_text)
    views = [key for key, one in info.features.items() if one.dtype == "video" and not one.no_colours]
    where = folder / "meta" / "episodes"
    table, texts = _read_episodes(where, views)
    used = Selection.of(chosen, len(table["episode_index"]), folder)
    kept, parts, tolerance = used.kept, used.parts, max(one.tolerance for one in chosen)
    starts, lengths = _check_episodes(table, where, info, kept)
    if "data/chunk_index" in table and "data/file_index" in table:
        _named_files(folder, "data_path", info.data_path, table, "data", kept=kept)
    data_files = _parquet_files(folder / "data", "the rows of the episodes")
    meta = LeRobotMeta(
        folder=folder,
        info=info,
        tasks=tasks,
        starts=starts,
        lengths=lengths,
        texts=texts,
        data_files=data_files,
        videos={},
        tolerance=tolerance,
        modality=modality,
        kept=kept,
        parts=parts,
    )
    meta.videos.update((view, _video_table(meta, table, view)) for view in views)
    return meta


def _parquet_files(folder: Path, expected: str) -> tuple[Path, ...]:
    """In path order. Hidden files are none of the set: macOS lays "._file-000.parquet" beside a file."""
    paths = sorted(path for path in folder.glob("*/*.parquet") if not path.name.startswith("."))
    if not paths:
        raise data_error(f"{folder} holds no Parquet file.", expected=expected)
    return tuple(paths)


def _read_tasks(path: Path, info: Info, needs_text: bool) -> tuple[str, ...]:
    if not (needs_text or path.exists()):
        return NO_TEXTS
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
    return instructions(table[table.column_names[1]], table.column_names[1], path, blank=not needs_text)


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
    same = cache(frozenset[str])  # most episodes have one of few instructions
    rows = (row or () for part in parts for row in part["tasks"].to_pylist())
    return columns, tuple(same(tuple(filter(None, row))) for row in rows)


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
    cure = f"leave short episodes out: {excluding(short)}"
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
        found[chunk, file] = path = folder / fill_pattern(folder / "meta" / "info.json", key, pattern, values)
        if (chunk, file) in needed:
            places = enumerate(zip(*pairs, strict=True))
            require_file(path, "meta/episodes", (place for place, pair in places if pair == (chunk, file)))
    return tuple(found[pair] for pair in zip(*pairs, strict=True))
