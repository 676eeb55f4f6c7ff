"""Learning-rate schedules: the factor in [0, 1] that multiplies every group's base learning rate."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


def warm_up_factor(step: int, warmup: int) -> float:
    """min(1, (step + 1) / warmup): the first step already moves, step `warmup` - 1 is at full rate."""
    return 1.0 if warmup == 0 else min(1.0, (step + 1) / warmup)


def _after_warm_up(step: int, warmup: int, steps: int) -> float:
    """The share of what follows the warm-up, 0 to 1, that lies behind."""
    return min(1.0, (step - warmup) / max(1, steps - warmup))


class ConstantConfig(BaseModel):
    """Linear warm-up, then 1: for a schedule-free optimiser, and for runs that are forked to cool down."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant"] = "constant"
    warmup: int = Field(default=100, ge=0, description="Steps of linear warm-up.")

    def factor(self, step: int, steps: int) -> float:
        """The factor for the update number `step` (0-based) of `steps`."""
        return warm_up_factor(step, self.warmup)


class LinearConfig(BaseModel):
    """Linear warm-up, then a straight line: 1 - (1 - final) t, t = (step - warmup) / (steps - warmup).

    The decay to 0 that suits a length fixed beforehand best in 2502.15938.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"] = "linear"
    warmup: int = Field(default=100, ge=0, description="Steps of linear warm-up.")
    final: float = Field(default=0.0, ge=0.0, le=1.0, description="Factor at the end.")

    def factor(self, step: int, steps: int) -> float:
        """The factor for the update number `step` (0-based) of `steps`."""
        if step < self.warmup:
            return warm_up_factor(step, self.warmup)
        t = _after_warm_up(step, self.warmup, steps)
        return 1.0 - (1.0 - self.final) * t


class CosineConfig(BaseModel):
    """Linear warm-up, then a half cosine: final + (1 - final)(1 + cos(pi t))/2 with t from 0 to 1.

    t = (step - warmup) / (steps - warmup). For runs whose length is fixed beforehand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=100, ge=0, description="Steps of linear warm-up.")
    final: float = Field(default=0.0, ge=0.0, le=1.0, description="Factor at the end.")

    def factor(self, step: int, steps: int) -> float:
        """The factor for the update number `step` (0-based) of `steps`."""
        if step < self.warmup:
            return warm_up_factor(step, self.warmup)
        t = _after_warm_up(step, self.warmup, steps)
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * t)) / 2.0


class WsdConfig(BaseModel):
    """Warm-up, stable, decay (2405.18392): constant, then down to 0 in the last `decay` share of the steps.

    A cool-down that is forked off another run (fork.py) begins where that run is left: `decay_from` names
    the step itself, and takes the place of the share.

    With t = (step - start) / (steps - start) from the start of the decay: `linear` gives 1 - t and
    `1-sqrt` gives 1 - sqrt(t). The last update has t < 1, so it still moves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(default=100, ge=0, description="Steps of linear warm-up.")
    decay: float = Field(default=0.5, ge=0.0, le=1.0, description="Share of the steps that decay.")
    shape: Literal["linear", "1-sqrt"] = Field(default="linear", description="Shape of the decay.")
    decay_from: Annotated[int, Field(ge=0)] | Literal["share"] = Field(
        default="share", description="Update before which the decay begins; share: as `decay` says."
    )

    def factor(self, step: int, steps: int) -> float:
        """The factor for the update number `step` (0-based) of `steps`."""
        start = steps * (1.0 - self.decay) if self.decay_from == "share" else self.decay_from
        t = 0.0 if step <= start else min(1.0, (step - start) / max(1, steps - start))
        down = 1.0 - t if self.shape == "linear" else 1.0 - math.sqrt(t)
        return warm_up_factor(step, self.warmup) * down


ScheduleConfig = Annotated[
    ConstantConfig | LinearConfig | CosineConfig | WsdConfig, Field(discriminator="kind")
]
