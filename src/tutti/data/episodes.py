"""EpisodeStore, what every format reader gives: episodes with their arrays, pictures on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import eq
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from tutti.data.content import Content, Digests, digest
from tutti.data.conventions.config import NOTHING_SAID, ConventionsConfig
from tutti.data.conventions.conversion import Conversion
from tutti.data.formats.interface import Roles
from tutti.data.tokenize import normalized_text
from tutti.types import LABELS, Dimensions, Label

Progress = Callable[[int, int], None]
"""Called with (done, total) while a long step runs; total is 0 where it is not known beforehand."""
Vector = Literal["state", "action"]
VECTORS: dict[Vector, Label] = {"state": "state", "action": "actions"}
"""The labels that are numbers, by the word that sizes and names of their dimensions begin with."""
Slot = Literal[
    "position",
    "rotation",
    "joints",
    "gripper",
    "base",
    "second_position",
    "second_rotation",
    "second_joints",
    "second_gripper",
    "other",
]
"""The canonical slots in the order in which they stand in a vector. `other` is what is of none."""
Use = bool | Literal["where_present"]
"""Whether a label is used: it must be there, it is not looked at, or it is used in the rows that have it."""
ALL_USED: Mapping[Label, Use] = dict[Label, Use].fromkeys(LABELS, True)
PAIRS = (
    "picture-text pairs: pictures with a text each, without robot, state and action. They feed the terms "
    "that need pictures and texts alone, such as align, beside a robot's data set in one run (data.sources)"
)
"""What a set of pairs is, for the user."""
WHERE_PRESENT: Mapping[Label, Use] = dict[Label, Use].fromkeys(LABELS, "where_present")
"""Nothing need be there: of a look into a data set, and of a conversion."""
KEPT_FROM = 2**16
"""Rows from which on what is computed of them is kept on the disk; of fewer it is done again as fast."""
_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Episode:
    """One recorded trial: the frame rows [start, start + length) of its store.

    `instruction` is that of its first frame.
    """

    index: int
    start: int
    length: int
    instruction: str

    @property
    def end(self) -> int:
        """One past the last frame row."""
        return self.start + self.length


class Episodes(Sequence[Episode]):
    """Episodes as arrays, each made when it is asked for: a hundred thousand take 3 MB instead of 30.

    `numbers`, `starts` and `lengths` (e,) are the fields of each; `texts` (e,) points into `instructions`.
    """

    def __init__(
        self,
        numbers: Int64[np.ndarray, " e"],
        starts: Int64[np.ndarray, " e"],
        lengths: Int64[np.ndarray, " e"],
        texts: Int64[np.ndarray, " e"],
        instructions: Sequence[str],
    ) -> None:
        self.numbers, self.starts, self.lengths = numbers, starts, lengths
        self.texts, self.instructions = texts, instructions

    @classmethod
    def of(cls, episodes: Iterable[Episode]) -> Episodes:
        """The same episodes in this form."""
        if isinstance(episodes, Episodes):
            return episodes
        known: dict[str, int] = {}
        rows = [(e.index, e.start, e.length, known.setdefault(e.instruction, len(known))) for e in episodes]
        numbers, starts, lengths, texts = np.array(rows, np.int64).reshape(-1, 4).T.copy()
        return cls(numbers, starts, lengths, texts, tuple(known))

    @classmethod
    def joined(cls, several: Sequence[Sequence[Episode]]) -> Episodes:
        """One behind the other."""
        return cls.of(several[0] if len(several) == 1 else (one for many in several for one in many))

    def where(self, chosen: Bool[np.ndarray, " e"] | Int64[np.ndarray, " _"]) -> Episodes:
        """Those of a mask, or at some places, in that order."""
        starts, lengths = self.starts[chosen], self.lengths[chosen]
        return Episodes(self.numbers[chosen], starts, lengths, self.texts[chosen], self.instructions)

    @property
    def rise(self) -> bool:
        """Whether each lies behind the one before it."""
        return bool((self.starts[1:] >= (self.starts + self.lengths)[:-1]).all())

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.where(np.arange(len(self))[place])
        number, start, length = (int(many[place]) for many in (self.numbers, self.starts, self.lengths))
        return Episode(number, start, length, self.instructions[int(self.texts[place])])

    def __iter__(self) -> Iterator[Episode]:
        for begin in range(0, len(self), _AT_ONCE):
            here = slice(begin, begin + _AT_ONCE)
            texts = (self.instructions[one] for one in self.texts[here].tolist())
            arrays = (self.numbers, self.starts, self.lengths)
            yield from map(Episode, *(values[here].tolist() for values in arrays), texts)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))


def rows_of(episodes: Iterable[Episode]) -> Int64[np.ndarray, " _"]:
    """The frame rows of some episodes in their store, in this order."""
    starts, lengths = bounds_of(many := Episodes.of(episodes))
    if len(many) and many.rise:  # the same in a tenth of the time
        return np.flatnonzero(mask_of(many, int(starts[-1] + lengths[-1])))
    return np.repeat(starts + lengths - np.cumsum(lengths), lengths) + np.arange(int(lengths.sum()))


def bounds_of(
    episodes: Iterable[Episode],
) -> tuple[Int64[np.ndarray, " e"], Int64[np.ndarray, " e"]]:
    """The first frame rows and the lengths of some episodes."""
    many = Episodes.of(episodes)
    return many.starts, many.lengths


def mask_of(episodes: Iterable[Episode], count: int) -> Bool[np.ndarray, " n"]:
    """Which of the `count` frame rows of a store are of these episodes."""
    starts, lengths = bounds_of(many := Episodes.of(episodes))
    if many.rise:
        edges = np.stack([starts, starts + lengths], axis=1).reshape(-1)
        runs = np.diff(edges, prepend=0, append=count)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    found = np.zeros(count, bool)
    found[rows_of(many)] = True
    return found


def texts_of(store: EpisodeStore, episodes: Iterable[Episode]) -> set[str]:
    """The distinct instructions of these episodes, normalised."""
    used = np.zeros(len(store.instructions), bool)
    used[store.instruction_of[mask_of(episodes, store.spec.num_frames)]] = True
    return {normalized_text(store.instructions[i]) for i in np.flatnonzero(used).tolist()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec(Dimensions):
    """The sizes of a store, and what its numbers are. `image_shapes` has one (height, width) in pixels for
    each view.
    """

    views: tuple[str, ...]
    image_shapes: tuple[tuple[int, int], ...]
    state_dim: int
    action_dim: int
    fps: float
    num_frames: int
    embodiment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """How a store's numbers were recorded: `spec` is that of the recorded ones, `ranges` their smallest and
    largest values where they have become others. `conversion` tells how they became those that are learned.
    """

    conversion: Conversion
    spec: StoreSpec
    ranges: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)


class EpisodeStore(ABC):
    """Episodes end to end in one global frame order; numbers in memory, pictures decoded on request.

    `states` (N, s) and `actions` (N, a) are in data units, `instruction_of` (N,) points into
    `instructions`. `content` tells whether another store says the same; `name` names the store in
    messages (its folder). `remarks` are lines for the user on what the store leaves out or guesses. `parts`
    say which episodes of the data set each choice it was opened with names; empty where it was one, of all.
    `format` is the name of its format, `roles` what each of its features was taken for. `is_pairs`: each
    episode is a picture and a text, of one step, without a robot: it has no time (an infinite rate), neither
    state nor action, and pictures of their own sizes. `conventions` is what the format tells of its numbers,
    `usual` what its layout tells beside that, used with canonical slots; `slots` are then what they are of.
    `converted` is there once they are those that are learned. `view_names` is what a source calls its views.
    `answers` and `answer_of` (N,) are what is to be said about pairs, "" where nothing is; empty: no answers.
    `known_digests` are those of `recorded_digests`, where an index has them.
    """

    format: str = ""
    roles: Roles = Roles()
    is_pairs: bool = False
    conventions: ConventionsConfig = NOTHING_SAID
    usual: ConventionsConfig = NOTHING_SAID
    slots: Mapping[Vector, tuple[Slot, ...]] | None = None
    converted: Converted | None = None
    view_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    parts: tuple[Bool[np.ndarray, " e"], ...] = ()
    answers: tuple[str, ...] = ()
    answer_of: Int64[np.ndarray, " n"] = np.zeros(0, np.int64)
    known_digests: Mapping[str, Digests] = MappingProxyType({})

    name: str
    spec: StoreSpec
    episodes: Sequence[Episode]
    states: Float32[np.ndarray, "n s"]
    actions: Float32[np.ndarray, "n a"]
    instructions: tuple[str, ...]
    instruction_of: Int64[np.ndarray, " n"]

    @property
    def views(self) -> tuple[str, ...]:
        """What its views are called beside those of others, in the order of `spec.views`."""
        return self.view_names or self.spec.views

    def picture_digests(self) -> Digests:
        """A digest of each episode's pictures; a format may take them as stored, or a stated sample."""
        return np.array(
            [
                digest(*(self.frames(view, np.arange(e.start, e.end)).tobytes() for view in self.spec.views))
                for e in self.episodes
            ],
            np.uint64,
        )

    @cached_property
    def content(self) -> Content:
        """Digests of all that is used: sizes, rate, numbers, instructions, pictures."""
        spec = repr((self.spec.views, self.spec.image_shapes, self.spec.fps, self.spec.embodiment))
        numbers, said = Episodes.of(self.episodes).numbers, self.known_digests or self.recorded_digests()
        whole = np.array_equal(numbers, np.arange(len(numbers)))
        return Content(
            digest(spec.encode()),
            self.number_digests | {name: said[name] for name in ("instructions", "pictures")},
            Dimensions(**self.spec.dimensions()),
            () if whole else tuple(numbers.tolist()),
        )

    def recorded_digests(self) -> dict[str, Digests]:
        """Digests of the instructions and of the pictures of each episode."""
        texts = [normalized_text(text).encode() for text in self.instructions]

        def spoken(rows: slice) -> Iterator[bytes]:
            """Each instruction of an episode behind the frame at which it begins: most have one."""
            said = self.instruction_of[rows]
            for row in (0, *(np.flatnonzero(np.diff(said)) + 1).tolist()):
                yield from (row.to_bytes(8, "little"), texts[said[row]])
            if self.answers:
                yield from (normalized_text(self.answers[one]).encode() for one in self.answer_of[rows])

        return {"instructions": self._digests(spoken), "pictures": self.picture_digests()}

    @cached_property
    def number_digests(self) -> dict[str, Digests]:
        """Digests of the `states` and of the `actions` of each episode."""
        return {
            "states": self._digests(lambda rows: (self.states[rows].tobytes(),)),
            "actions": self._digests(lambda rows: (self.actions[rows].tobytes(),)),
        }

    @property
    def is_as_recorded(self) -> bool:
        """Whether `states` and `actions` are those that the digests are of."""
        return not (self.converted and self.converted.ranges)

    @cached_property
    def present(self) -> Mapping[Label, Bool[np.ndarray, " n"]]:
        """The rows that have each label: finite numbers, an instruction that is not blank."""
        spoken = np.array([bool(text.strip()) for text in self.instructions], bool)
        # By `logical_and`, since a row without a single number is finite.
        acting = np.logical_and.reduce(np.isfinite(self.actions), axis=1, initial=self.actions.shape[1] > 0)
        known = np.logical_and.reduce(np.isfinite(self.states), axis=1)
        return {"actions": acting, "text": spoken[self.instruction_of], "state": known}

    @property
    def identities(self) -> list[int]:
        """A number for each episode, of its states and actions, of its pictures where it has neither: the
        same wherever it lies and is numbered."""
        if self.states.shape[1] + self.actions.shape[1] == 0:
            return self.content.episodes["pictures"].tolist()
        return [digest(both.tobytes()) for both in np.stack([*self.number_digests.values()], axis=1)]

    def _digests(self, part: Callable[[slice], Iterable[bytes]]) -> Digests:
        return np.array([digest(*part(slice(e.start, e.end))) for e in self.episodes], np.uint64)

    @cached_property
    def fingerprint(self) -> str:
        """A text that is equal where `content` is."""
        return self.content.fingerprint

    @abstractmethod
    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures of `view` at the global frame rows, in the order asked; sorted rows are fast.

        Raises UserError where a picture is missing, damaged or not of the promised size.
        """

    def share(self, how: Callable[[object], None]) -> None:
        """Lets `how` replace the large arrays among its attributes by others of equal values."""
        how(self)

    def keep_encoded(self, most: int) -> bool:
        """Lets this reader, and those made of it, keep up to `most` bytes of encoded pictures each, those
        that were read last, for rows in random order; whether it does so."""
        return False

    def another_reader(self) -> EpisodeStore | None:
        """The same data set for another thread, which shares the numbers, but neither open files nor what was
        read last; None where one thread at a time may read pictures."""
        return None

    def picture_files(self, view: str, rows: Int64[np.ndarray, " k"]) -> Iterable[Path]:
        """The files that the pictures of `view` at these rows are read from, as far as they are known."""
        return ()

    def rising(
        self, view: str, rows: Int64[np.ndarray, " k"], *, planes: bool = False
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures at rising rows one by one, each valid until the next; those of pairs in their own
        sizes, which `frames` makes equal. With `planes` their memory may lie channel by channel, where it is
        decoded so at no cost."""
        yield from self.frames(view, rows)
