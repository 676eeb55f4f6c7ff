"""Reads LeRobotDataset v3.0 folders: numbers at once, checked; pictures on request from PNG or video."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, UnidentifiedImageError

from tutti.data.content import Digests, digest
from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.features import describe_dimensions, find_cameras, vector_sizes
from tutti.data.formats.lerobot.metadata import LeRobotMeta, read_meta
from tutti.data.formats.lerobot.tables import (
    TABLE_BYTES,
    check_column,
    data_error,
    decoded_bytes,
    explain_damage,
    integers,
    numbers,
    open_parquet,
    read_parquet,
)
from tutti.data.formats.lerobot.video import VideoReader
from tutti.storage.reading import shown

PICTURES = ("PNG", "JPEG", "WEBP")
SAMPLED_BYTES = 2**28
"""Bytes of pictures of a view that its digests look at, at most."""
_BLOCK = 2**16
_REPAIR = "repair or remove the episode, or record the data set again."


class LeRobotStore(EpisodeStore):
    """A LeRobotDataset v3.0 on disk.

    `views` are the camera features to use, all colour cameras (in the order of info.json) where it is None.
    Actions and states are the 1-D features `action` and `state`, several of them joined in that order;
    without `state` a state has no numbers. `remarks` name cameras that are passed over.

    Raises UserError, naming file, key, expected, found and cure, for anything missing, damaged,
    inconsistent or not finite.
    """

    def __init__(
        self,
        folder: Path,
        views: tuple[str, ...] | None = None,
        state: tuple[str, ...] = (STATE,),
        action: tuple[str, ...] = (ACTION,),
    ) -> None:
        self._meta = meta = read_meta(folder)
        self.name = str(folder)
        features, info = meta.info.features, folder / "meta" / "info.json"
        shapes, passed_over = find_cameras(features, info, views)
        self.remarks = (passed_over,) if passed_over else ()
        sizes = {
            what: vector_sizes(features, info, keys, what)
            for what, keys in (("state", state), ("action", action))
        }
        self.spec = StoreSpec(
            views=tuple(shapes),
            image_shapes=tuple(shapes.values()),
            state_dim=sum(sizes["state"].values()),
            action_dim=sum(sizes["action"].values()),
            fps=meta.info.fps,
            num_frames=meta.info.total_frames,
            embodiment=meta.info.robot_type or "unknown",
            **describe_dimensions(features, state, "state"),
            **describe_dimensions(features, action, "action"),
        )
        self._columns, self._videos = _PictureColumns(meta), VideoReader(meta.info.fps)
        self._episode_of = np.repeat(np.arange(len(meta.lengths)), meta.lengths)
        numbers = _read_numbers(meta, sizes["state"] | sizes["action"], self._episode_of)
        none = np.empty((meta.info.total_frames, 0), np.float32)
        self.states, self.actions = (
            np.concatenate([none, *map(numbers.__getitem__, keys)], axis=1) for keys in (state, action)
        )
        self._times, self.instruction_of = numbers["timestamp"], numbers["task_index"]
        self.instructions = meta.tasks
        spans = zip(meta.starts.tolist(), meta.lengths.tolist(), strict=True)
        self.episodes = tuple(
            Episode(index, start, length, meta.tasks[self.instruction_of[start]])
            for index, (start, length) in enumerate(spans)
        )

    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures of `view` at the global frame rows, in the order asked; sorted rows are fast."""
        shape = (*self.spec.image_shapes[self.spec.views.index(view)], 3)
        out = np.empty((len(rows), *shape), dtype=np.uint8)
        order = np.argsort(rows, kind="stable")
        read = self._video if view in self._meta.videos else self._columns.read
        for place, picture in zip(order.tolist(), read(view, rows[order], shape), strict=True):
            out[place] = picture
        return out

    def picture_digests(self) -> Digests:
        """Of the encoded pictures: all of a view up to SAMPLED_BYTES, beyond that evenly spread row groups or
        blocks of its videos, and of where each episode lies in its video.
        """
        rows = np.zeros((len(self.spec.views), self.spec.num_frames), np.uint64)
        for of_view, view in zip(rows, self.spec.views, strict=True):
            if (table := self._meta.videos.get(view)) is None:
                self._columns.digests(view, out=of_view)
                continue
            files = dict.fromkeys(table.paths)
            content = {
                path: hashlib.sha256(sampled_bytes(path, SAMPLED_BYTES // len(files))).digest()
                for path in files
            }
            for episode, path, start in zip(self.episodes, table.paths, table.from_timestamp, strict=True):
                here = slice(episode.start, episode.end)
                of_view[here] = digest(content[path], start.tobytes(), self._times[here].tobytes())
        return np.array([digest(rows[:, e.start : e.end].tobytes()) for e in self.episodes], np.uint64)

    def _video(
        self, view: str, rows: Int64[np.ndarray, " k"], shape: tuple[int, ...]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        table, episodes = self._meta.videos[view], self._episode_of[rows]
        times = table.from_timestamp[episodes] + self._times[rows]
        begin = 0
        for end in range(1, len(rows) + 1):
            here = table.paths[episodes[begin]]
            if end == len(rows) or table.paths[episodes[end]] != here:
                for picture in self._videos.read(here, times[begin:end]):
                    if picture.shape != shape:
                        problem = f"{here}: a picture of {view} is {picture.shape}; info.json says {shape}."
                        raise data_error(problem, cure=_REPAIR)
                    yield picture
                begin = end


def _read_numbers(
    meta: LeRobotMeta, dims: dict[str, int], episode_of: Int64[np.ndarray, " n"]
) -> dict[str, np.ndarray]:
    """The numeric columns of all data files, joined in path order and checked against meta."""
    rows = np.arange(len(episode_of))
    found: dict[str, np.ndarray] = {key: np.empty((len(rows), n), np.float32) for key, n in dims.items()}
    found["task_index"] = np.empty(len(rows), np.int64)
    frames, fps = rows - meta.starts[episode_of], meta.info.fps
    found["timestamp"] = frames / fps
    end, tasks = 0, len(meta.tasks)
    optional = ["index", "frame_index", "timestamp"]
    for path in meta.data_files:
        table = read_parquet(path, [*dims, "episode_index", "task_index"], optional)
        here = slice(end, end := end + len(table))
        for key, dim in dims.items():
            found[key][here] = _vector_column(table[key], key, dim, path)
        for key, wanted in (("episode_index", episode_of), ("index", rows), ("frame_index", frames)):
            if key in table.column_names:
                why = ": frames must lie one after the other, in order"
                check_column(path, key, integers(table, key, path), wanted[here], why)
        task = integers(table, "task_index", path)
        check_column(path, "task_index", task, task.clip(0, tasks - 1), f" of {tasks} in meta/tasks.parquet")
        found["task_index"][here] = task
        if "timestamp" in table.column_names:
            times, promised = numbers(table, "timestamp", path), found["timestamp"][here]
            near = np.where(np.abs(times - promised) < 0.25 / fps, times, promised)
            why = f", since frame_index counts {fps:g} frames a second (fps of meta/info.json)"
            cure = "correct fps in meta/info.json, or the timestamps, which begin at 0 in each episode."
            check_column(path, "timestamp", times, near, why, cure=cure)
            found["timestamp"][here] = times
    _check_texts(meta, found["task_index"], episode_of)
    for key in dims:
        wrong = np.argwhere(~np.isfinite(found[key]))
        if len(wrong):
            row, dimension = wrong[0].tolist()
            episode = int(episode_of[row])
            raise data_error(
                f"{meta.folder}: {key} is {found[key][row, dimension]} in episode {episode}, row "
                f"{row - int(meta.starts[episode])} of it (frame row {row}), dimension {dimension}; "
                f"{len(wrong)} such values in all.",
                expected="finite numbers",
                cure=_REPAIR,
            )
    return found


def _check_texts(
    meta: LeRobotMeta, task_of: Int64[np.ndarray, " n"], episode_of: Int64[np.ndarray, " n"]
) -> None:
    """The instructions of an episode's rows must be those that the episode table names."""
    if meta.texts is None:
        return
    used: list[set[str]] = [set() for _ in meta.texts]
    # Only where one of the two changes: a large data set has a million times as many rows.
    begins = np.flatnonzero(np.diff(episode_of, prepend=-1) | np.diff(task_of, prepend=-1))
    for episode, task in zip(episode_of[begins].tolist(), task_of[begins].tolist(), strict=True):
        used[episode].add(meta.tasks[task])
    for episode, (texts, named) in enumerate(zip(used, meta.texts, strict=True)):
        if texts != named:
            raise data_error(
                f"{meta.folder}: the rows of episode {episode} have other instructions than meta/episodes.",
                expected=shown(sorted(map(str, named)), 200),
                found=shown(sorted(texts), 200),
                cure="correct task_index, meta/tasks.parquet or the column tasks, so that they agree.",
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


def decode_picture(content: bytes, shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture's RGB bytes. Its size is looked at first, so that a small file cannot fill the memory, and of
    Pillow's many formats, some of which start other programs, only `PICTURES` are tried.

    Raises: ValueError for another size than `shape` (h, w, 3), and what Pillow raises.
    """
    try:
        opened = Image.open(BytesIO(content), formats=PICTURES)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(PICTURES)}") from None
    with opened as image:
        if (image.height, image.width) != tuple(shape[:2]):
            raise ValueError(f"it has {image.height} x {image.width} pixels; meta/info.json says {shape}")
        deep = image.format == "PNG" and content[24] != 8  # Pillow would cut 16 bits a channel to 8
        if image.mode != "RGB" or deep:
            raise ValueError(
                f"it is {'16-bit ' if deep else ''}{image.mode}; convert the pictures to 8-bit RGB"
            )
        return np.asarray(image)


class _PictureColumns:
    """PNG (or other) pictures inside the data files; keeps the row group it read last of each view."""

    def __init__(self, meta: LeRobotMeta) -> None:
        self._groups: list[tuple[Path, int]] = []
        starts = [0]
        for path in meta.data_files:
            with explain_damage(path):
                metadata = open_parquet(path).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        meta.info.check_total("frames", starts[-1], meta.folder / "data")
        self._starts = starts
        self._shapes = {view: feature.shape for view, feature in meta.info.features.items()}
        self._files: dict[Path, pq.ParquetFile] = {}
        self._last: dict[str, tuple[int, pa.Array]] = {}

    def digests(self, view: str, out: Digests) -> None:
        """Writes a digest of each row's encoded picture; rows of groups beyond the sample keep their 0."""
        sizes = [decoded_bytes(self._open(path), [view], group) for path, group in self._groups]
        for group in range(0, len(sizes), max(1, math.ceil(sum(sizes) / SAMPLED_BYTES))):
            for row, content in enumerate(self._encoded(view, group), self._starts[group]):
                out[row] = digest(content.as_py() or b"")

    def read(
        self, view: str, rows: Int64[np.ndarray, " k"], shape: tuple[int, ...]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures at ascending `rows`. One of another size than `shape` (h, w, 3) is not decoded."""
        groups = np.searchsorted(np.asarray(self._starts), rows, side="right") - 1
        for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
            content = self._encoded(view, group)[row - self._starts[group]].as_py()
            try:
                if content is None:
                    raise OSError("the picture has no bytes")
                picture = decode_picture(content, shape)
            except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to
                raise data_error(
                    f"{self._groups[group][0]}: the picture of {view} in frame row {row} cannot be read: "
                    f"{shown(str(error), 300, quoted=False)}.",
                    cure=_REPAIR,
                ) from error
            yield picture

    def _open(self, path: Path) -> pq.ParquetFile:
        if path not in self._files:
            self._files[path] = open_parquet(path)
        return self._files[path]

    def _encoded(self, view: str, group: int) -> pa.Array:
        """The encoded pictures of a row group."""
        if self._last.get(view, (-1, None))[0] != group:
            path, number = self._groups[group]
            with explain_damage(path):
                file = self._open(path)
                size = decoded_bytes(file, [view], number)
                rows = self._starts[group + 1] - self._starts[group]
                if size > TABLE_BYTES + 2 * rows * (math.prod(self._shapes[view]) + 2**12):
                    raise data_error(f"{path}: the pictures of {view} take {size:,} bytes in {rows} rows.")
                table = file.read_row_group(number, columns=[view], use_threads=False)
                column = table[view].combine_chunks()
                encoded = column.field("bytes") if pa.types.is_struct(column.type) else column
                if not pa.types.is_binary(encoded.type):
                    raise data_error(f"{path}: {view} holds {encoded.type}.", expected="encoded pictures")
            self._last[view] = (group, encoded)
        return self._last[view][1]


def sampled_bytes(path: Path, most: int) -> bytes:
    """A file's content; its size and evenly spread blocks, at least four, where it is larger than `most`."""
    size = path.stat().st_size
    count = max(4, most // _BLOCK)
    with path.open("rb") as file:
        if size <= count * _BLOCK:
            return file.read()
        parts = [size.to_bytes(8, "little")]
        for place in np.linspace(0, size - _BLOCK, count).astype(np.int64).tolist():
            file.seek(place)
            parts.append(file.read(_BLOCK))
    return b"".join(parts)
