"""Balancing by uncertainty: a learned log-variance for each term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tutti.frozen_config import FrozenConfig
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.balancing.vector_adam import VectorAdam
from tutti.objectives.weight_schedule import WeightSchedule
from tutti.types import UserError


class UncertaintyBalancingConfig(FrozenConfig):
    """`kind: uncertainty`. Terms must not be negative."""

    kind: Literal["uncertainty"] = "uncertainty"
    learning_rate: float = Field(default=1e-3, gt=0, description="Adam's, of the log-variances; no decay.")
    limit: float = Field(default=5.0, gt=0, description="Largest |s|; b stays in exp(-limit)..exp(limit).")

    def build(self, schedules: Mapping[str, WeightSchedule]) -> UncertaintyBalancing:
        """The balancing of terms with these schedules."""
        return UncertaintyBalancing(schedules, learning_rate=self.learning_rate, limit=self.limit)


class UncertaintyBalancing(Balancing):
    """b_i = exp(-s_i); after each update s_i follows the gradient of (exp(-s_i) L_i + s_i) / 2,

        d/ds_i = (1 - exp(-s_i) L_i) / 2,    by Adam with a learning rate of its own, from s_i = 0.

    s_i is the log of a variance. It settles where exp(s_i) = L_i, so b_i = 1 / L_i: the sum of logarithms is
    minimised, which favours what is easy, and while a loss keeps falling its factor keeps growing. L_i is the
    raw term, whatever its weight; an update in which it is exactly 0 (nothing to learn from) does not count.

    Source: uncertainty weighting, 1705.07115. Differs: twice the published factor exp(-s_i) / 2, so that
    s = 0 is the plain sum; the s_i / 2 that regularises is no part of the total, which stays
    sum_i lambda_i L_i; s_i has a limit. The scale is the method's own: b does not sum to K.
    """

    log_variance: Tensor

    def __init__(
        self, schedules: Mapping[str, WeightSchedule], *, learning_rate: float = 1e-3, limit: float = 5.0
    ) -> None:
        super().__init__(schedules)
        self.limit = limit
        self.register_buffer("log_variance", torch.zeros(len(self.names), dtype=torch.float64))
        self.adam = VectorAdam(len(self.names), learning_rate)

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        return self.by_name((-self.log_variance).exp(), values)

    @torch.no_grad()
    def after_step(self, values: Mapping[str, float]) -> None:
        """Moves s. Raises: UserError if a term is negative."""
        for name, value in values.items():
            if value < 0:
                raise UserError(
                    f"balancing.kind is uncertainty, which takes losses of at least 0, but '{name}' is "
                    f"{value:.4g}. Use another balancing, or shift the term."
                )
        losses = self.in_order(values, self.log_variance)
        gradient = (1 - (-self.log_variance).exp() * losses) / 2
        self.log_variance -= self.adam.step(gradient, losses > 0)
        self.log_variance.clamp_(-self.limit, self.limit)
