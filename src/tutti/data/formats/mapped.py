"""MappedStore: an EpisodeStore of any format's reader, by what a source says each feature is for."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tutti.data.content import Digests, digest
from tutti.data.conventions.config import NOTHING_SAID
from tutti.data.episodes import VECTORS, EpisodeStore, StoreSpec, Vector
from tutti.data.formats.chosen import ALL, MAX_TEXT, WITHOUT_TEXT, Chosen, Selection, excluding
from tutti.data.formats.dimensions import joined_dimensions
from tutti.data.formats.errors import data_error
from tutti.data.formats.index import read_once
from tutti.data.formats.interface import MAX_FPS, MIN_FPS, EpisodeReader, Flip
from tutti.data.formats.pictures import resized
from tutti.data.formats.wanted import AS_FOUND, Wanted, guesses, missing, settle
from tutti.errors import UserError
from tutti.storage.reading import shown
from tutti.types import LABELS


class MappedStore(EpisodeStore):
    """A data set of any format: its reader's features in the roles that `wanted` or the reader gives them.

    Numbers are read once, pictures on request. With a lag of k, row t of an episode has the observation t and
    the action t + k: the first k actions, which no observation precedes, and the last k observations go.
    Pictures are turned upright here, so that everything above sees them as the camera does. Views are called
    by their keys with dots for slashes. Labels that none of `chosen` asks for may be missing.

    With the `path` that the reader reads, a large set has an index below `home`, the folder of caches, so
    that its numbers are read by one process (`read_once`).

    Raises: UserError, naming the data set, feature, episode and the way out, for anything missing, damaged
    or not finite.
    """

    def __init__(
        self,
        reader: EpisodeReader,
        wanted: Wanted = AS_FOUND,
        chosen: Sequence[Chosen] = (ALL,),
        kind: str = "",
        *,
        path: Path | None = None,
        home: Path | None = None,
    ) -> None:
        self.name, self.format, self._reader = reader.name, kind, reader
        self.roles = roles = settle(wanted, reader.roles(), reader.features, reader.name)
        self.remarks = (*reader.remarks, *(f"{reader.name}: {line}" for line in guesses(roles).values()))
        self.conventions, self.usual = known, _ = reader.conventions, reader.usual
        for vector in VECTORS:
            keys, told = getattr(roles, vector), getattr(known, vector)
            if told != getattr(NOTHING_SAID, vector) and keys != getattr(reader.roles(), vector):
                nothing = {vector: getattr(NOTHING_SAID, vector)}
                self.conventions = self.conventions.model_copy(update=nothing)
                line = f"sources.{vector} names other features than {reader.name}'s conventions are of"
                self.remarks += (f"{line}, which are left out",)
        if any(getattr(roles, vector) != getattr(reader.roles(), vector) for vector in VECTORS):
            self.usual = NOTHING_SAID
        if not roles.views:
            raise missing(reader.name, "views", reader.features)
        self.is_pairs = reader.is_pairs
        if self.is_pairs and len(roles.views) > 1:
            problem = f"{reader.name}: sources.views names {', '.join(roles.views)}; a pair has one picture."
            raise data_error(problem, cure="name one of them.")
        could = ("text",) if self.is_pairs else LABELS
        needed = {
            label: label in could and any(one.labels[label] is True for one in chosen) for label in LABELS
        }
        for field, label in (*VECTORS.items(), ("text", "text")):
            told = {"state": wanted.state == (), "text": wanted.say is not None}.get(field, False)
            if needed[label] and not getattr(roles, field) and not told:
                raise missing(reader.name, field, reader.features)
        self._used = Selection.of(chosen, len(reader.lengths), reader.name)
        self.parts = self._used.masks
        lengths = reader.lengths - roles.lag
        self._check_lengths(lengths)
        used = np.flatnonzero(self._used.kept)
        ends = np.cumsum(lengths[used])
        starts = ends - lengths[used]
        self._bounds = used, starts, lengths[used]
        self._episode_of = np.repeat(used, lengths[used])
        self._frames = np.arange(len(self._episode_of)) - np.repeat(starts, lengths[used])
        self._keys = {key.replace("/", "."): key for key in roles.views}
        if len(self._keys) < len(roles.views):
            raise data_error(f"{reader.name}: two views have one name: {', '.join(roles.views)}.")
        self.spec = self._describe(wanted.fps)
        self._answer = wanted.answer
        read_once(
            self,
            lambda: self._read(wanted.say),
            path=path or Path(reader.name),
            home=home if path else None,
            asked=(kind, wanted, roles, tuple(chosen)),
            episodes=self._bounds,
            arrays=("states", "actions", "instruction_of", "answer_of"),
            texts=("instructions", "answers"),
        )

    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures of `view` at the global frame rows, in the order asked; sorted rows are fast."""
        shape = self.spec.image_shapes[self.spec.views.index(view)]
        if self.is_pairs:
            return np.stack([resized(picture, shape[0]) for picture in self.rising(view, rows)])
        out = np.empty((len(rows), *shape, 3), dtype=np.uint8)
        each, place = np.unique(rows, return_inverse=True)
        rising = np.array_equal(each, rows)
        begins = np.flatnonzero(np.diff(self._episode_of[each], prepend=-1)).tolist()
        for begin, end in pairwise([*begins, len(each)]):
            episode = int(self._episode_of[each[begin]])
            steps = self._frames[each[begin:end]]
            with self._way_out(episode):
                pictures = self._reader.pictures(self._keys[view], episode, steps)
                if pictures.shape != (len(steps), *shape, 3) or pictures.dtype != np.uint8:
                    raise data_error(
                        f"{self.name}: the pictures of {self._keys[view]} in episode {episode} are "
                        f"{pictures.dtype} {list(pictures.shape)}.",
                        expected=f"uint8 {[len(steps), *shape, 3]}",
                    )
            turned = upright(pictures, self.roles.flip)
            if rising:  # as a cache asks; a copy of large pictures costs as much as decoding them
                out[begin:end] = turned
            else:
                here = (place >= begin) & (place < end)
                out[here] = turned[place[here] - begin]
        return out

    def rising(
        self, view: str, rows: Int64[np.ndarray, " k"], *, planes: bool = False
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures one by one; those of pairs in their own sizes."""
        if not self.is_pairs:
            yield from super().rising(view, rows)
            return
        for episode, step in zip(self._episode_of[rows].tolist(), self._frames[rows], strict=True):
            with self._way_out(episode):
                pictures = self._reader.pictures(self._keys[view], episode, step[None])
            yield upright(pictures, self.roles.flip)[0]

    def another_reader(self) -> MappedStore | None:
        """With another reader of the same files, if the format has one."""
        if (reader := self._reader.another_reader()) is None:
            return None
        other = copy.copy(self)
        other._reader = reader
        return other

    def picture_files(self, view: str, rows: Int64[np.ndarray, " k"]) -> Iterator[Path]:
        """As the reader tells of the episodes."""
        for episode in np.unique(self._episode_of[rows]).tolist():
            yield from self._reader.picture_files(self._keys[view], episode)

    def picture_digests(self) -> Digests:
        """Of the pictures as the reader digests them, and of how they are turned and paired."""
        paired = f"{self.roles.flip} {self.roles.lag}".encode()
        found: list[int] = []
        for episode in self.episodes:
            with self._way_out(episode.index):
                each = [self._reader.picture_digest(key, episode.index) for key in self._keys.values()]
            found.append(digest(paired, *(one.to_bytes(8, "little") for one in each)))
        return np.array(found, np.uint64)

    @contextmanager
    def _way_out(self, episode: int) -> Iterator[None]:
        """Says how to leave an episode out that cannot be read."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{error}{self._used.or_leave_out([episode])}") from error

    def _check_lengths(self, lengths: Int64[np.ndarray, " e"]) -> None:
        least = 1 if self.is_pairs else 2
        short = np.flatnonzero(self._used.kept & (lengths < least)).tolist()
        if short:
            for key in (*self.roles.action, *self.roles.state):
                if not self._reader.lengths[short[0]]:  # the reader says why
                    with self._way_out(short[0]):
                        self._reader.numbers(key, short[0])
            lag = f" of which sources.lag={self.roles.lag} takes {self.roles.lag}" * bool(self.roles.lag)
            raise data_error(
                f"{self.name}: episode {short[0]} has {self._reader.lengths[short[0]]} steps{lag}.",
                expected=f"{least} or more",
                cure=f"leave short episodes out: {excluding(short)}",
            )

    def _read(self, said: str | None) -> None:
        """States, actions and instructions, those stored or what is `said`, row by row of the episodes that
        are used. One episode is read behind the other, since in many formats its features lie together.
        """
        features, total = self._reader.features, len(self._episode_of)
        # An action belongs to the observation that it was chosen by, `lag` steps before it.
        firsts: dict[Vector, int] = {"state": 0, "action": self.roles.lag}
        columns = {
            vector: {key: np.empty((total, features[key].shape[0]), np.float32) for key in keys}
            for vector, keys in (("state", self.roles.state), ("action", self.roles.action))
        }
        known: dict[str, int] = {}
        replies: dict[str, int] = {}
        self.instruction_of, self.answer_of = np.zeros((2, total), np.int64)
        used, starts, lengths = (many.tolist() for many in self._bounds)
        for episode, start, length in zip(used, starts, lengths, strict=True):
            end = start + length
            with self._way_out(episode):
                for vector, first in firsts.items():
                    for key, rows in columns[vector].items():
                        values = self._numbers(key, episode, end - start)
                        rows[start:end] = values[first : first + end - start]
                texts = self._texts(self.roles.text, episode, end - start) if said is None else [said]
                reply = self._texts(self._answer, episode, end - start)[0].strip()
                self.answer_of[start:end] = replies.setdefault(reply, len(replies))
            numbers = [known.setdefault(text, len(known)) for text in texts]
            self.instruction_of[start:end] = numbers if len(numbers) > 1 else numbers[0]
        for vector, first in firsts.items():
            at = {"episode_of": self._episode_of, "frames": self._frames + first, "rows": np.arange(total)}
            for key, rows in columns[vector].items():
                self._used.check_finite(f"{self.name}: {key}", VECTORS[vector], rows, **at)
        none = np.empty((total, 0), np.float32)
        self.states, self.actions = (
            np.concatenate([none, *columns[vector].values()], axis=1) for vector in VECTORS
        )
        self.instructions = tuple(known)
        self.answers = tuple(replies) if self._answer is not None else ()
        self._used.check_spoken(self.name, self.instructions, self.instruction_of, self._episode_of)

    def _numbers(self, key: str, episode: int, steps: int) -> Float32[np.ndarray, "n d"]:
        values = self._reader.numbers(key, episode)
        expected = (steps + self.roles.lag, self._reader.features[key].shape[0])
        if values.shape != expected:
            raise data_error(
                f"{self.name}: {key} of episode {episode} is {list(values.shape)}.",
                expected=f"{list(expected)}, a row for each step",
            )
        return values

    def _describe(self, wanted_fps: float | None) -> StoreSpec:
        reader, features, roles = self._reader, self._reader.features, self.roles
        fps = reader.fps if wanted_fps is None else wanted_fps
        if self.is_pairs:
            fps = math.inf  # a picture takes no time
        elif fps is None:
            raise without_rate(self.name)
        elif not MIN_FPS <= fps <= MAX_FPS:
            raise data_error(f"{self.name}: {fps:g} steps a second.", expected=f"{MIN_FPS:g} to {MAX_FPS:g}")
        named: dict[str, tuple[str, ...]] = {}
        for vector in VECTORS:
            keys: tuple[str, ...] = getattr(roles, vector)
            named |= joined_dimensions(
                {key: features[key].shape[0] for key in keys},
                {key: features[key].names for key in keys},
                {key: features[key].units for key in keys},
                vector,
            )
        return StoreSpec(
            views=tuple(self._keys),
            image_shapes=tuple((features[key].shape[0], features[key].shape[1]) for key in roles.views),
            state_dim=sum(features[key].shape[0] for key in roles.state),
            action_dim=sum(features[key].shape[0] for key in roles.action),
            fps=float(fps),
            num_frames=len(self._episode_of),
            embodiment=reader.embodiment,
            **named,
        )

    def _texts(self, key: str | None, episode: int, steps: int) -> Sequence[str]:
        """The instruction of an episode, or those of its rows; "" where there is none."""
        if key is None:
            return [""]
        texts = self._reader.texts(key, episode)
        if len(texts) not in (1, steps + self.roles.lag):
            raise data_error(
                f"{self.name}: {key} of episode {episode} has {len(texts)} texts.",
                expected=f"one, or one for each of {steps + self.roles.lag} steps",
            )
        if long := [text for text in texts if len(text) > MAX_TEXT]:
            raise data_error(
                f"{self.name}: {key} of episode {episode} holds no instruction.",
                expected=f"texts of 1 to {MAX_TEXT} characters",
                found=f"{len(long[0]):,} characters: {shown(long[0])}",
                cure=f"{WITHOUT_TEXT}.",
            )
        return texts if len(texts) == 1 else texts[:steps]


def upright(pictures: UInt8[np.ndarray, "k h w 3"], flip: Flip) -> UInt8[np.ndarray, "k h w 3"]:
    """Pictures as the camera gives them, from how they are stored (`Roles.flip`)."""
    if flip == "none":
        return pictures
    return pictures[:, ::-1, ::-1] if flip == "turned" else pictures[:, ::-1]


def without_rate(name: str) -> UserError:
    """The error for a data set whose rate nothing tells."""
    return data_error(
        f"{name}: the data set does not say how many steps there are in a second.",
        expected="sources.fps",
        cure="give the rate of the recording, such as sources.fps=20 (LIBERO and robomimic 20, ALOHA 50, "
        "BridgeData 5, DROID 15).",
    )
