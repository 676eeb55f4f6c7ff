"""Learning-rate schedules: the factor in [0, 1] that multiplies every group's base learning rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from tutti.frozen_config import FrozenConfig


def warm_up_factor(step: int, warmup: int) -> float:
    """min(1, (step + 1) / warmup): the first step already moves, step `warmup` - 1 is at full rate."""
    return 1.0 if warmup == 0 else min(1.0, (step + 1) / warmup)


def _after_warm_up(step: int, warmup: int, steps: int) -> float:
    """The share of the steps after the warm-up that are done, 0 to 1."""
    return min(1.0, (step - warmup) / max(1, steps - warmup))


class _Schedule(FrozenConfig):
    warmup: int = Field(default=100, ge=0, description="Steps of linear warm-up.")

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """The factor for update `step` (0-based) of `steps`."""


class ConstantConfig(_Schedule):
    """Linear warm-up, then 1: for a schedule-free optimiser, and for runs that are forked to cool down."""

    kind: Literal["constant"] = "constant"

    def factor(self, step: int, steps: int) -> float:
        return warm_up_factor(step, self.warmup)


class LinearConfig(_Schedule):
    """Linear warm-up, then a straight line: 1 - (1 - final) t, t = (step - warmup) / (steps - warmup).

    The decay to 0 that suits a length fixed beforehand best in 2502.15938.
    """

    kind: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0.0, le=1.0, description="Factor at the end.")

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return warm_up_factor(step, self.warmup)
        t = _after_warm_up(step, self.warmup, steps)
        return 1.0 - (1.0 - self.final) * t


class CosineConfig(_Schedule):
    """Linear warm-up, then a half cosine: final + (1 - final)(1 + cos(pi t))/2 with t from 0 to 1.

    t = (step - warmup) / (steps - warmup). For runs whose length is fixed beforehand.
    """

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0.0, le=1.0, description="Factor at the end.")

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return warm_up_factor(step, self.warmup)
        t = _after_warm_up(step, self.warmup, steps)
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * t)) / 2.0


class WsdConfig(_Schedule):
    """Warm-up, stable, decay (2405.18392): constant, then down to 0 in the last `decay` share of the steps.

    A cool-down that is forked off another run (fork.py) begins where that run is left: `decay_from` names
    the step itself, and takes the place of the share.

    With t = (step - start) / (steps - start) from the start of the decay: `linear` gives 1 - t and
    `1-sqrt` gives 1 - sqrt(t). The last update has t < 1, so it still moves.
    """

    kind: Literal["wsd"] = "wsd"
    decay: float = Field(default=0.5, ge=0.0, le=1.0, description="Share of the steps that decay.")
    shape: Literal["linear", "1-sqrt"] = Field(default="linear", description="Shape of the decay.")
    decay_from: Annotated[int, Field(ge=0)] | Literal["share"] = Field(
        default="share", description="Update before which the decay begins; share: as `decay` says."
    )

    def factor(self, step: int, steps: int) -> float:
        start = steps * (1.0 - self.decay) if self.decay_from == "share" else self.decay_from
        t = 0.0 if step <= start else min(1.0, (step - start) / max(1, steps - start))
        down = 1.0 - t if self.shape == "linear" else 1.0 - math.sqrt(t)
        return warm_up_factor(step, self.warmup) * down


ScheduleConfig = Annotated[
    ConstantConfig | LinearConfig | CosineConfig | WsdConfig, Field(discriminator="kind")
]
