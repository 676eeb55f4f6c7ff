"""Reads RLDS episodes from TFDS version folders: tfrecord, and array_record where its package is there."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tutti.data.content import digest
from tutti.data.formats.interface import EpisodeReader, Feature, Roles
from tutti.data.formats.pictures import decode_picture, picture_size
from tutti.data.formats.rlds.example import Record
from tutti.data.formats.rlds.features import Stored, read_features
from tutti.data.formats.rlds.index import EpisodeIndex
from tutti.data.formats.rlds.info import choose_splits, read_info, shards, version_folder
from tutti.data.formats.rlds.presets import GUESSED, choose_roles, cut, find_preset
from tutti.errors import UserError
from tutti.storage.reading import shown

MAX_VALUES = 2**27
"""Most numbers of one key of an episode."""
_SHOWN = 12


class RldsReader(EpisodeReader):
    """An RLDS set: `folder` is a TFDS version folder, or the one above it, of which the highest is read.

    `split` names a split, or "all"; without it train is read, or all splits where none is called that.
    Keys are those of the features, joined by "/" and without "steps/": `observation/image`; a feature
    outside of the steps has one value for all of them. `preset` tells what is known of the set, `conventions`
    what of that tells of the numbers of its action. Where the index takes long it is kept in `cache`.

    Raises: UserError as EpisodeReader says.
    """

    def __init__(self, folder: Path, *, split: str | None = None, cache: Path | None = None) -> None:
        self.name, folder = str(folder), version_folder(folder)
        info = read_info(folder)
        splits, remark = choose_splits(info, split, folder / "dataset_info.json")
        self._stored, self._clock, passed_over = read_features(folder)
        self._index = EpisodeIndex(shards(folder, info, splits), info.fileFormat, self._clock, cache)
        self.lengths = self._index.steps
        self._last: tuple[int, Record] | None = None
        self._views: dict[str, Any] = {}
        features = {name: self._feature(one) for name, one in self._stored.items()}
        self.features = features
        preset = find_preset(info.name)
        self._roles, self.preset = choose_roles(info.name, preset, features)
        for key in (*self._roles.state, *self._roles.action):
            part = cut(key)[1]
            if part.stop is not None:
                features[key] = Feature(kind="vector", shape=(part.stop - part.start,))
        action_dim = sum(features[key].shape[0] for key in self._roles.action)
        self.conventions = self.preset.conventions(action_dim)
        by_name = preset is None or "action" in self._roles.reasons
        source = "guessed: by the names of the features" if by_name else f"by the preset of {info.name}"
        order = "".join(f"; guessed: {GUESSED[one]}" for one in {self.preset.rotation} & GUESSED.keys())
        lines = dict(self.conventions.lines())
        self.told_by = {key: source + order * (key == "action.rotation") for key in lines}
        self.fps, self.embodiment = self.preset.fps, self.preset.robot
        rate = f"{self.fps:g} Hz" if self.fps else "unknown rate"
        known = f"known as {info.name}: {self.embodiment}, {rate}"
        reasons: dict[str, list[str]] = {}
        for key, why in passed_over.items():
            reasons.setdefault(why, []).append(key)
        lines = [f"passed over: {', '.join(keys[:_SHOWN])}: {why}" for why, keys in reasons.items()]
        lines = [remark, known * bool(preset), *self.preset.remarks, *lines]
        self.remarks = tuple(f"{self.name}: {line}" for line in lines if line)

    def roles(self) -> Roles:
        """By the preset of the set's name, else by usual names."""
        return self._roles

    def numbers(self, key: str, episode: int) -> Float32[np.ndarray, "n d"]:
        """Integers and float64 become float32; NaN where an optional feature is missing."""
        key, part = cut(key)
        stored, record, steps = self._stored[key], self._record(episode), int(self.lengths[episode])
        count = steps if stored.of_steps else 1
        if count * stored.size > MAX_VALUES:
            found = f"{count:,} times {stored.size:,}"
            raise record.wrong(f"{key} has too many numbers", f"{MAX_VALUES:,} or fewer", found)
        out = np.full((count, stored.size), np.nan, np.float32)
        if stored.storage == "numbers":
            kind = "float_list" if stored.dtype.kind == "f" else "int64_list"
            values = record.values(stored.key, kind, count * stored.size, optional=stored.optional)
            if values is not None:
                found = np.array(values, np.float32 if kind == "float_list" else np.int64)
                if stored.dtype.kind == "u" and stored.dtype.itemsize == 8:
                    found = found.view(np.uint64)
                out[:] = found.reshape(out.shape)
        else:
            arrays = record.values(stored.key, "bytes_list", count, optional=stored.optional)
            for row, array in zip(out, arrays or (), strict=False):
                row[:] = self._array(record, stored, array)
        return out[:, part] if stored.of_steps else np.repeat(out[:, part], steps, axis=0)

    def texts(self, key: str, episode: int) -> Sequence[str]:
        """UTF-8, code points, or the names of classes; "" where an optional text is missing."""
        stored, record = self._stored[key], self._record(episode)
        count = int(self.lengths[episode]) if stored.of_steps else 1
        kind = "bytes_list" if stored.storage == "text" else "int64_list"
        values = record.values(stored.key, kind, count * stored.size, optional=stored.optional)
        if values is None:
            return [""] * count
        try:
            if stored.storage == "text":
                return [text.decode("utf-8") for text in values]
            numbers = np.array(values, np.int64)
            if stored.storage == "class":  # -1 stands for no class
                names = np.array([*stored.classes, ""], object)
                if not ((numbers >= -1) & (numbers < len(stored.classes))).all():
                    raise ValueError(f"a class beyond {len(stored.classes)}")
                return names[numbers].tolist()
            rows = numbers.reshape(count, stored.size).tolist()
            texts = ["".join(map(chr, row)).partition("\0")[0] for row in rows]
            for text in texts:  # half of a surrogate pair is no text
                text.encode("utf-8")
            return texts
        except (ValueError, OverflowError) as error:
            raise record.wrong(f"{key} is no text", "UTF-8, code points or classes", shown(error)) from None

    def pictures(
        self, key: str, episode: int, steps: Int64[np.ndarray, " k"]
    ) -> UInt8[np.ndarray, "k h w 3"]:
        """PNG, JPEG or WEBP by what they begin with, else the pixels themselves."""
        record, stored = self._record(episode), self._stored[key]
        height, width = self.features[key].shape
        shape = (height, width, 3)
        values = self._encoded(key, episode)
        out = np.empty((len(steps), *shape), np.uint8)
        for place, step in enumerate(steps.tolist()):
            row = step if stored.of_steps else 0
            try:
                if stored.storage == "numbers":
                    out[place] = values[row * stored.size : (row + 1) * stored.size].reshape(shape)
                elif stored.storage != "file":
                    out[place] = self._array(record, stored, values[row]).reshape(shape)
                elif len(values[row]) == out[place].size and not _is_file(values[row]):
                    out[place] = np.frombuffer(values[row], np.uint8).reshape(shape)
                else:
                    out[place] = decode_picture(values[row], shape, "features.json")
            except UserError:
                raise
            except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to
                why = shown(str(error), 300, quoted=False)
                raise record.wrong(f"the picture {key} of step {step} cannot be read: {why}") from error
        return out

    def another_reader(self) -> RldsReader:
        """With a last record of its own."""
        other = copy.copy(self)
        other._last, other._views = None, {}
        return other

    def picture_files(self, key: str, episode: int) -> Sequence[Path]:
        """The shard of the episode."""
        return (self._index.path(episode),)

    def picture_digest(self, key: str, episode: int) -> int:
        """Of the checksum that is stored for the whole record; with array_record, of the stored pictures."""
        place = self._index.place(episode)
        if place.checksum < 0:
            return digest(self._record(episode).stored(self._stored[key].key))
        return digest(key.encode(), np.array([place.length, place.checksum], np.int64).tobytes())

    def _record(self, episode: int) -> Record:
        """The record of an episode, the last one kept."""
        if self._last is None or self._last[0] != episode:
            content = self._index.read(episode)
            record = Record(content, f"{self._index.path(episode)}: episode {episode}")
            record.values(self._clock, "int64_list", int(self.lengths[episode]))
            self._last, self._views = (episode, record), {}
        return self._last[1]

    def _encoded(self, key: str, episode: int) -> Any:
        """The pictures of an episode as they are stored."""
        record, stored = self._record(episode), self._stored[key]
        if key not in self._views:
            count = int(self.lengths[episode]) if stored.of_steps else 1
            raw = stored.storage == "numbers"
            kind, size = ("int64_list", count * stored.size) if raw else ("bytes_list", count)
            values = record.values(stored.key, kind, size)
            if raw:
                numbers = np.array(values, np.int64)
                if not ((numbers >= 0) & (numbers < 256)).all():
                    raise record.wrong(f"{key} has pixels beyond 8 bits", "0 to 255", numbers.max())
                self._views[key] = numbers.astype(np.uint8)
            else:
                self._views[key] = list(values or ())
        return self._views[key]

    def _array(self, record: Record, stored: Stored, content: bytes) -> np.ndarray:
        """The numbers of an array that is stored as bytes."""
        size = stored.size * stored.dtype.itemsize
        if stored.storage == "zlib":
            unpacker = zlib.decompressobj()
            try:
                content = unpacker.decompress(content, size + 1)
            except zlib.error as error:
                raise record.wrong(f"{stored.name} is damaged", "zlib", error) from None
        if len(content) != size:
            raise record.wrong(f"{stored.name} has {len(content):,} bytes", f"{size:,}, by features.json")
        return np.frombuffer(content, stored.dtype)

    def _feature(self, stored: Stored) -> Feature:
        if stored.kind == "text":
            return Feature(kind="text")
        if stored.kind == "vector":
            return Feature(kind="vector", shape=(stored.size,))
        return Feature(kind="picture", shape=self._picture_size(stored))

    def _picture_size(self, stored: Stored) -> tuple[int, int]:
        """By features.json, else that of the first picture."""
        filled = np.flatnonzero(self.lengths)
        if 0 not in stored.shape or not len(filled):
            height, width = stored.shape
            return height, width
        episode = int(filled[0])
        content, record = self._encoded(stored.name, episode)[0], self._record(episode)
        try:
            return picture_size(content)
        except Exception as error:
            raise record.wrong(f"the picture {stored.name} of step 0 cannot be read: {error}") from error


def _is_file(content: bytes) -> bool:
    """Whether it begins as a PNG, JPEG or WEBP."""
    return content.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"))
