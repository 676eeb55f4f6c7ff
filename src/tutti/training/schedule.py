"""Learning-rate schedules: the factor in [0, 1] that multiplies every group's base learning rate."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


def warm_up_factor(step: int, warmup: int) -> float:
    """min(1, (step + 1) / warmup): the first step already moves, step `warmup` - 1 is at full rate."""
    return 1.0 if warmup == 0 else min(1.0, (step + 1) / warmup)


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
        t = (step - self.warmup) / max(1, steps - self.warmup)
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * min(1.0, t))) / 2.0


class WsdConfig(BaseModel):
    """Warm-up, stable, decay (2405.18392): constant, then down to 0 in the last `decay` share of the steps.

    With t = (step - start) / (steps - start) from the start of the decay: `linear` gives 1 - t and
    `1-sqrt` gives 1 - sqrt(t). The last update has t < 1, so it still moves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(default=100, ge=0, description="Steps of linear warm-up.")
    decay: float = Field(default=0.5, ge=0.0, le=1.0, description="Share of the steps that decay.")
    shape: Literal["linear", "1-sqrt"] = Field(default="linear", description="Shape of the decay.")

    def factor(self, step: int, steps: int) -> float:
        """The factor for the update number `step` (0-based) of `steps`."""
        start = steps * (1.0 - self.decay)
        t = 0.0 if step <= start else min(1.0, (step - start) / (steps - start))
        down = 1.0 - t if self.shape == "linear" else 1.0 - math.sqrt(t)
        return warm_up_factor(step, self.warmup) * down


ScheduleConfig = Annotated[CosineConfig | WsdConfig, Field(discriminator="kind")]
