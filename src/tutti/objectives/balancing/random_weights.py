"""Balancing by random weights: the control that every learned balancing must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tutti.frozen_config import FrozenConfig
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.weight_schedule import WeightSchedule


class RandomWeightsBalancingConfig(FrozenConfig):
    """`kind: rlw`."""

    kind: Literal["rlw"] = "rlw"
    seed: int = Field(default=0, ge=0, description="Seed of the draws; the run's unless given.")

    def build(self, schedules: Mapping[str, WeightSchedule]) -> RandomWeightsBalancing:
        """The balancing of terms with these schedules."""
        return RandomWeightsBalancing(schedules, seed=self.seed)


class RandomWeightsBalancing(Balancing):
    """b = K softmax(n) over the K computed terms, n ~ N(0, I), drawn anew for each update. b sums to K.

    The draw of update t depends on the seed and t alone, so a resumed run draws what it would have drawn.

    Source: random loss weighting, 2111.10603. Differs: theirs sums to 1.
    """

    draw: Tensor
    updates: Tensor

    def __init__(self, schedules: Mapping[str, WeightSchedule], *, seed: int = 0) -> None:
        super().__init__(schedules)
        self.seed = seed
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("draw", self._drawn(0))
        self._made: int | None = 0  # `updates` as the host knows it: to read it there, it would have to wait
        self.register_load_state_dict_post_hook(_forget)

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        return self.softmax(self.draw, values)

    @torch.no_grad()
    def after_step(self, values: Mapping[str, float]) -> None:
        """Draws the weights of the next update."""
        self._made = (int(self.updates) if self._made is None else self._made) + 1
        self.updates += 1
        self.draw.copy_(self._drawn(self._made), non_blocking=True)

    def _drawn(self, update: int) -> Float[Tensor, " k"]:
        random = numpy.random.default_rng([self.seed, update])
        return torch.from_numpy(random.standard_normal(len(self.names)))


def _forget(module: Any, keys: Any) -> None:
    """Behind a load, the buffer must be read once."""
    module._made = None
