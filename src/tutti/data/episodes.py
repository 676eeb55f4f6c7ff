"""EpisodeStore, what every format reader gives: episodes with their arrays, pictures on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from tutti.data.content import Content, Digests, digest
from tutti.data.conventions.config import NOTHING_SAID, ConventionsConfig
from tutti.data.conventions.conversion import Conversion
from tutti.data.formats.interface import Roles
from tutti.data.tokenize import normalized_text
from tutti.errors import UserError
from tutti.storage.reading import read_json
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


def rows_of(episodes: Iterable[Episode]) -> Int64[np.ndarray, " _"]:
    """The frame rows of some episodes in their store, in this order."""
    starts, lengths = bounds_of(episodes)
    return np.repeat(starts + lengths - np.cumsum(lengths), lengths) + np.arange(int(lengths.sum()))


def bounds_of(
    episodes: Iterable[Episode],
) -> tuple[Int64[np.ndarray, " e"], Int64[np.ndarray, " e"]]:
    """The first frame rows and the lengths of some episodes."""
    both = np.array([(e.start, e.length) for e in episodes], np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def texts_of(store: EpisodeStore, episodes: Iterable[Episode]) -> set[str]:
    """The distinct instructions of these episodes, normalised."""
    used = np.unique(store.instruction_of[rows_of(episodes)])
    return {normalized_text(store.instructions[i]) for i in used.tolist()}


def row_spans(episodes: Sequence[Episode]) -> list[tuple[int, int]]:
    """The rows [start, end) of the episodes, joined where one begins at another's end."""
    spans: list[tuple[int, int]] = []
    for episode in sorted(episodes, key=lambda episode: episode.start):
        start = spans.pop()[0] if spans and spans[-1][1] == episode.start else episode.start
        spans.append((start, episode.end))
    return spans


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
    are the numbers of the episodes that each choice it was opened with names; empty where it was one, of all.
    `format` is the name of its format, `roles` what each of its features was taken for. `is_pairs`: each
    episode is a picture and a text, of one step, without a robot: it has no time (an infinite rate), neither
    state nor action, and pictures of their own sizes. `conventions` is what the format tells of its numbers,
    `usual` what its layout tells beside that, used with canonical slots; `slots` are then what they are of.
    `converted` is there once they are those that are learned. `view_names` is what a source calls its views.
    `answers` and `answer_of` (N,) are what is to be said about pairs, "" where nothing is; empty: no answers.
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
    parts: tuple[frozenset[int], ...] = ()
    answers: tuple[str, ...] = ()
    answer_of: Int64[np.ndarray, " n"] = np.zeros(0, np.int64)

    name: str
    spec: StoreSpec
    episodes: tuple[Episode, ...]
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
        numbers = tuple(episode.index for episode in self.episodes)
        texts = [normalized_text(text).encode() for text in self.instructions]

        def spoken(rows: slice) -> Iterator[bytes]:
            """Each instruction of an episode behind the frame at which it begins: most have one."""
            said = self.instruction_of[rows]
            for row in (0, *(np.flatnonzero(np.diff(said)) + 1).tolist()):
                yield from (row.to_bytes(8, "little"), texts[said[row]])
            if self.answers:
                yield from (normalized_text(self.answers[one]).encode() for one in self.answer_of[rows])

        return Content(
            digest(spec.encode()),
            self.number_digests | {"instructions": self._digests(spoken), "pictures": self.picture_digests()},
            Dimensions(**self.spec.dimensions()),
            () if numbers == tuple(range(len(numbers))) else numbers,
        )

    @cached_property
    def number_digests(self) -> dict[str, Digests]:
        """Digests of the `states` and of the `actions` of each episode."""
        return {
            "states": self._digests(lambda rows: (self.states[rows].tobytes(),)),
            "actions": self._digests(lambda rows: (self.actions[rows].tobytes(),)),
        }

    @cached_property
    def present(self) -> Mapping[Label, Bool[np.ndarray, " n"]]:
        """The rows that have each label: finite numbers, an instruction that is not blank."""
        spoken = np.array([bool(text.strip()) for text in self.instructions], bool)
        # By `logical_and`, since a row without a single number is finite.
        acting = np.logical_and.reduce(np.isfinite(self.actions), axis=1, initial=self.actions.shape[1] > 0)
        known = np.logical_and.reduce(np.isfinite(self.states), axis=1)
        return {"actions": acting, "text": spoken[self.instruction_of], "state": known}

    @cached_property
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


def check_unchanged(stores: Sequence[EpisodeStore], kept: Path) -> None:
    """Refuses data sets that are no longer those of a run; `kept` is its file of digests, if it has one.

    Raises: UserError naming what differs, and in which episodes.
    """
    if not kept.exists():
        return
    cure = "  cure: put the former data back, or train anew (--redo, or another name=...)."
    try:
        contents = [Content.from_dict(source) for source in read_json(kept)["sources"]]
    except (KeyError, TypeError, ValueError):
        problem = "is damaged, or of another version of Tutti: the data of this run cannot be compared"
        raise UserError(f"{kept} {problem}.\n{cure}") from None
    for store, before in zip(stores, contents, strict=False):
        if lines := store.content.differences(before):
            problem = f"is no longer the data set that this run was trained on: {'; '.join(lines)}"
            raise UserError(f"{store.name} {problem}.\n{cure}")
