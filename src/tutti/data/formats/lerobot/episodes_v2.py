"""Reads and checks the tables of a LeRobotDataset v2.0 or v2.1: JSON lines, and files of one episode each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from tutti.data.formats.chosen import Chosen, Selection, excluding
from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.data.formats.lerobot.metadata import (
    MAX_FRAMES,
    Info,
    LeRobotMeta,
    VideoTable,
    fill_pattern,
    require_file,
)
from tutti.data.formats.lerobot.modality import Modality
from tutti.data.formats.lerobot.tables import NO_TEXTS, check_column, instructions
from tutti.storage.reading import parse_json, read_lines, shown


def read_v2(folder: Path, info: Info, modality: Modality, chosen: Sequence[Chosen]) -> LeRobotMeta:
    """What `folder/meta` says; every fault is a UserError that names file, key and cure. Statistics and a
    folder images/ are never looked at."""
    needs_text = all(one.labels["text"] is True for one in chosen)
    tasks = _read_tasks(folder / "meta" / "tasks.jsonl", info, needs_text)
    where = folder / "meta" / "episodes.jsonl"
    lengths, texts = _read_episodes(where, info)
    used = Selection.of(chosen, len(lengths), folder)
    kept, parts, tolerance = used.kept, used.parts, max(one.tolerance for one in chosen)
    short = np.flatnonzero(kept & (lengths < 2)).tolist()
    cure = f"leave short episodes out: {excluding(short)}"
    check_column(where, "length", lengths, np.where(kept, lengths.clip(2), lengths), " or more", cure=cure)
    info.check_total("frames", int(lengths.sum()), where)

    def files(key: str, pattern: str | None, **names: str) -> tuple[Path, ...]:
        found: list[Path] = []
        for episode, needed in enumerate(kept.tolist()):
            values = {**names, "episode_chunk": episode // info.chunks_size, "episode_index": episode}
            found.append(folder / fill_pattern(folder / "meta" / "info.json", key, pattern, values))
            if needed:
                require_file(found[-1], "meta/episodes.jsonl", [episode])
        return tuple(found)

    none = np.zeros(len(lengths))
    videos = {
        view: VideoTable(files("video_path", info.video_path, video_key=view), none, none + np.inf)
        for view, feature in info.features.items()
        if feature.dtype == "video" and not feature.no_colours
    }
    starts = np.cumsum(lengths) - lengths
    data_files = files("data_path", info.data_path)
    return LeRobotMeta(
        folder=folder,
        info=info,
        tasks=tasks,
        starts=starts,
        lengths=lengths,
        texts=texts,
        data_files=data_files,
        videos=videos,
        tolerance=tolerance,
        modality=modality,
        kept=kept,
        parts=parts,
    )


def _rows(path: Path, most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a file lies, and what it says; blank lines are passed over."""
    if not path.exists():
        raise data_error(f"{path} is missing.", expected="a file of JSON lines")
    count = 0
    for number, line in enumerate(read_lines(path, links=True), 1):
        where = f"{path}, line {number}"
        if line is None:
            raise data_error(f"{where}: too long, or not UTF-8.", expected="one JSON object a line")
        if line.strip():
            if (count := count + 1) > most:
                raise data_error(f"{where}: more lines than meta/info.json says.", expected=most)
            yield where, parse_json(line, where, finite=True, cure=f"Cure: {COPY_AGAIN}")


def _whole(values: dict[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 0 <= value <= MAX_FRAMES:
        raise data_error(f"{where}: {key} is {shown(value)}.", expected="a whole number from 0 on")
    return value


def _in_order(index: Sequence[int], key: str, path: Path) -> list[int]:
    """The places of the lines in ascending order of their `key`, which counts from 0 without a gap."""
    order = sorted(range(len(index)), key=index.__getitem__)
    why = f", where the lines are in order of {key}, which counts from 0"
    check_column(path, key, np.array([index[place] for place in order], np.int64), np.arange(len(index)), why)
    return order


def _read_tasks(path: Path, info: Info, needs_text: bool) -> tuple[str, ...]:
    if not (needs_text or path.exists()):
        return NO_TEXTS
    index: list[int] = []
    texts: list[str | None] = []
    for where, values in _rows(path, info.total_tasks):
        index.append(_whole(values, "task_index", where))
        text = values.get("task")
        if not (text is None or isinstance(text, str)):
            raise data_error(f"{where}: task is {shown(text)}.", expected="a text")
        texts.append(text)
    info.check_total("tasks", len(texts), path)
    order = _in_order(index, "task_index", path)
    try:
        column = pa.chunked_array([pa.array([texts[place] for place in order], pa.string())])
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise data_error(f"{path}: task is no text.", expected="UTF-8", found=error) from None
    return instructions(column, "task", path, blank=not needs_text)


def _read_episodes(
    path: Path, info: Info
) -> tuple[Int64[np.ndarray, " e"], tuple[frozenset[str], ...] | None]:
    """The length of each episode, and its texts where all lines have them."""
    index: list[int] = []
    lengths: list[int] = []
    texts: list[frozenset[str]] = []
    known: dict[frozenset[str], frozenset[str]] = {}
    for where, values in _rows(path, info.total_episodes):
        index.append(_whole(values, "episode_index", where))
        lengths.append(_whole(values, "length", where))
        if (said := values.get("tasks")) is not None:
            said = [said] if isinstance(said, str) else said
            if not (isinstance(said, list) and all(isinstance(one, str) for one in said)):
                raise data_error(f"{where}: tasks is {shown(said)}.", expected="a list of texts")
            one = frozenset(filter(None, said))
            texts.append(known.setdefault(one, one))
    info.check_total("episodes", len(index), path)
    order = _in_order(index, "episode_index", path)
    named = tuple(texts[place] for place in order) if len(texts) == len(index) else None
    return np.array([lengths[place] for place in order], np.int64), named
