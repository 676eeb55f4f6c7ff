"""Reads HDF5 files of LIBERO, robomimic and ALOHA: the layout is found by keys."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tutti.data.content import digest, spans
from tutti.data.formats.chosen import REPAIR, excluding
from tutti.data.formats.errors import data_error
from tutti.data.formats.hdf5.attributes import TEXT, episode_text
from tutti.data.formats.hdf5.files import MAX_BYTES, Array, HDF5File, OpenFiles
from tutti.data.formats.hdf5.index import is_encoded, join, read_index
from tutti.data.formats.hdf5.layouts import usual
from tutti.data.formats.hdf5.paths import find_files
from tutti.data.formats.interface import EpisodeReader, Feature, Roles
from tutti.data.formats.pictures import SAMPLED_BYTES, decode_picture
from tutti.storage.reading import shown


class HDF5Reader(EpisodeReader):
    """An HDF5 file, or a folder of them, in the order of the numbers in their names.

    Keys are the paths inside of an episode, `obs/agentview_rgb`, and `language_instruction` for the text,
    which has several homes (`attributes.episode_text`). Features, sizes, rate and robot are those of the
    first episode, and the same in all. `next_obs` is never read. Pictures are bytes (T, h, w, 3), or encoded
    one by one and padded with zeros, (T, bytes); `compress_len` is not needed: a JPEG says where it ends.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._files = OpenFiles(find_files(path))
        self._index = index = read_index(self._files)
        self._contents = index.contents
        self.features = dict(index.contents.features)
        self.lengths = np.array([place.length for place in index.places], np.int64)
        self.fps, self.embodiment = index.contents.facts.fps, index.contents.facts.embodiment
        if self.texts(TEXT, int(np.argmax(self.lengths > 0)))[0]:
            self.features[TEXT] = Feature(kind="text")
        self.remarks = tuple(self._remarks())
        roles = self.roles()
        names = [
            [name for key in keys for name in self.features[key].names or ("",)]
            for keys in (roles.state, roles.action)
        ]
        self.usual = usual(*names, robot=self.embodiment)

    def roles(self) -> Roles:
        """The views in the order of their names; state, action, flip and lag as the layout and the attributes
        of the files tell."""
        layout, facts = self._contents.layout, self._contents.facts
        robots = sorted({found[1] for key in self.features if (found := re.match(r"obs/(robot\d)_", key))})
        state: tuple[str, ...] = ()
        for choice in layout.states:
            wanted = [key.format(robot=robot) for robot in robots or [""] for key in choice]
            wanted = [key for key in dict.fromkeys(wanted) if key in self.features]
            if not state and len(wanted) >= len(choice):
                state = tuple(wanted)
        reasons = dict(facts.reasons)
        if self.fps is None:
            reasons["fps"] = f"the files do not store a rate; {layout.fps}"
        if not state:
            reasons["state"] = f"none of the usual keys of {layout.name} is there"
        return Roles(
            views=tuple(key for key, feature in self.features.items() if feature.kind == "picture"),
            state=state,
            action=(layout.action,) if layout.action in self.features else (),
            text=TEXT if TEXT in self.features else None,
            flip=facts.flip,
            lag=facts.lag,
            reasons=reasons,
        )

    def numbers(self, key: str, episode: int) -> Float32[np.ndarray, "n d"]:
        """A vector, as float32; beyond its range it becomes infinite."""
        place = self._index.places[episode]
        with self._files.use(place.file) as file:
            array = self._array(file, key, episode)
            if array.row_bytes * array.shape[0] > MAX_BYTES:
                found = f"{array.row_bytes * array.shape[0]:,}"
                raise array.error(f"a vector of at most {MAX_BYTES:,} bytes in an episode", found)
            values = array.read(0, array.shape[0])
        with np.errstate(over="ignore", invalid="ignore"):
            return values.reshape(len(values), -1).astype(np.float32)

    def texts(self, key: str, episode: int) -> Sequence[str]:
        """The instruction of an episode; empty where the file has none."""
        place = self._index.places[episode]
        with self._files.use(place.file) as file:
            return (episode_text(file, place.group, self._contents.layout),)

    def pictures(
        self, key: str, episode: int, steps: Int64[np.ndarray, " k"]
    ) -> UInt8[np.ndarray, "k h w 3"]:
        """Pictures as stored: of LIBERO with the bottom row first. Steps that lie close together are read at
        once."""
        shape = (*self.features[key].shape, 3)
        out = np.empty((len(steps), *shape), np.uint8)
        for array, places, rows in self._stored(key, episode, steps):
            if len(array.shape) == 4:
                out[places] = rows
                continue
            for place, row in zip(places.tolist(), rows, strict=True):
                try:
                    out[place] = decode_picture(row.tobytes(), shape, "the first picture of the set")
                except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to
                    problem = (
                        f"{array.path}: the picture of {array.key} at step {steps[place]} cannot be read"
                    )
                    why = shown(str(error), 300, quoted=False)
                    raise data_error(f"{problem}: {why}.", cure=REPAIR) from error
        return out

    def another_reader(self) -> HDF5Reader:
        """With open files of its own."""
        other = copy.copy(self)
        other._files = OpenFiles(self._files.paths)
        return other

    def picture_files(self, key: str, episode: int) -> Sequence[Path]:
        """The file of the episode."""
        return (self._files.paths[self._index.places[episode].file],)

    def picture_digest(self, key: str, episode: int) -> int:
        """Of the pictures as stored, evenly spread steps of them where a view has over `SAMPLED_BYTES`."""
        length, shape = int(self.lengths[episode]), self.features[key].shape
        most = max(4, SAMPLED_BYTES // len(self.lengths) // (3 * shape[0] * shape[1]))
        steps = np.unique(np.linspace(0, length - 1, min(length, most)).astype(np.int64))
        return digest(*(rows.tobytes() for _, _, rows in self._stored(key, episode, steps)))

    def _stored(
        self, key: str, episode: int, steps: Int64[np.ndarray, " k"]
    ) -> Iterator[tuple[Array, np.ndarray, np.ndarray]]:
        """(array, places in `steps`, rows there as stored) until all are read; no file is held meanwhile."""
        number = self._index.places[episode].file
        with self._files.use(number) as file:
            array = self._array(file, key, episode)
        blocks = array.blocks(steps)
        while True:
            # An array of a file that was closed meanwhile, for others, holds it open itself.
            with self._files.use(number):
                if (block := next(blocks, None)) is None:
                    return
            yield array, *block

    def _array(self, file: HDF5File, key: str, episode: int) -> Array:
        """The dataset of a feature, of the episode's length and the feature's size."""
        place, feature = self._index.places[episode], self.features[key]
        if place.damage is not None:
            raise place.damage
        array = file.array(join(place.group, key))
        shape, encoded = array.shape, feature.kind == "picture" and is_encoded(array.shape, array.dtype)
        wanted = (*feature.shape, 3) if feature.kind == "picture" else feature.shape
        if shape[0] != self.lengths[episode]:
            counted = f"{self.lengths[episode]:,} steps, as {self._contents.clock} has"
            raise array.error(counted, f"{shape[0]:,}", REPAIR)
        numbers = array.dtype == np.uint8 if feature.kind == "picture" else array.dtype.kind in "biuf"
        fits = numbers and (shape[1:] or (1,)) == wanted
        if not (fits or (encoded and self._contents.layout.encoded)):
            found = f"{shape[1:]} of {array.dtype}"
            raise array.error(f"{wanted} a step, as in the first episode", found, REPAIR)
        return array

    def _remarks(self) -> Iterator[str]:
        layout, name = self._contents.layout, self.name
        if broken := [episode for episode, place in enumerate(self._index.places) if place.damage]:
            yield f"{name}: {len(broken)} of the episodes cannot be read: {excluding(broken)}"
        if passed_over := self._contents.passed_over:
            yield f"{name}: passed over, neither colour pictures nor vectors: {'; '.join(passed_over)}"
        if secret := [key for key in layout.privileged if key in self.features]:
            yield f"{name}: no part of the state, since only a simulator knows it: {', '.join(secret)}"
        if TEXT not in self.features:
            yield f"{name}: no instruction is stored; sources.text={{say: open the drawer}} gives all one"
        for mask, chosen in self._index.masks.items():
            numbers = [f"{a}-{b}" if b > a else str(a) for a, b in spans(chosen)]
            few = ", ".join(numbers[:20]) + (", ..." if len(numbers) > 20 else "")
            yield f"{name}: {mask} names {len(chosen)} episodes: sources.episodes=[{few}]"
