"""What every probe is given, and what they share: predictions, sums per window, ratios over episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tutti.data.bundle import DataBundle, Sample, held_out, training
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.models.vla import VLA
from tutti.types import Batch, Observation

Change = Callable[[Batch], Observation]


def unchanged(batch: Batch) -> Observation:
    """The observations as they are."""
    return batch.observation


@dataclass(frozen=True, kw_only=True)
class ProbeSetup:
    """A model, and the data whose windows it is probed on; the same setup gives the same numbers.

    `untrained` has the same config and fresh weights. `groups[i]` is the task of instruction i, `partners`
    the task whose text a task is told in the swap. At most `max_held_out` windows of held-out and
    `max_training` of training episodes are used, evenly spread.
    """

    model: VLA
    untrained: VLA
    data: DataBundle
    groups: Sequence[str]
    partners: Mapping[str, str]
    actions_per_query: int
    seed: int = 0
    max_held_out: int = 2000
    max_training: int = 4000

    @cached_property
    def held(self) -> Sample:
        """The windows to probe on. Raises: UserError if no episode is held out."""
        return held_out(self.data, self.max_held_out)

    @cached_property
    def train(self) -> Sample:
        """The windows that regressions are fitted to."""
        return training(self.data, self.max_training)

    @property
    def executed(self) -> int:
        """How many actions of a chunk are executed."""
        return min(self.actions_per_query, self.model.spec.horizon)

    @cached_property
    def predicted(self) -> Float[Tensor, "n t a"]:
        """The model's chunks for the held-out windows."""
        return self.predict(self.held)

    @cached_property
    def recorded(self) -> tuple[Float[Tensor, "n t a"], Bool[Tensor, "n t a"]]:
        """The recorded chunks of the held-out windows and their mask."""
        return self.held.index.chunks(self.held.rows)

    @cached_property
    def own_error(self) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """The model's own sum m |a - a*| of each held-out window over the executed part, and sum m."""
        actions, mask = self.recorded
        return self.sums(self.predicted - actions), self.sums(mask.float())

    @torch.no_grad()
    def predict(self, sample: Sample, change: Change = unchanged) -> Float[Tensor, "n t a"]:
        """The normalised chunks for the changed observations of `sample`, on the CPU."""
        device = next(self.model.parameters()).device
        chunks = [self.model.predict(change(batch).to(device)).float().cpu() for batch in sample.batches()]
        return torch.cat(chunks)

    def sums(self, values: Float[Tensor, "n t a"]) -> Float64[np.ndarray, " n"]:
        """sum m |x| of each held-out window over its executed actions."""
        return masked_sums(values[:, : self.executed], self.recorded[1][:, : self.executed])

    def ratio(self, top: np.ndarray, bottom: np.ndarray, sample: Sample | None = None) -> Estimate:
        """sum(top) / sum(bottom) over the windows of `sample` (held-out ones), interval over episodes."""
        return ratio_of_sums(top, bottom, (sample or self.held).episode, self.seed)


def masked_sums(values: Float[Tensor, "n t a"], mask: Bool[Tensor, "n t a"]) -> Float64[np.ndarray, " n"]:
    """sum m |x| of each window."""
    return torch.where(mask, values.abs(), 0.0).double().sum((1, 2)).numpy()
