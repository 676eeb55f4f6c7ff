"""Balancing by gradient share: lambdas calibrated once from measured gradient norms, then frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.weight_schedule import WeightSchedule
from tutti.types import UserError

log = logging.getLogger("tutti.objectives")

PRIMARY = "action"


class GradientShareBalancingConfig(FrozenConfig):
    """`kind: gradient_share`. The `weight` of a term is then its share relative to action, not its lambda.

    `objective: {action: {weight: 1}, recon: {weight: 0.1}}` asks that recon moves what it shares with action
    a tenth as much as action does; schedules work as always.
    """

    kind: Literal["gradient_share"] = "gradient_share"
    start: int = Field(
        default=100, ge=0, description="Updates before the norms are measured; at least the LR warm-up."
    )
    steps: int = Field(default=100, ge=1, description="Updates over which the norms' medians are taken.")

    def build(self, schedules: Mapping[str, WeightSchedule]) -> GradientShareBalancing:
        """The balancing of terms with these schedules. Raises UserError if there is no action term."""
        return GradientShareBalancing(schedules, self)


class GradientShareBalancing(Balancing):
    """b_i = median_t G_action(t) / median_t G_i(t), over the updates t in [start, start + steps).

    G_i is the norm of the raw term's gradient d L_i / d theta over the parameters that it may share with
    action (training/backward/term_gradients.py), so that lambda_i(t) = w_i(t) G_action / G_i: with
    w_action = 1 the weight of a term is how long its pull on the shared parameters is, relative to that of
    action. Until then b = 1, and the same weights are plain lambdas. b_action = 1 always; the sum of the
    others is free.

    An update that is left out (training.gradients.non_finite: skip) is not measured: the medians are over the
    others, and the log says how many they were. A term that is not active while the norms are measured, or
    that does not move what action moves, keeps b = 1, and a warning says so. Measuring costs K gradients
    instead of one for each micro-batch of `steps` updates.

    Source: ours; norms at initialisation mislead, which is why GradNorm (1711.02257) goes on measuring.
    Differs from GradNorm: measured once, for a given share, over all shared parameters and not one layer.
    """

    def __init__(self, schedules: Mapping[str, WeightSchedule], config: GradientShareBalancingConfig) -> None:
        super().__init__(schedules)
        if PRIMARY not in self.names:
            raise UserError(
                f"balancing.kind is gradient_share, which weighs the terms against '{PRIMARY}'; the "
                f"objective has {', '.join(self.names)}. Use balancing.kind=fixed."
            )
        self.start, self.steps = config.start, config.steps
        self._settled = False
        unknown = torch.full((config.steps, len(self.names)), torch.nan, dtype=torch.float64)
        self.norms = nn.Buffer(unknown)
        self.observed = nn.Buffer(torch.tensor(0))
        self.factor = nn.Buffer(torch.ones(len(self.names), dtype=torch.float64))

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        return self.by_name(self.factor, values)

    def wants_gradients(self, step: int) -> bool:
        return self.start <= step < self.start + self.steps

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Behind the window, freezes the factors where updates of it were left out.

        Raises: UserError if action had no gradient to weigh against in any of them.
        """
        # What an update does to the buffers is undone where it is left out, so this must come before it.
        behind = step >= self.start + self.steps
        if behind and not self._settled and int(self.observed) < self.steps:
            self._freeze()
        self._settled = behind

    @torch.no_grad()
    def observe_gradients(self, norms: Mapping[str, float]) -> None:
        """Notes the norms of one update; when all are noted the factors are frozen.

        Raises: UserError if action had no gradient to weigh against.
        """
        self.norms[int(self.observed)] = self.in_order(norms, self.norms)
        self.observed += 1
        if int(self.observed) == self.steps:
            self._freeze()

    def _freeze(self) -> None:
        medians = dict(zip(self.names, self.norms.nanquantile(0.5, dim=0).tolist(), strict=True))
        main, observed = medians[PRIMARY], f"{int(self.observed)} of {self.steps} updates"
        if not main > 0:
            raise UserError(
                f"balancing.kind is gradient_share, but the median norm of the gradient of '{PRIMARY}' was "
                f"{main} in the updates from {self.start} to {self.start + self.steps} ({observed} were "
                "measured, the others left out): there is nothing to weigh against. Use "
                "balancing.kind=fixed, another balancing.start, or more balancing.steps."
            )
        factors: dict[str, float] = {}
        for name, norm in medians.items():
            factors[name] = main / norm if norm > 0 else 1.0
            if not norm > 0:
                why = "moved nothing that action moves" if norm == 0 else "was not active"
                log.warning(
                    "balancing: '%s' %s while the gradients were measured, so its lambda is its plain weight",
                    *(name, why),
                )
        self.factor.copy_(self.in_order(factors, self.factor))
        told = ", ".join(f"{name} {factor:.4g} (|g| {medians[name]:.3g})" for name, factor in factors.items())
        log.info("balancing: lambda from now on is the weight times %s; measured in %s", told, observed)
