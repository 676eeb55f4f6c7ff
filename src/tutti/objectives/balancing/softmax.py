"""Balancings by a softmax: dynamic weight average, and random weights, a baseline for the learned ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.weight_schedule import WeightSchedule


class DwaBalancingConfig(FrozenConfig):
    """`kind: dwa`."""

    kind: Literal["dwa"] = "dwa"
    temperature: float = Field(default=2.0, gt=0, description="The higher, the nearer to equal weights.")
    every: int = Field(default=100, ge=1, description="Updates in an epoch, whose mean losses are compared.")

    def build(self, schedules: Mapping[str, WeightSchedule]) -> DwaBalancing:
        """The balancing of terms with these schedules."""
        return DwaBalancing(schedules, self)


class DwaBalancing(Balancing):
    """b = K softmax(r / temperature) over the K computed terms, r_i = mean L_i(e-1) / mean L_i(e-2).

    e is the present epoch of `every` updates, e-1 and e-2 are the two before it. r_i = 1 in the first two
    epochs, and for a term that was not active in both of those or whose mean was not positive. b sums to K
    and, since r is near 1, is close to even. An update in which a term is exactly 0 (nothing to learn from)
    does not count for it.

    Source: 1803.10704. Differs: an epoch is a number of updates, as windows are drawn without end.
    """

    def __init__(self, schedules: Mapping[str, WeightSchedule], config: DwaBalancingConfig) -> None:
        super().__init__(schedules)
        self.temperature, self.every = config.temperature, config.every
        self.sums, self.counts, self.previous, self.rates = (
            nn.Buffer(torch.full((len(self.names),), value, dtype=torch.float64))
            for value in (0.0, 0.0, torch.nan, 1.0)
        )
        self.updates = nn.Buffer(torch.tensor(0))

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        return self.softmax(self.rates / self.temperature, values)

    @torch.no_grad()
    def after_step(self, values: Mapping[str, float]) -> None:
        """Adds to the epoch's means; at its end the rates are set."""
        losses = self.in_order(values, self.sums)
        counts = losses.isfinite() & (losses != 0)
        self.sums += torch.where(counts, losses, 0)
        self.counts += counts
        self.updates += 1
        ends = self.updates % self.every == 0  # without a branch, for which the host would have to read it
        means = self.sums / self.counts  # NaN where a term was not active
        known = (means > 0) & (self.previous > 0)
        self.rates.copy_(torch.where(ends, torch.where(known, means / self.previous, 1), self.rates))
        self.previous.copy_(torch.where(ends, means, self.previous))
        self.sums.copy_(torch.where(ends, 0, self.sums))
        self.counts.copy_(torch.where(ends, 0, self.counts))


class RandomWeightsBalancingConfig(FrozenConfig):
    """`kind: rlw`."""

    kind: Literal["rlw"] = "rlw"
    seed: int = Field(default=0, ge=0, description="Seed of the draws; the run's unless given.")

    def build(self, schedules: Mapping[str, WeightSchedule]) -> RandomWeightsBalancing:
        """The balancing of terms with these schedules."""
        return RandomWeightsBalancing(schedules, self)


class RandomWeightsBalancing(Balancing):
    """b = K softmax(n) over the K computed terms, n ~ N(0, I), drawn anew for each update. b sums to K.

    The draw of update t depends on the seed and t alone, so a resumed run draws what it would have drawn.

    Source: random loss weighting, 2111.10603. Differs: theirs sums to 1.
    """

    def __init__(self, schedules: Mapping[str, WeightSchedule], config: RandomWeightsBalancingConfig) -> None:
        super().__init__(schedules)
        self.seed = config.seed
        self.updates = nn.Buffer(torch.tensor(0))
        self.draw = nn.Buffer(self._drawn(0))
        self._made: int | None = 0  # `updates` as the host knows it: to read it there, it would have to wait

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        return self.softmax(self.draw, values)

    def after_load(self) -> None:
        self._made = None

    @torch.no_grad()
    def after_step(self, values: Mapping[str, float]) -> None:
        """Draws the weights of the next update."""
        self._made = (int(self.updates) if self._made is None else self._made) + 1
        self.updates += 1
        self.draw.copy_(self._drawn(self._made), non_blocking=True)

    def _drawn(self, update: int) -> Float[Tensor, " k"]:
        random = numpy.random.default_rng([self.seed, update])
        return torch.from_numpy(random.standard_normal(len(self.names)))
