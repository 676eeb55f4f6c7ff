"""Balancing by dynamic weight average: terms that fall slowly weigh more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

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
        return DwaBalancing(schedules, temperature=self.temperature, every=self.every)


class DwaBalancing(Balancing):
    """b = K softmax(r / temperature) over the K computed terms, r_i = mean L_i(e-1) / mean L_i(e-2).

    e is the present epoch of `every` updates, e-1 and e-2 are the two before it. r_i = 1 in the first two
    epochs, and for a term that was not active in both of those or whose mean was not positive. b sums to K
    and, since r is near 1, is close to even. An update in which a term is exactly 0 (nothing to learn from)
    does not count for it.

    Source: 1803.10704. Differs: an epoch is a number of updates, as windows are drawn without end.
    """

    sums: Tensor
    counts: Tensor
    previous: Tensor
    rates: Tensor
    updates: Tensor

    def __init__(
        self, schedules: Mapping[str, WeightSchedule], *, temperature: float = 2.0, every: int = 100
    ) -> None:
        super().__init__(schedules)
        self.temperature, self.every = temperature, every
        empty = torch.zeros(len(self.names), dtype=torch.float64)
        self.register_buffer("sums", empty)
        self.register_buffer("counts", empty.clone())
        self.register_buffer("previous", torch.full_like(empty, torch.nan))
        self.register_buffer("rates", torch.ones_like(empty))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

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
