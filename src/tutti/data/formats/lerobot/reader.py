"""Reads LeRobotDataset v3.0 folders: numbers at once, checked; pictures on request from PNG or video."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError

from tutti.data.content import Digests, digest
from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.columns import REPAIR, read_numbers
from tutti.data.formats.lerobot.features import (
    describe_dimensions,
    find_cameras,
    usable,
    vector_sizes,
)
from tutti.data.formats.lerobot.metadata import ALL, Chosen, LeRobotMeta, read_meta
from tutti.data.formats.lerobot.tables import (
    TABLE_BYTES,
    data_error,
    decoded_bytes,
    explain_damage,
    open_parquet,
)
from tutti.data.formats.lerobot.video import TOLERANCE, VideoReader
from tutti.errors import UserError
from tutti.storage.reading import shown
from tutti.types import LABELS, Label

PICTURES = ("PNG", "JPEG", "WEBP")
SAMPLED_BYTES = 2**28
"""Bytes of pictures of a view that its digests look at, at most."""
_BLOCK = 2**16


class LeRobotStore(EpisodeStore):
    """A LeRobotDataset v3.0 on disk.

    `views` are the camera features to use, all colour cameras (in the order of info.json) where it is None.
    Actions and states are the 1-D features `action` and `state`, several of them joined in that order;
    without `state` a state has no numbers. So have labels that none of `chosen` asks for where the folder
    lacks them. `remarks` name cameras that are passed over. Of episodes that no `chosen` names nothing is
    read. Where the tolerance is above the default, video frames are taken by number.

    Raises UserError, naming file, key, expected, found and cure, for anything missing, damaged,
    inconsistent or not finite.
    """

    def __init__(
        self,
        folder: Path,
        views: tuple[str, ...] | None = None,
        *,
        state: tuple[str, ...] = (STATE,),
        action: tuple[str, ...] = (ACTION,),
        chosen: Sequence[Chosen] = (ALL,),
    ) -> None:
        self._meta = meta = read_meta(folder, chosen)
        self._by_number = meta.tolerance > TOLERANCE
        self.parts = tuple(frozenset(np.flatnonzero(mask).tolist()) for mask, _ in meta.parts)
        self.name = str(folder)
        features, info = meta.info.features, folder / "meta" / "info.json"
        shapes, passed_over = find_cameras(features, info, views)
        self.remarks = (passed_over,) if passed_over else ()
        needed = {label: any(one.labels[label] is True for one in chosen) for label in LABELS}
        if not needed["state"]:
            state = usable(features, state)
        if not needed["actions"]:
            action = usable(features, action)
        sizes: dict[Label, dict[str, int]] = {
            "state": vector_sizes(features, info, state, "state"),
            "actions": vector_sizes(features, info, action, "action"),
        }
        self.spec = StoreSpec(
            views=tuple(shapes),
            image_shapes=tuple(shapes.values()),
            state_dim=sum(sizes["state"].values()),
            action_dim=sum(sizes["actions"].values()),
            fps=meta.info.fps,
            num_frames=int(meta.lengths[meta.kept].sum()),
            embodiment=meta.info.robot_type or "unknown",
            **describe_dimensions(features, state, "state"),
            **describe_dimensions(features, action, "action"),
        )
        self._columns, self._videos = _PictureColumns(meta), VideoReader(meta.info.fps, meta.tolerance)
        # Rows of the store are those of the episodes that are used, rows of the files those of all.
        self._file_rows = np.flatnonzero(np.repeat(meta.kept, meta.lengths))
        self._episode_of = np.repeat(np.arange(len(meta.lengths)), meta.lengths)[self._file_rows]
        numbers = read_numbers(meta, sizes, self._file_rows, self._episode_of)
        none = np.empty((len(self._file_rows), 0), np.float32)
        self.states, self.actions = (
            np.concatenate([none, *map(numbers.__getitem__, keys)], axis=1) for keys in (state, action)
        )
        self._times, self.instruction_of = numbers["timestamp"], numbers["task_index"]
        self.instructions = meta.tasks
        used = np.flatnonzero(meta.kept).tolist()
        starts = np.searchsorted(self._episode_of, used).tolist()
        self.episodes = tuple(
            Episode(index, start, int(meta.lengths[index]), meta.tasks[self.instruction_of[start]])
            for index, start in zip(used, starts, strict=True)
        )

    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures of `view` at the global frame rows, in the order asked; sorted rows are fast."""
        shape = (*self.spec.image_shapes[self.spec.views.index(view)], 3)
        out = np.empty((len(rows), *shape), dtype=np.uint8)
        order = np.argsort(rows, kind="stable")
        pictures = self._pictures(view, rows[order], shape)
        for place in order.tolist():
            try:
                out[place] = next(pictures)
            except UserError as error:
                way_out = self._meta.or_leave_out([int(self._episode_of[rows[place]])])
                raise UserError(f"{error}{way_out}") from error
        return out

    def _pictures(
        self, view: str, rows: Int64[np.ndarray, " k"], shape: tuple[int, ...]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        if view in self._meta.videos:
            return self._video(view, rows, shape)
        return self._columns.read(view, self._file_rows[rows], shape)

    def picture_digests(self) -> Digests:
        """Of the encoded pictures: all of a view up to SAMPLED_BYTES, beyond that evenly spread row groups or
        blocks of its videos, and of where each episode lies in its video.
        """
        rows = np.zeros((len(self.spec.views), self.spec.num_frames), np.uint64)
        for of_view, view in zip(rows, self.spec.views, strict=True):
            if (table := self._meta.videos.get(view)) is None:
                of_file = np.zeros(self._meta.info.total_frames, np.uint64)
                self._columns.digests(view, out=of_file)
                of_view[:] = of_file[self._file_rows]
                continue
            files = dict.fromkeys(table.paths[episode.index] for episode in self.episodes)
            content = {
                path: hashlib.sha256(sampled_bytes(path, SAMPLED_BYTES // len(files))).digest()
                for path in files
            }
            for episode in self.episodes:
                path, start = table.paths[episode.index], table.from_timestamp[episode.index]
                here = slice(episode.start, episode.end)
                # Frames are taken by time, or by number up to the end.
                end = table.to_timestamp[episode.index].tobytes() if self._by_number else b""
                of_view[here] = digest(content[path], start.tobytes(), self._times[here].tobytes() + end)
        return np.array([digest(rows[:, e.start : e.end].tobytes()) for e in self.episodes], np.uint64)

    def _video(
        self, view: str, rows: Int64[np.ndarray, " k"], shape: tuple[int, ...]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        table, episodes = self._meta.videos[view], self._episode_of[rows]
        times = table.from_timestamp[episodes] + self._times[rows]
        for episode in np.unique(episodes).tolist() if self._by_number else ():
            here = episodes == episode
            span = float(table.from_timestamp[episode]), float(table.to_timestamp[episode])
            frames = self._file_rows[rows[here]] - self._meta.starts[episode]
            times[here] = self._videos.by_number(
                table.paths[episode], span, times[here], frames, int(self._meta.lengths[episode])
            )
        begin = 0
        for end in range(1, len(rows) + 1):
            here = table.paths[episodes[begin]]
            if end == len(rows) or table.paths[episodes[end]] != here:
                for picture in self._videos.read(here, times[begin:end]):
                    if picture.shape != shape:
                        problem = f"{here}: a picture of {view} is {picture.shape}; info.json says {shape}."
                        raise data_error(problem, cure=REPAIR)
                    yield picture
                begin = end


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
                    cure=REPAIR,
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
