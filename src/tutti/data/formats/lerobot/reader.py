"""Reads LeRobotDataset v3.0 folders: numbers at once, checked; pictures on request from PNG or video."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, UnidentifiedImageError

from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.formats.lerobot.metadata import (
    LeRobotMeta,
    data_error,
    first_true,
    open_parquet,
    read_meta,
    read_parquet,
)
from tutti.data.formats.lerobot.video import VideoReader
from tutti.errors import UserError
from tutti.storage.reading import shown

PICTURES = ("PNG", "JPEG", "WEBP")
_REPAIR = "repair or remove the episode, or record the data set again."


class LeRobotStore(EpisodeStore):
    """A LeRobotDataset v3.0 on disk.

    `views` are the camera features to use, all of them (in the order of info.json) where it is None.
    Actions and states are the 1-D features `action_key` and `state_key`.

    Raises UserError, naming file, key, expected, found and cure, for anything missing, damaged,
    inconsistent or not finite.
    """

    def __init__(
        self,
        folder: Path,
        views: tuple[str, ...] | None = None,
        state_key: str = "observation.state",
        action_key: str = "action",
    ) -> None:
        self._meta = read_meta(folder)
        self.name = str(folder)
        info = folder / "meta" / "info.json"
        chosen = _choose_views(info, self._meta.features, views)
        state_dim = _vector_dim(info, self._meta.features, state_key, "state_key")
        action_dim = _vector_dim(info, self._meta.features, action_key, "action_key")
        self.spec = StoreSpec(
            views=chosen,
            image_shapes=tuple(_image_shape(info, view, self._meta.features[view]) for view in chosen),
            state_dim=state_dim,
            action_dim=action_dim,
            fps=self._meta.fps,
            num_frames=self._meta.num_frames,
            embodiment=self._meta.embodiment,
        )
        table = _FrameTable(self._meta, {state_key: state_dim, action_key: action_dim})
        self.states, self.actions = table.vectors[state_key], table.vectors[action_key]
        self.instructions, self.instruction_of = self._meta.tasks, table.task_index
        self._episode_of, self._times = table.episode_of, table.times
        self.episodes = tuple(
            Episode(index, start, length, self.instructions[self.instruction_of[start]])
            for index, (start, length) in enumerate(
                zip(self._meta.starts.tolist(), self._meta.lengths.tolist(), strict=True)
            )
        )
        self.fingerprint = self._meta.fingerprint()
        self._columns = _ImageColumns(self._meta)
        self._videos = VideoReader(self._meta.fps)

    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures of `view` at the global frame rows, in the order asked; sorted rows are fast."""
        shape = (*self.spec.image_shapes[self.spec.views.index(view)], 3)
        out = np.empty((len(rows), *shape), dtype=np.uint8)
        order = np.argsort(rows, kind="stable")
        is_video = view in self._meta.videos
        pictures = (
            self._video(view, rows[order]) if is_video else self._columns.read(view, rows[order], shape)
        )
        for place, picture in zip(order.tolist(), pictures, strict=True):
            if picture.shape != shape:
                episode = int(self._episode_of[rows[place]])
                raise data_error(
                    f"{self.name}: the picture of {view} in frame row {rows[place]} (episode {episode}) is "
                    f"{picture.shape}; meta/info.json says {shape}.",
                    cure=_REPAIR,
                )
            out[place] = picture
        return out

    def _video(self, view: str, rows: Int64[np.ndarray, " k"]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        table = self._meta.videos[view]
        episodes = self._episode_of[rows]
        times = table.from_timestamp[episodes] + self._times[rows]
        begin = 0
        for end in range(1, len(rows) + 1):
            here = table.paths[episodes[begin]]
            if end == len(rows) or table.paths[episodes[end]] != here:
                yield from self._videos.read(here, times[begin:end])
                begin = end


def _choose_views(
    info: Path, features: dict[str, dict[str, Any]], views: tuple[str, ...] | None
) -> tuple[str, ...]:
    cameras = tuple(key for key, feature in features.items() if feature["dtype"] in ("image", "video"))
    for view in views or ():
        if view not in cameras:
            problem = f"views: {view!r} is no camera of {info}."
            raise data_error(problem, found=cameras, cure="choose among these.")
    if not (views or cameras):
        raise UserError(f"{info}: expected at least one feature of dtype image or video, found none.")
    return views or cameras


def _vector_dim(info: Path, features: dict[str, dict[str, Any]], key: str, setting: str) -> int:
    if key not in features:
        cure = f"name the right feature by sources.{setting}."
        raise data_error(f"{info}: the feature {key!r} is missing.", found=tuple(features), cure=cure)
    shape = features[key]["shape"]
    if len(shape) != 1 or shape[0] < 1:
        raise UserError(f"{info}: features[{key!r}].shape is {shape}; expected one positive number.")
    return int(shape[0])


def _image_shape(info: Path, view: str, feature: dict[str, Any]) -> tuple[int, int]:
    shape, names = feature["shape"], feature.get("names") or ("height", "width", "channels")
    channels_first = str(names[0]).startswith("channel")
    if len(shape) != 3 or shape[0 if channels_first else 2] != 3:
        raise UserError(
            f"{info}: features[{view!r}].shape is {shape} with names {names}; expected [height, width, 3]."
        )
    return (shape[1], shape[2]) if channels_first else (shape[0], shape[1])


class _FrameTable:
    """The numeric columns of all data files, joined in path order and checked against meta."""

    def __init__(self, meta: LeRobotMeta, dims: dict[str, int]) -> None:
        self._meta = meta
        count = meta.num_frames
        self.vectors = {key: np.empty((count, dim), dtype=np.float32) for key, dim in dims.items()}
        self.task_index = np.empty(count, dtype=np.int64)
        self.times = np.empty(count, dtype=np.float64)
        self.episode_of = np.repeat(np.arange(len(meta.lengths)), meta.lengths)
        rows = [open_parquet(path).metadata.num_rows for path in meta.data_files]
        if sum(rows) != count:
            listed = ", ".join(f"{p.name}: {n}" for p, n in zip(meta.data_files[:6], rows, strict=False))
            raise data_error(
                f"{meta.folder / 'data'} has {sum(rows)} frame rows ({listed}), but meta/info.json says "
                f"total_frames = {count}."
            )
        start = 0
        for path, length in zip(meta.data_files, rows, strict=True):
            self._read(path, start, start + length)
            start += length
        for key in dims:
            self._check_finite(key)

    def _read(self, path: Path, start: int, end: int) -> None:
        names = open_parquet(path).schema_arrow.names
        optional = [key for key in ("index", "timestamp", "frame_index") if key in names]
        table = read_parquet(path, [*self.vectors, "episode_index", "task_index", *optional])
        for key, values in self.vectors.items():
            values[start:end] = _vector_column(table[key], key, values.shape[1], path)
        expected = {"episode_index": self.episode_of[start:end]}
        if "index" in optional:
            expected["index"] = np.arange(start, end)
        for key, wanted in expected.items():
            found = table[key].to_numpy()
            if (row := first_true(found != wanted)) >= 0:
                raise data_error(
                    f"{path}: {key} of row {row} is {found[row]}; meta says {wanted[row]}.\n"
                    "  Episodes must lie one after the other, in order."
                )
        tasks = table["task_index"].to_numpy()
        count = len(self._meta.tasks)
        if (row := first_true((tasks < 0) | (tasks >= count))) >= 0:
            raise data_error(
                f"{path}: task_index of row {row} is {tasks[row]}; meta/tasks.parquet has {count} tasks."
            )
        self.task_index[start:end] = tasks
        if "timestamp" in optional:
            self.times[start:end] = table["timestamp"].to_numpy()
        else:
            first = self._meta.starts[self.episode_of[start:end]]
            self.times[start:end] = (np.arange(start, end) - first) / self._meta.fps

    def _check_finite(self, key: str) -> None:
        wrong = np.argwhere(~np.isfinite(self.vectors[key]))
        if len(wrong):
            row, dimension = wrong[0].tolist()
            episode = int(self.episode_of[row])
            raise data_error(
                f"{self._meta.folder}: {key} is {self.vectors[key][row, dimension]} in episode {episode}, "
                f"row {row - int(self._meta.starts[episode])} of it (frame row {row}), dimension "
                f"{dimension}; {len(wrong)} such values in all.",
                expected="finite numbers",
                cure=_REPAIR,
            )


def _vector_column(column: pa.ChunkedArray, key: str, dim: int, path: Path) -> Float32[np.ndarray, "n d"]:
    """list<T>, fixed_size_list<T>[dim] or, where dim is 1, plain T, to float32 (n, dim)."""
    array = column.combine_chunks()
    flat: Any = array
    found = f"1 value a row ({array.type})"
    fits = dim == 1
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        widths = set(array.value_lengths().unique().to_pylist())
        flat, fits, found = array.flatten(), widths == {dim}, f"{array.type} with lengths {widths}"
    elif pa.types.is_fixed_size_list(array.type):
        flat, fits, found = array.flatten(), array.type.list_size == dim, str(array.type)
    number = pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)
    if not fits or array.null_count or not number:
        nulls = f", {array.null_count} rows without value" if array.null_count else ""
        raise data_error(
            f"{path}: the column {key!r} does not fit meta/info.json.",
            expected=f"{dim} numbers in each row",
            found=f"{found}{nulls}",
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
        return np.asarray(image.convert("RGB"))


class _ImageColumns:
    """PNG (or other) pictures inside the data files; keeps the row group it read last."""

    def __init__(self, meta: LeRobotMeta) -> None:
        self._meta = meta
        self._files: dict[Path, pq.ParquetFile] = {}
        self._groups: list[tuple[Path, int]] = []
        self._group_starts: list[int] = [0]
        for path in meta.data_files:
            metadata = open_parquet(path).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                self._group_starts.append(self._group_starts[-1] + metadata.row_group(group).num_rows)
        self._cached: dict[str, tuple[int, pa.Array]] = {}

    def read(
        self, view: str, rows: Int64[np.ndarray, " k"], shape: tuple[int, ...]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures at ascending `rows`. One of another size than `shape` (h, w, 3) is not decoded."""
        groups = np.searchsorted(np.asarray(self._group_starts), rows, side="right") - 1
        for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
            content = self._column(view, group)[row - self._group_starts[group]].as_py()
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

    def _column(self, view: str, group: int) -> pa.Array:
        """The encoded pictures of a row group."""
        if self._cached.get(view, (-1, None))[0] != group:
            path, number = self._groups[group]
            if path not in self._files:
                self._files[path] = open_parquet(path)
            names = self._files[path].schema_arrow.names
            try:
                if view not in names:
                    raise KeyError(f"the column {view!r} is missing; found {names}")
                table = self._files[path].read_row_group(number, columns=[view], use_threads=False)
                column = table[view].combine_chunks()
                encoded = column.field("bytes") if pa.types.is_struct(column.type) else column
            except (pa.ArrowException, OSError, KeyError) as error:
                problem = f"{path}: the pictures of {view} cannot be read: {error}."
                raise data_error(problem, expected="a column struct<bytes, path>") from error
            self._cached[view] = (group, encoded)
        return self._cached[view][1]
