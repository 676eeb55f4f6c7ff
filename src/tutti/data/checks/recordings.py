"""What the checks of recorded data look at: the rows of all sources, the split, and what a config asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from tutti.data.bundle import DataBundle, evenly_spread
from tutti.data.episodes import ALL_USED, VECTORS, Episode, EpisodeStore, Use, Vector, mask_of, rows_of
from tutti.data.keyframes import share_between
from tutti.data.normalize import Normalizer
from tutti.data.sources import Part, used_vectors
from tutti.data.split import GroupOf
from tutti.dimensions import MAX_AWAY
from tutti.findings import GRIPPER_MOVES_MIN, RELATIVE_RANGE_MIN, Finding, Severity, read_messages, worded
from tutti.types import DataNeeds, Label

MESSAGES = read_messages(Path(__file__).parent / "findings.toml")
SAMPLED_ROWS = 200_000
"""Rows of a source, of whole training episodes evenly spread, that costly statistics look at."""
JOINED = 256


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One source: its store, which of its episodes are trained on and held out, and which labels are used."""

    store: EpisodeStore
    training: Sequence[Episode]
    held_out: Sequence[Episode]
    labels: Mapping[Label, Use] = field(default_factory=lambda: ALL_USED)

    @classmethod
    def of_part(cls, part: Part) -> Recorded:
        """What a source uses of its data set."""
        return cls(store=part.store, training=part.training, held_out=part.held_out, labels=part.labels)

    @property
    def vectors(self) -> list[Vector]:
        """Those of states and actions that are used and in the data set; none without a complete episode."""
        return used_vectors(self.store, self.labels) if self.complete else []

    @cached_property
    def complete(self) -> list[Episode]:
        """The episodes, but for those that lack a state or an action where they may be missing."""
        present, labels = self.store.present, self.labels
        known = [present[label] for label in VECTORS.values() if labels[label] == "where_present"]
        return [one for one in self.episodes if all(rows[one.start : one.end].all() for rows in known)]

    @property
    def told(self) -> list[Episode]:
        """The episodes with an instruction that is used."""
        used = self.episodes if self.labels["text"] else []
        return [episode for episode in used if episode.instruction.strip()]

    @property
    def name(self) -> str:
        """That of the store."""
        return self.store.name

    @cached_property
    def episodes(self) -> list[Episode]:
        """Both parts, in the order of their rows."""
        return sorted((*self.training, *self.held_out), key=lambda episode: episode.start)

    @cached_property
    def spans(self) -> list[slice]:
        """The rows of all complete episodes; neighbours are one span."""
        edges = np.diff(mask_of(self.complete, self.store.spec.num_frames), prepend=False, append=False)
        return [slice(begin, end) for begin, end in np.flatnonzero(edges).reshape(-1, 2).tolist()]

    def values(self, vector: Vector) -> Float32[np.ndarray, "n d"]:
        """All states or actions of the store, also those of episodes that are left out."""
        return self.store.states if vector == "state" else self.store.actions

    @cached_property
    def sample(self) -> Sample:
        """Whole training episodes, evenly spread, of about `SAMPLED_ROWS` rows."""
        complete = set(self.complete)
        training = [episode for episode in self.training if episode in complete]
        lengths = np.array([episode.length for episode in training], np.int64)
        most = max(1, int(SAMPLED_ROWS / max(1.0, float(lengths.mean())))) if len(lengths) else 0
        chosen = evenly_spread(np.arange(len(lengths)), most)
        return Sample([training[number] for number in chosen.tolist()])

    @cached_property
    def extremes(self) -> dict[Vector, tuple[np.ndarray, np.ndarray]]:
        """Smallest and largest value of each dimension over all episodes."""
        found: dict[Vector, tuple[np.ndarray, np.ndarray]] = {}
        for vector in self.vectors:
            parts = [self.values(vector)[span] for span in self.spans]
            low, high = (
                np.stack([reduced(extreme, part) for part in parts]) for extreme in (np.minimum, np.maximum)
            )
            found[vector] = low.min(0).astype(np.float64), high.max(0).astype(np.float64)
        return found

    def moving(self, vector: Vector) -> Int64[np.ndarray, " k"]:
        """The dimensions that are not constant; none of what is not used."""
        if vector not in self.vectors:
            return np.empty(0, np.int64)
        low, high = self.extremes[vector]
        size = np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
        return np.flatnonzero(high - low > RELATIVE_RANGE_MIN * size)

    @cached_property
    def two_valued(self) -> dict[int, tuple[float, float]]:
        """The dimensions of the action that have two values in an episode, as a gripper's command has, with
        the medians of the lower and of the upper ones."""
        found: dict[int, tuple[float, float]] = {}
        lengths = self.sample.lengths
        for number in self.moving("action").tolist() if len(lengths) else ():
            command = self.store.actions[self.sample.rows, number]
            starts = np.cumsum(lengths) - lengths
            low, high = (extreme.reduceat(command, starts) for extreme in (np.minimum, np.maximum))
            changes = high - low > float(np.max(high - low)) / 2
            steady = share_between(command, self.sample.ends) <= MAX_AWAY
            if steady and changes.mean() >= GRIPPER_MOVES_MIN:
                found[number] = float(np.median(low[changes])), float(np.median(high[changes]))
        return found

    def place(self, row: int) -> tuple[Episode, int]:
        """The episode of a frame row, and the frame's number in it."""
        starts = [episode.start for episode in self.episodes]
        episode = self.episodes[int(np.searchsorted(starts, row, side="right")) - 1]
        return episode, row - episode.start

    def dimension(self, vector: Vector, number: int) -> str:
        """A dimension in words: its number, and its name where the data set has one."""
        spec = self.store.spec
        names = spec.state_names if vector == "state" else spec.action_names
        named = number < len(names) and not names[number].endswith(f"[{number}]")  # a number, not a name
        return f"{number} ({names[number]})" if named else str(number)


@dataclass(frozen=True)
class Sample:
    """The rows of some whole episodes."""

    episodes: Sequence[Episode]

    @cached_property
    def rows(self) -> Int64[np.ndarray, " n"]:
        """The frame rows, episode by episode."""
        return rows_of(self.episodes)

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " e"]:
        """Rows of each episode."""
        return np.array([episode.length for episode in self.episodes], np.int64)

    @cached_property
    def ends(self) -> Int64[np.ndarray, " n"]:
        """For each row the end of its episode, counted in rows of the sample."""
        return np.repeat(np.cumsum(self.lengths), self.lengths)


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """All sources, and what the config asks of them.

    `contrasting` are the terms that tell instructions apart, each with what it takes for one (a normalised
    text's task, or itself), `grippers` the keys of the config that name a
    gripper with the dimensions of the action that they name.
    """

    sources: Sequence[Recorded]
    normalizer: Normalizer
    horizon: int
    needs: DataNeeds
    contrasting: Mapping[str, GroupOf] = field(default_factory=dict)
    grippers: Sequence[tuple[str, int]] = ()

    @classmethod
    def of_bundle(cls, data: DataBundle, contrasting: Mapping[str, GroupOf]) -> Recordings:
        """The rows that a training has in memory."""
        return cls(
            sources=list(map(Recorded.of_part, data.parts)),
            normalizer=data.normalizer,
            horizon=data.windows.horizon,
            needs=data.windows.needs,
            contrasting=contrasting,
        )


def reduced(extreme: np.ufunc, values: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, " d"]:
    """Smallest or largest value of each column; numpy is slow on many short rows, so some are joined."""
    n, d = values.shape
    whole = n - n % JOINED
    parts = [values[whole:]]
    if whole:
        wide = values[:whole].reshape(whole // JOINED, JOINED * d)
        parts.append(extreme.reduce(wide, axis=0).reshape(JOINED, d))
    return extreme.reduce(np.concatenate(parts), axis=0)


def say(
    kind: str,
    number: int | float | None,
    severity: Severity | None = None,
    /,
    *,
    source: str = "",
    episode: int | None = None,
    frame: int | None = None,
    dimension: str = "",
    **words: object,
) -> Finding:
    """The finding of a kind; its texts have these fields and `words`."""
    about = {"source": source, "episode": episode, "frame": frame, "dimension": dimension}
    return worded(MESSAGES, kind, number, severity, about | words | {"number": number}, **about)


def some(items: Sequence[object], most: int = 8) -> Iterator[str]:
    """The first few in words, and how many more there are."""
    yield from map(str, items[:most])
    if len(items) > most:
        yield f"{len(items) - most} more"
