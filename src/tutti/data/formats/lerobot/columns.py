"""The numeric columns of the data files of a LeRobotDataset, joined and checked against its meta folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Float64, Int64

from tutti.data.formats.lerobot.metadata import LeRobotMeta
from tutti.data.formats.lerobot.tables import (
    WITHOUT_TEXT,
    check_column,
    data_error,
    integers,
    numbers,
    read_parquet,
)
from tutti.data.formats.lerobot.video import TOLERANCE
from tutti.storage.reading import shown
from tutti.types import LABELS, Label

MAX_TOLERANCE = 100.0
"""Largest tolerance of times, in frames."""
MAX_DRIFT, MIN_STEPS = 0.02, 50
"""How far the rate that the times tell may lie off fps, as a share of it, over how many steps at least."""
REPAIR = "repair or remove the episode, or record the data set again."


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
    found["task_index"] = np.empty(len(rows), np.int64)
    frames = rows - meta.starts[episode_of]
    found["timestamp"] = frames / meta.info.fps
    of_file: list[tuple[Path, int]] = []
    end, done, tasks = 0, 0, len(meta.tasks)
    optional = ["index", "frame_index", "timestamp"]
    for path in meta.data_files:
        table = read_parquet(path, [*dims, "episode_index", "task_index"], optional)
        of_file.append((path, begin := end))
        end += len(table)
        here = slice(done, done := int(np.searchsorted(rows, end)))
        local = rows[here] - begin
        if len(local) < len(table):
            table = table.take(pa.array(local))
        for key, dim in dims.items():
            found[key][here] = _vector_column(table[key], key, dim, path)
        for key, wanted in (("episode_index", episode_of), ("index", rows), ("frame_index", frames)):
            if key in table.column_names:
                why = ": frames must lie one after the other, in order"
                check_column(path, key, integers(table, key, path), wanted[here], why, rows=local)
        task, known = integers(table, "task_index", path), f" of {tasks} in meta/tasks.parquet"
        check_column(path, "task_index", task, task.clip(0, tasks - 1), known, rows=local)
        found["task_index"][here] = task
        if "timestamp" in table.column_names:
            found["timestamp"][here] = numbers(table, "timestamp", path, local)
    _check_times(meta, found["timestamp"], rows, episode_of, of_file)
    _check_texts(meta, found["task_index"], episode_of)
    used: list[tuple[str, Label]] = [(key, label) for label in LABELS for key in sizes.get(label, ())]
    for key, label in used:
        unknown = ~np.isfinite(found[key])
        asked, lenient = (meta.asked(label, use)[episode_of] for use in (True, "where_present"))
        # A row without a single number has none; a number that is missing among others is damage.
        asked |= lenient & ~unknown.all(axis=1)
        wrong = np.argwhere(unknown & asked[:, None])
        if len(wrong):
            place, dimension = wrong[0].tolist()
            episode = int(episode_of[place])
            raise data_error(
                f"{meta.folder}: {key} is {found[key][place, dimension]} in episode {episode}, row "
                f"{frames[place]} of it (frame row {rows[place]}), dimension {dimension}; {len(wrong)} such "
                "values in all.",
                expected="finite numbers",
                cure=REPAIR + meta.or_leave_out(episode_of[wrong[:, 0]].tolist()),
            )
    return found


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
    silent = np.array([not text.strip() for text in meta.tasks])[task_of]
    if (wrong := np.unique(episode_of[silent & meta.asked("text", True)[episode_of]])).size:
        raise data_error(
            f"{meta.folder}: {len(wrong)} of the episodes have no instruction, such as {wrong[0]}.",
            expected="texts that are not blank",
            cure=WITHOUT_TEXT + "." + meta.or_leave_out(wrong.tolist()),
        )
    if meta.texts is None:
        return
    used: list[set[str]] = [set() for _ in meta.texts]
    # Only where one of the two changes: a large data set has a million times as many rows.
    begins = np.flatnonzero(np.diff(episode_of, prepend=-1) | np.diff(task_of, prepend=-1))
    for episode, task in zip(episode_of[begins].tolist(), task_of[begins].tolist(), strict=True):
        used[episode] |= {meta.tasks[task]} - {""}
    for episode, (texts, named) in enumerate(zip(used, meta.texts, strict=True)):
        if meta.kept[episode] and texts != named:
            raise data_error(
                f"{meta.folder}: the rows of episode {episode} have other instructions than meta/episodes.",
                expected=shown(sorted(map(str, named)), 200),
                found=shown(sorted(texts), 200),
                cure="correct task_index, meta/tasks.parquet or the column tasks, so that they agree."
                + meta.or_leave_out([episode]),
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
