"""Chunks of actions as changes from the state at their start, which no single row tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from tutti.data.conventions.motion import Motion
from tutti.data.episodes import Episode, EpisodeStore
from tutti.data.normalize import Normalizer

MOST_CHUNKS = 1 << 17
"""Chunks that statistics of relative actions are of, at most, evenly spread."""
AT_ONCE = 1 << 12
"""Chunks that are taken to float64 at a time."""


@dataclass(frozen=True, slots=True)
class RelativeChunks:
    """The targets and states of all rows of some data sets laid end to end, in data units."""

    motion: Motion
    normalizer: Normalizer
    targets: Float32[np.ndarray, "n a"]
    states: Float32[np.ndarray, "n s"]

    @classmethod
    def of(cls, stores: Sequence[EpisodeStore], normalizer: Normalizer) -> RelativeChunks | None:
        """Of stores whose actions are learned as relative; None of others."""
        known = [(s, s.converted.conversion.relative) for s in stores if s.converted]
        moving = [(store, motion) for store, motion in known if motion is not None]
        if not moving:
            return None
        like, motion = moving[0]
        targets = [_of_size(store.actions, like.actions.shape[1]) for store in stores]
        states = [_of_size(store.states, like.states.shape[1]) for store in stores]
        return cls(motion, normalizer, np.concatenate(targets), np.concatenate(states))

    def chunks(
        self, rows: Int64[np.ndarray, "n t"], starts: Int64[np.ndarray, " n"]
    ) -> tuple[Float32[np.ndarray, "n t a"], Bool[np.ndarray, " n"]]:
        """The normalised actions of `rows` as changes from the states at `starts`, 0 where they are not
        known; and where these states are."""
        first = self.states[starts]
        moved = self.normalizer.apply_action(self.motion.relative(self.targets[rows], first))
        known = np.asarray(np.isfinite(first).all(axis=1))
        return np.nan_to_num(moved, nan=0.0).astype(np.float32), known


def is_relative(store: EpisodeStore) -> bool:
    """Whether its actions are learned as changes from the state at the start of their chunk."""
    return store.converted is not None and store.converted.conversion.relative is not None


def chunks_of(
    store: EpisodeStore, episodes: Sequence[Episode], rows: Bool[np.ndarray, " n"], horizon: int, most: int
) -> Iterator[Float64[np.ndarray, "_ a"]]:
    """The actions of evenly spread chunks of these episodes as changes from the state at their start, all
    steps one behind the other, some chunks at a time. `rows` are those with actions."""
    assert store.converted is not None and store.converted.conversion.relative is not None
    relative = store.converted.conversion.relative.relative
    starts = np.concatenate([np.arange(e.start, e.end) for e in episodes])
    ends = np.concatenate([np.full(e.length, e.end) for e in episodes])
    few = np.unique(np.linspace(0, len(starts) - 1, min(len(starts), most)).astype(np.int64))
    for some in np.array_split(few, -(-len(few) // AT_ONCE)):
        steps = starts[some, None] + np.arange(horizon)
        inside = np.minimum(steps, ends[some, None] - 1)
        first = store.states[starts[some]]
        known = np.asarray(np.isfinite(first).all(axis=1))
        used = (steps < ends[some, None]) & rows[inside] & known[:, None]
        yield relative(store.actions[inside], first)[used]


def _of_size(values: Float32[np.ndarray, "n d"], dim: int) -> Float32[np.ndarray, "n e"]:
    """The numbers; NaN of a data set that has them in another size."""
    return values if values.shape[1] == dim else np.full((len(values), dim), np.nan, np.float32)
