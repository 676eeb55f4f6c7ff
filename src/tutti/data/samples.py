"""Samples of held-out or training windows, evenly spread, for checks of the data and probes of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from tutti.data.bundle import Batches, DataBundle, evenly_spread
from tutti.data.windows import WindowIndex
from tutti.errors import UserError

BATCH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some windows of a data set, in rising order. `episode` numbers the episode of each from 0."""

    index: WindowIndex
    rows: Int64[np.ndarray, " n"]
    episode: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_episodes(self) -> int:
        """How many episodes they come from."""
        return int(self.episode.max()) + 1

    def batches(self) -> Batches:
        """The windows in order, `BATCH` at a time."""
        return Batches(self.index, self.rows, BATCH)

    def actions(self, steps: int) -> tuple[Float64[np.ndarray, "n t a"], Bool[np.ndarray, "n t a"]]:
        """The first `steps` normalised actions of each window and their mask."""
        actions, mask = self.index.chunks(self.rows)
        return actions[:, :steps].double().numpy(), mask[:, :steps].numpy()

    def previous(self) -> tuple[Float64[np.ndarray, "n a"], Bool[np.ndarray, " n"]]:
        """The action before each window, 0 and False at an episode's start."""
        before = np.maximum(self.rows - 1, 0)
        known = (self.rows > 0) & (self.index.episodes_of(before) == self.index.episodes_of(self.rows))
        actions = self.index.chunks(before)[0][:, 0].double().numpy()
        return np.where(known[:, None], actions, 0.0), known


def spread(index: WindowIndex, rows: Int64[np.ndarray, " n"], most: int) -> Sample:
    """At most `most` of `rows`, evenly spread over them in rising order."""
    chosen = evenly_spread(np.sort(rows), most)
    episode = np.unique(index.episodes_of(chosen), return_inverse=True)[1].astype(np.int64)
    return Sample(index=index, rows=chosen, episode=episode)


def held_out(data: DataBundle, most: int) -> Sample:
    """Windows of held-out episodes.

    Raises: UserError if there is none.
    """
    if len(data.held_out_rows) == 0:
        raise UserError(
            "probes: there is no held-out window, and probing what was trained on says little. "
            "Set data.validation_fraction (0.05, say) and train again."
        )
    return spread(data.windows, data.held_out_rows, most)


def training(data: DataBundle, most: int) -> Sample:
    """Windows of training episodes."""
    return spread(data.windows, data.training_rows, most)


def states(sample: Sample) -> Float64[np.ndarray, "n s"]:
    """The normalised states."""
    return np.concatenate([batch.observation.state.double().numpy() for batch in sample.batches()])
