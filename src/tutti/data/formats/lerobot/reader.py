"""Reads LeRobotDataset folders, v2.0 to v3.0: numbers at once, checked; pictures on request."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from tutti.data.content import Digests, digest
from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.formats.chosen import ALL, REPAIR, TOLERANCE, Chosen
from tutti.data.formats.errors import data_error
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.columns import read_numbers
from tutti.data.formats.lerobot.episodes_v2 import read_v2
from tutti.data.formats.lerobot.episodes_v3 import read_v3
from tutti.data.formats.lerobot.features import (
    Feature,
    describe_dimensions,
    find_cameras,
    usable,
    vector_sizes,
)
from tutti.data.formats.lerobot.metadata import LeRobotMeta, read_info
from tutti.data.formats.lerobot.modality import columns_of, part_of, read_modality
from tutti.data.formats.lerobot.tables import TABLE_BYTES, decoded_bytes, explain_damage, open_parquet
from tutti.data.formats.lerobot.video import VideoReader
from tutti.data.formats.lerobot.video_lengths import check_videos
from tutti.data.formats.pictures import SAMPLED_BYTES, decode_picture
from tutti.errors import UserError
from tutti.storage.opened import Opened
from tutti.storage.reading import shown
from tutti.types import LABELS, Label

_BLOCK, _SMALL = 2**16, 2**12
_OPEN_FILES = 16
_OpenFile = tuple[pq.ParquetFile, Int64[np.ndarray, " g"]]
"""A data file, and where its row groups begin."""


def read_meta(folder: Path, chosen: Sequence[Chosen] = (ALL,), text: str | None = None) -> LeRobotMeta:
    """Reads and checks `folder/meta`, whatever its version; `text` names an annotation as the instruction.

    Raises: UserError that names file, key and cure.
    """
    info, modality = read_info(folder), read_modality(folder)
    read = read_v2 if info.file_an_episode else read_v3
    return read(folder, info, modality.reading(text) if text else modality, chosen)


class LeRobotStore(EpisodeStore):
    """A LeRobotDataset on disk, v2.0, v2.1 or v3.

    `views` are the camera features to use, all colour cameras (in the order of info.json) where it is None.
    Actions and states are the 1-D features `action` and `state`, several of them joined in that order;
    without `state` a state has no numbers. So have labels that none of `chosen` asks for where the folder
    lacks them. GR00T's meta/modality.json adds names of slices and cameras, and annotations, of which `text`
    names the one that is the instruction. `remarks` name cameras that are passed over, those slices, and
    videos with more frames than rows. Of episodes that no `chosen` names nothing is read. Where the tolerance
    is above the default, video frames are taken by number.

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
        text: str | None = None,
        chosen: Sequence[Chosen] = (ALL,),
    ) -> None:
        self.meta = meta = read_meta(folder, chosen, text)
        info, modality = meta.info, meta.modality
        self._by_number = meta.tolerance > TOLERANCE
        self.parts = meta.numbers
        self.name, path = str(folder), folder / "meta" / "info.json"
        named = None if views is None else tuple(map(modality.camera, views))
        shapes, passed_over = find_cameras(info.features, path, named)
        features: dict[Label, dict[str, Feature]] = {
            "state": modality.features(info.features, "state", STATE),
            "actions": modality.features(info.features, "action", ACTION),
        }
        needed = {label: any(one.labels[label] is True for one in chosen) for label in LABELS}
        if not needed["state"]:
            state = usable(features["state"], state)
        if not needed["actions"]:
            action = usable(features["actions"], action)
        sizes: dict[Label, dict[str, int]] = {
            "state": vector_sizes(features["state"], path, state, "state"),
            "actions": vector_sizes(features["actions"], path, action, "action"),
        }
        self.spec = StoreSpec(
            views=tuple(shapes),
            image_shapes=tuple(shapes.values()),
            state_dim=sum(sizes["state"].values()),
            action_dim=sum(sizes["actions"].values()),
            fps=info.fps,
            num_frames=int(meta.lengths[meta.kept].sum()),
            embodiment=info.robot_type or "unknown",
            **describe_dimensions(features["state"], state, "state"),
            **describe_dimensions(features["actions"], action, "action"),
        )
        told = (passed_over, modality.describe(), *check_videos(meta, tuple(shapes)))
        self.remarks = tuple(f"{folder}: {remark}" for remark in told if remark)
        self._columns, self._videos = _PictureColumns(meta), VideoReader(info.fps, meta.tolerance)
        # Rows of the store are those of the episodes that are used, rows of the files those of all.
        self._file_rows = np.flatnonzero(np.repeat(meta.kept, meta.lengths))
        self._episode_of = np.repeat(np.arange(len(meta.lengths)), meta.lengths)[self._file_rows]
        columns: dict[Label, dict[str, int]] = {
            label: columns_of(features[label], keys) for label, keys in sizes.items()
        }
        numbers = read_numbers(meta, columns, self._file_rows, self._episode_of)
        none = np.empty((len(self._file_rows), 0), np.float32)
        self.states, self.actions = (
            np.concatenate([none, *(part_of(features[label][key], key, numbers) for key in keys)], axis=1)
            for label, keys in sizes.items()
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
        out = np.empty((len(rows), *self.spec.image_shapes[self.spec.views.index(view)], 3), dtype=np.uint8)
        order = np.argsort(rows, kind="stable")
        for place, picture in zip(order.tolist(), self.rising(view, rows[order]), strict=True):
            out[place] = picture
        return out

    def rising(
        self, view: str, rows: Int64[np.ndarray, " k"], *, planes: bool = False
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Each is decoded when it is asked for."""
        shape = (*self.spec.image_shapes[self.spec.views.index(view)], 3)
        if view in self.meta.videos:
            pictures = self._video(view, rows, shape, planes)
        else:
            pictures = self._columns.read(view, self._file_rows[rows], shape)
        done = 0
        try:
            for picture in pictures:
                yield picture
                done += 1
        except UserError as error:
            way_out = self.meta.or_leave_out([int(self._episode_of[rows[done]])])
            raise UserError(f"{error}{way_out}") from error

    def keep_encoded(self, most: int) -> bool:
        """Row groups of the data files; of videos nothing."""
        self._columns.most = most
        return not any(view in self.meta.videos for view in self.spec.views)

    def another_reader(self) -> LeRobotStore:
        """With open files of its own."""
        other = copy.copy(self)
        other._columns = self._columns.another()
        other._videos = VideoReader(self.meta.info.fps, self.meta.tolerance)
        return other

    def picture_files(self, view: str, rows: Int64[np.ndarray, " k"]) -> Iterable[Path]:
        """The videos of the episodes, or the data files with the rows."""
        if (table := self.meta.videos.get(view)) is None:
            return self._columns.files(self._file_rows[rows])
        return [table.paths[episode] for episode in np.unique(self._episode_of[rows]).tolist()]

    def picture_digests(self) -> Digests:
        """Of the encoded pictures: all of a view up to SAMPLED_BYTES, beyond that evenly spread row groups or
        blocks of its videos, and of where each episode lies in its video.
        """
        rows = np.zeros((len(self.spec.views), self.spec.num_frames), np.uint64)
        for of_view, view in zip(rows, self.spec.views, strict=True):
            if (table := self.meta.videos.get(view)) is None:
                of_file = np.zeros(self.meta.info.total_frames, np.uint64)
                self._columns.digests(view, out=of_file)
                of_view[:] = of_file[self._file_rows]
                continue
            files = dict.fromkeys(table.paths[episode.index] for episode in self.episodes)
            most = SAMPLED_BYTES // len(files)
            # Where each episode is a file these may be many thousands, of which large blocks would be all.
            block = min(_BLOCK, max(_SMALL, most // 4)) if self.meta.info.file_an_episode else _BLOCK
            content = {path: hashlib.sha256(sampled_bytes(path, most, block)).digest() for path in files}
            for episode in self.episodes:
                path, start = table.paths[episode.index], table.from_timestamp[episode.index]
                here = slice(episode.start, episode.end)
                # Frames are taken by time, or by number up to the end.
                end = table.to_timestamp[episode.index].tobytes() if self._by_number else b""
                of_view[here] = digest(content[path], start.tobytes(), self._times[here].tobytes() + end)
        return np.array([digest(rows[:, e.start : e.end].tobytes()) for e in self.episodes], np.uint64)

    def _video(
        self, view: str, rows: Int64[np.ndarray, " k"], shape: tuple[int, ...], planes: bool
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        table, episodes = self.meta.videos[view], self._episode_of[rows]
        times = table.from_timestamp[episodes] + self._times[rows]
        for episode in np.unique(episodes).tolist() if self._by_number else ():
            here = episodes == episode
            span = float(table.from_timestamp[episode]), float(table.to_timestamp[episode])
            frames = self._file_rows[rows[here]] - self.meta.starts[episode]
            times[here] = self._videos.by_number(
                table.paths[episode], span, times[here], frames, int(self.meta.lengths[episode])
            )
        begin = 0
        for end in range(1, len(rows) + 1):
            here = table.paths[episodes[begin]]
            if end == len(rows) or table.paths[episodes[end]] != here:
                for picture in self._videos.read(here, times[begin:end], planes):
                    if picture.shape != shape:
                        problem = f"{here}: a picture of {view} is {picture.shape}; info.json says {shape}."
                        raise data_error(problem, cure=REPAIR)
                    yield picture
                begin = end


class _PictureColumns:
    """PNG (or other) pictures inside the data files; keeps the row groups it read last, encoded, at least one
    of each view and more up to `most` bytes in all, and a few open files: there may be one for each of many
    thousand episodes."""

    most = 0

    def __init__(self, meta: LeRobotMeta) -> None:
        self._paths = meta.data_files
        self._file = self._opened()
        if meta.info.file_an_episode:
            rows = meta.lengths
        else:
            rows = np.array([self._file[number][1][-1] for number in range(len(self._paths))])
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        meta.info.check_total("frames", int(self._starts[-1]), meta.folder / "data")
        self._used = np.unique(np.repeat(np.arange(len(rows)), rows)[np.repeat(meta.kept, meta.lengths)])
        self._shapes = {view: feature.shape for view, feature in meta.info.features.items()}
        self._last = OrderedDict[tuple[str, int, int], pa.Array]()

    def another(self) -> _PictureColumns:
        """The same with nothing open, for another thread."""
        other = copy.copy(self)
        other._file, other._last = self._opened(), OrderedDict()
        return other

    def files(self, rows: Int64[np.ndarray, " k"]) -> list[Path]:
        """The files of these rows."""
        numbers = np.unique(np.searchsorted(self._starts, rows, side="right") - 1)
        return [self._paths[number] for number in numbers.tolist()]

    def digests(self, view: str, out: Digests) -> None:
        """Writes a digest of each row's encoded picture; rows of groups beyond the sample keep their 0."""
        groups = [
            (number, group, decoded_bytes(self._file[number][0], [view], group))
            for number in self._used.tolist()
            for group in range(len(self._file[number][1]) - 1)
        ]
        stride = max(1, math.ceil(sum(size for *_, size in groups) / SAMPLED_BYTES))
        for number, group, _ in groups[::stride]:
            begin = self._starts[number] + self._file[number][1][group]
            for row, content in enumerate(self._encoded(view, number, group), begin):
                out[row] = digest(content.as_py() or b"")

    def read(
        self, view: str, rows: Int64[np.ndarray, " k"], shape: tuple[int, ...]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures at ascending `rows`. One of another size than `shape` (h, w, 3) is not decoded."""
        files = np.searchsorted(self._starts, rows, side="right") - 1
        for row, number in zip(rows.tolist(), files.tolist(), strict=True):
            begins, local = self._file[number][1], row - int(self._starts[number])
            group = int(np.searchsorted(begins, local, side="right")) - 1
            try:
                content = self._encoded(view, number, group)[local - begins[group]].as_py()
                if content is None:
                    raise OSError("the picture has no bytes")
                picture = decode_picture(content, shape, "meta/info.json")
            except UserError:
                raise
            except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to
                raise data_error(
                    f"{self._paths[number]}: the picture of {view} in frame row {row} cannot be read: "
                    f"{shown(str(error), 300, quoted=False)}.",
                    cure=REPAIR,
                ) from error
            yield picture

    def _opened(self) -> Opened[int, _OpenFile]:
        """The data files, and where the row groups of each begin, its length last; none is open yet."""
        paths = self._paths

        def opens(number: int) -> _OpenFile:
            with explain_damage(paths[number]):
                metadata = (file := open_parquet(paths[number])).metadata
                rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            return file, np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

        return Opened(opens, _OPEN_FILES, lambda opened: opened[0].close())

    def _encoded(self, view: str, number: int, group: int) -> pa.Array:
        """The encoded pictures of a row group."""
        key = view, number, group
        if key not in self._last:
            path = self._paths[number]
            file, begins = self._file[number]
            with explain_damage(path):
                size, rows = decoded_bytes(file, [view], group), int(begins[group + 1] - begins[group])
                if size > TABLE_BYTES + 2 * rows * (math.prod(self._shapes[view]) + 2**12):
                    raise data_error(f"{path}: the pictures of {view} take {size:,} bytes in {rows} rows.")
                table = file.read_row_group(group, columns=[view], use_threads=False)
                column = table[view].combine_chunks()
                encoded = column.field("bytes") if pa.types.is_struct(column.type) else column
                if not pa.types.is_binary(encoded.type):
                    raise data_error(f"{path}: {view} holds {encoded.type}.", expected="encoded pictures")
            self._last[key] = encoded
            kept = sum(one.nbytes for one in self._last.values())
            while kept > self.most and len(self._last) > len({one[0] for one in self._last}):
                kept -= self._last.popitem(last=False)[1].nbytes
        self._last.move_to_end(key)
        return self._last[key]


def sampled_bytes(path: Path, most: int, block: int = _BLOCK) -> bytes:
    """A file's content; its size and evenly spread blocks, at least four, where it is larger than `most`."""
    size = path.stat().st_size
    count = max(4, most // block)
    with path.open("rb") as file:
        if size <= count * block:
            return file.read()
        parts = [size.to_bytes(8, "little")]
        for place in np.linspace(0, size - block, count).astype(np.int64).tolist():
            file.seek(place)
            parts.append(file.read(block))
    return b"".join(parts)
