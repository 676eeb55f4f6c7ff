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
from jaxtyping import Float64, Int64, UInt8

from tutti.data.content import Digests, digest
from tutti.data.episodes import EpisodeStore, StoreSpec
from tutti.data.formats.chosen import ALL, REPAIR, TOLERANCE, Chosen
from tutti.data.formats.errors import data_error
from tutti.data.formats.index import read_once
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.columns import lengths_of_files, opened_files, read_numbers
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
from tutti.data.formats.lerobot.tables import TABLE_BYTES, decoded_bytes, explain_damage
from tutti.data.formats.lerobot.video import VideoReader
from tutti.data.formats.lerobot.video_lengths import check_videos
from tutti.data.formats.pictures import BLOCK, SAMPLED_BYTES, decode_picture, sampled_bytes
from tutti.errors import UserError
from tutti.storage.reading import shown
from tutti.types import LABELS, Label

_SMALL = 2**12


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
    is above the default, video frames are taken by number. Below `home`, the folder of caches, a large set
    has an index, so that its files are read by one process (`read_once`).

    Raises UserError, naming file, key, expected, found and cure, for anything missing, damaged,
    inconsistent or not finite.
    """

    _file_rows: Int64[np.ndarray, " n"]
    _episode_of: Int64[np.ndarray, " n"]
    _times: Float64[np.ndarray, " n"]
    _length_of_files: Int64[np.ndarray, " f"]

    def __init__(
        self,
        folder: Path,
        views: tuple[str, ...] | None = None,
        *,
        state: tuple[str, ...] = (STATE,),
        action: tuple[str, ...] = (ACTION,),
        text: str | None = None,
        chosen: Sequence[Chosen] = (ALL,),
        home: Path | None = None,
    ) -> None:
        self.meta = meta = read_meta(folder, chosen, text)
        info, modality = meta.info, meta.modality
        self._by_number = meta.tolerance > TOLERANCE
        self.parts = meta.masks
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
        self._videos = VideoReader(info.fps, meta.tolerance)
        used = np.flatnonzero(meta.kept)
        lengths = meta.lengths[used]
        starts = np.cumsum(lengths) - lengths

        def read() -> None:
            self._length_of_files = lengths_of_files(meta)
            self._columns = _PictureColumns(meta, self._length_of_files)
            # Rows of the store are those of the episodes that are used, rows of the files those of all.
            self._file_rows = np.flatnonzero(np.repeat(meta.kept, meta.lengths))
            self._episode_of = np.repeat(used, lengths)
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

        asked, names = (views, state, action, text, tuple(chosen)), ("states", "actions", "instruction_of")
        arrays = (*names, "_times", "_file_rows", "_episode_of", "_length_of_files")
        self.instructions, episodes = meta.tasks, (used, starts, lengths)
        read_once(self, read, path=folder, home=home, asked=asked, episodes=episodes, arrays=arrays)
        self._columns = _PictureColumns(meta, self._length_of_files)

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
        episodes = self._episode_of[rows]
        # Not sorted: of all rows of a large data set that takes seconds.
        begins = np.append(True, episodes[1:] != episodes[:-1])[: len(rows)]
        return dict.fromkeys(table.paths[episode] for episode in episodes[begins].tolist())

    def picture_digests(self) -> Digests:
        """Of the encoded pictures: all of a view up to SAMPLED_BYTES, beyond that evenly spread row groups or
        blocks of its videos, and of where each episode lies in its video.
        """
        rows = np.zeros((len(self.spec.views), self.spec.num_frames), np.uint64)
        for of_view, view in zip(rows, self.spec.views, strict=True):
            if (table := self.meta.videos.get(view)) is None:
                of_file = np.zeros(self.meta.info.total_frames, np.uint64)
                self._columns.digests(view, self._file_rows, out=of_file)
                of_view[:] = of_file[self._file_rows]
                continue
            files = dict.fromkeys(table.paths[episode.index] for episode in self.episodes)
            most = SAMPLED_BYTES // len(files)
            # Where each episode is a file these may be many thousands, of which large blocks would be all.
            block = min(BLOCK, max(_SMALL, most // 4)) if self.meta.info.file_an_episode else BLOCK
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

    def __init__(self, meta: LeRobotMeta, lengths: Int64[np.ndarray, " f"]) -> None:
        self._paths = meta.data_files
        self._file = opened_files(meta.data_files)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._shapes = {view: feature.shape for view, feature in meta.info.features.items()}
        self._last = OrderedDict[tuple[str, int, int], pa.Array]()

    def another(self) -> _PictureColumns:
        """The same with nothing open, for another thread."""
        other = copy.copy(self)
        other._file, other._last = opened_files(self._paths), OrderedDict()
        return other

    def files(self, rows: Int64[np.ndarray, " k"]) -> list[Path]:
        """The files of these rows."""
        numbers = np.unique(np.searchsorted(self._starts, rows, side="right") - 1)
        return [self._paths[number] for number in numbers.tolist()]

    def digests(self, view: str, rows: Int64[np.ndarray, " k"], out: Digests) -> None:
        """Writes a digest of each row's encoded picture, of files that have some of `rows`; rows of groups
        beyond the sample keep their 0."""
        groups = [
            (number, group, decoded_bytes(self._file[number][0], [view], group))
            for number in np.unique(np.searchsorted(self._starts, rows, side="right") - 1).tolist()
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
