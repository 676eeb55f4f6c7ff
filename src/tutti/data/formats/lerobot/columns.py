"""The numeric columns of the data files of a LeRobotDataset, joined and checked against its meta folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int64

from tutti.data.formats.chosen import TOLERANCE
from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.data.formats.lerobot.metadata import LeRobotMeta
from tutti.data.formats.lerobot.tables import (
    NO_TEXTS,
    check_column,
    explain_damage,
    integers,
    numbers,
    open_parquet,
    read_parquet,
)
from tutti.storage.opened import Opened
from tutti.storage.reading import shown
from tutti.types import LABELS, Label

MAX_TOLERANCE = 100.0
"""Largest tolerance of times, in frames."""
MAX_DRIFT, MIN_STEPS = 0.02, 50
"""How far the rate that the times tell may lie off fps, as a share of it, over how many steps at least."""
_OPEN_FILES = 16
OpenFile = tuple[pq.ParquetFile, Int64[np.ndarray, " g"]]
"""A data file, and where its row groups begin."""
_READERS, _AHEAD = 4, 64
"""Threads that read files of one episode each, and how many files they are ahead at most."""


def read_numbers(
    meta: LeRobotMeta,
    sizes: Mapping[Label, dict[str, int]],
    rows: Int64[np.ndarray, " n"],
    episode_of: Int64[np.ndarray, " n"],
) -> dict[str, np.ndarray]:
    """The numeric columns at `rows` of all data files, joined in path order and checked against meta. `sizes`
    has the columns of actions and of states with their numbers, which are finite where they are asked for."""
    dims = {key: size for columns in sizes.values() for key, size in columns.items()}
    found: dict[str, np.ndarray] = {key: np.empty((len(rows), n), np.float32) for key, n in dims.items()}
    found["task_index"] = np.zeros(len(rows), np.int64)
    frames = rows - meta.starts[episode_of]
    found["timestamp"] = frames / meta.info.fps
    of_file: list[tuple[Path, int]] = []
    end, done, tasks = 0, 0, len(meta.tasks)
    for path, whole, length in _tables(meta, dims):
        of_file.append((path, begin := end))
        end += length
        if whole is None:
            continue
        here = slice(done, done := int(np.searchsorted(rows, end)))
        local = rows[here] - begin
        table = whole if len(local) == length else whole.take(pa.array(local))
        for key, dim in dims.items():
            found[key][here] = _vector_column(table[key], key, dim, path)
        for key, wanted in (("episode_index", episode_of), ("index", rows), ("frame_index", frames)):
            if key in table.column_names:
                why = ": frames must lie one after the other, in order"
                check_column(path, key, integers(table, key, path), wanted[here], why, rows=local)
        if (key := meta.text_column) in table.column_names:
            task, known = integers(table, key, path), f" of {tasks} in {meta.tables[0]}"
            check_column(path, key, task, task.clip(0, tasks - 1), known, rows=local)
            found["task_index"][here] = task
        if "timestamp" in table.column_names:
            found["timestamp"][here] = numbers(table, "timestamp", path, local)
    _check_times(meta, found["timestamp"], rows, episode_of, of_file)
    _check_texts(meta, found["task_index"], episode_of)
    used: list[tuple[str, Label]] = [(key, label) for label in LABELS for key in sizes.get(label, ())]
    for key, label in used:
        what, at = f"{meta.folder}: {key}", {"episode_of": episode_of, "frames": frames, "rows": rows}
        meta.check_finite(what, label, found[key], **at)
    return found


def _tables(meta: LeRobotMeta, dims: Mapping[str, int]) -> Iterator[tuple[Path, pa.Table | None, int]]:
    """Each data file in path order, the columns that are used, and its rows; None for the columns of an
    episode that is left out, where each has a file of its own. These may be many thousands, so some are read
    ahead, and none stays open.

    Raises: UserError for a file with fewer or more rows than its episode has.
    """
    texts = [] if meta.tasks == NO_TEXTS else [meta.text_column]
    needed, optional = [*dims, "episode_index", *texts], ["frame_index", "timestamp"]
    if not meta.info.file_an_episode:
        for path in meta.data_files:
            yield path, (table := read_parquet(path, needed, [*optional, "index"])), len(table)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        for begin in range(0, len(meta.data_files), _AHEAD):
            block = slice(begin, begin + _AHEAD)
            paths, used = meta.data_files[block], meta.kept[block]
            tables = pool.map(lambda path: read_parquet(path, needed, optional), compress(paths, used))
            for episode, (path, kept) in enumerate(zip(paths, used, strict=True), begin):
                table, length = next(tables) if kept else None, int(meta.lengths[episode])
                if table is not None and len(table) != length:
                    raise data_error(
                        f"{path} has {len(table)} rows, but meta/episodes.jsonl says that episode {episode} "
                        f"has {length}.",
                        cure=COPY_AGAIN + meta.or_leave_out([episode]),
                    )
                yield path, table, length


def _check_times(
    meta: LeRobotMeta,
    times: Float64[np.ndarray, " n"],
    rows: Int64[np.ndarray, " n"],
    episode_of: Int64[np.ndarray, " n"],
    of_file: list[tuple[Path, int]],
) -> None:
    """Times are frame number / fps within the tolerance. Raises: UserError with the largest deviation."""
    fps = meta.info.fps
    promised = (rows - meta.starts[episode_of]) / fps
    off = np.abs(times - promised) * fps
    wrong = off >= meta.tolerance
    steps = np.diff(episode_of, prepend=-1) == 0
    mean = float(np.diff(times, prepend=0.0)[steps].mean())
    # A wide tolerance must not hide a wrong rate.
    drifts = abs(mean * fps - 1) > MAX_DRIFT and int(steps.sum()) >= MIN_STEPS
    if not (wrong.any() or (drifts and meta.tolerance > TOLERANCE)):
        return
    row = int(np.argmax(wrong)) if wrong.any() else 0
    path, begin = [one for one in of_file if one[1] <= rows[row]][-1]
    cure = "correct fps in meta/info.json, or the timestamps, which begin at 0 in each episode."
    if not drifts and (largest := float(off.max())) < MAX_TOLERANCE:
        allowed = math.ceil(100 * largest + 1) / 100
        cure += (
            f" Or, where they are times by a clock, allow sources.tolerance={allowed:g}: the largest "
            f"deviation is {largest:.2f} frames."
        )
    cure += meta.or_leave_out(np.unique(episode_of[wrong]).tolist())
    why = f", since frame_index counts {fps:g} frames a second (fps of meta/info.json)"
    if not wrong.any():
        raise data_error(
            f"{meta.folder}: the timestamps count {1 / mean:.4g} frames a second; fps of meta/info.json is "
            f"{fps:g}.",
            cure=cure,
        )
    text = f"{path}: timestamp of row {rows[row] - begin} is {times[row]}; expected {promised[row]}{why}."
    raise data_error(text, cure=cure)


def _check_texts(
    meta: LeRobotMeta, task_of: Int64[np.ndarray, " n"], episode_of: Int64[np.ndarray, " n"]
) -> None:
    """The instructions of an episode's rows must be those that the episode table names, and there where they
    are asked for."""
    meta.check_spoken(str(meta.folder), meta.tasks, task_of, episode_of)
    if meta.texts is None or meta.tasks == NO_TEXTS:
        return
    used: list[set[str]] = [set() for _ in meta.texts]
    # Only where one of the two changes: a large data set has a million times as many rows.
    begins = np.flatnonzero(np.diff(episode_of, prepend=-1) | np.diff(task_of, prepend=-1))
    for episode, task in zip(episode_of[begins].tolist(), task_of[begins].tolist(), strict=True):
        used[episode] |= {meta.tasks[task]} - {""}
    for episode, (texts, named) in enumerate(zip(used, meta.texts, strict=True)):
        # GR00T also lists words such as "valid" among the tasks of an episode.
        if meta.kept[episode] and texts != (texts & named if meta.modality.annotation else named):
            raise data_error(
                f"{meta.folder}: the rows of episode {episode} have other instructions "
                f"than {meta.tables[1]}.",
                expected=shown(sorted(map(str, named)), 200),
                found=shown(sorted(texts), 200),
                cure=f"correct {meta.text_column}, {meta.tables[0]} or the tasks of the episode, so that "
                "they agree." + meta.or_leave_out([episode]),
            )


def _vector_column(column: pa.ChunkedArray, key: str, dim: int, path: Path) -> Float32[np.ndarray, "n d"]:
    """list<T>, fixed_size_list<T>[dim] or, where dim is 1, plain T, to float32 (n, dim)."""
    array: Any = column.combine_chunks()
    kind = array.type
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    flat = array.flatten() if nested else array
    lengths = set(pc.call_function("list_value_length", [array]).unique().to_pylist()) if nested else {1}
    number = pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)
    if lengths != {dim} or array.null_count or not number:
        raise data_error(
            f"{path}: the column {key!r} does not fit meta/info.json.",
            expected=f"{dim} numbers in each row",
            found=f"{kind}, {array.null_count} rows without value",
            cure="correct the shape in meta/info.json, or record the data set again.",
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is named later
        return flat.to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32)


def opened_files(paths: Sequence[Path]) -> Opened[int, OpenFile]:
    """The data files, and where the row groups of each begin, its length last; none is open yet."""

    def opens(number: int) -> OpenFile:
        with explain_damage(paths[number]):
            metadata = (file := open_parquet(paths[number])).metadata
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return file, np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    return Opened(opens, _OPEN_FILES, lambda opened: opened[0].close())


def lengths_of_files(meta: LeRobotMeta) -> Int64[np.ndarray, " f"]:
    """The rows of each data file. Raises: UserError unless they are as many as info.json says."""
    lengths = meta.lengths
    if not meta.info.file_an_episode:
        opened = opened_files(meta.data_files)
        lengths = np.array([opened[number][1][-1] for number in range(len(meta.data_files))], np.int64)
    meta.info.check_total("frames", int(lengths.sum()), meta.folder / "data")
    return lengths
