"""Functions of the step: the factor in [0, 1] on every base learning rate, and the batch that grows."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tutti.frozen_config import FrozenConfig


def warm_up_factor(step: int, warmup: int) -> float:
    """min(1, (step + 1) / warmup): the first step already moves, step `warmup` - 1 is at full rate."""
    return 1.0 if warmup == 0 else min(1.0, (step + 1) / warmup)


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


class DecayConfig(_Schedule):
    """Linear warm-up, then down from 1 to `final`, t = (step - warmup) / (steps - warmup) going from 0 to 1.

    `linear`: a straight line, 1 - (1 - final) t; the decay to 0 that suits a length fixed beforehand best in
    2502.15938. `cosine`: a half cosine, final + (1 - final)(1 + cos(pi t))/2.
    """

    kind: Literal["linear", "cosine"]
    final: float = Field(default=0.0, ge=0.0, le=1.0, description="Factor on the learning rate at the end.")

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return warm_up_factor(step, self.warmup)
        t = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        if self.kind == "linear":
            return 1.0 - (1.0 - self.final) * t
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * t)) / 2.0


class WsdConfig(_Schedule):
    """Warm-up, stable, decay (2405.18392): constant, then down to 0 in the last `decay` share of the steps.

    A cool-down forked off another run (`training.fork`) begins where that run is left: `decay_from` names
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


ScheduleConfig = Annotated[ConstantConfig | DecayConfig | WsdConfig, Field(discriminator="kind")]


class Stage(FrozenConfig):
    """A first stretch of the training with fewer micro-batches per update."""

    until: float = Field(gt=0, lt=1, description="Share of the run at which the stage ends.")
    accumulation: int = Field(ge=1, description="Micro-batches per update until then.")


class BatchRampConfig(FrozenConfig):
    """Stages of growing accumulation, before the run's own `training.accumulation` holds to the end.

    The loader's batch, and so the order of the data, stay as they are: update k consumes the next
    accumulation(k) batches of the stream. With `by: steps` a stage ends at round(steps * until). With
    `by: samples`, where the shares are of the windows, stage i of share s_i and accumulation a_i takes
    n_i = steps * (s_i / a_i) / sum_j (s_j / a_j) updates, so that `training.steps` are the updates in all.

    The learning rates of the config are those of the last, largest batch A. At accumulation a they are
    multiplied by 1 (`none`), sqrt(a / A) (`sqrt`, for Adam-like updates: 2205.10287) or a / A (`linear`:
    1706.02677).

    Source: a growing batch in place of a falling learning rate, 1711.00489; the batch that a gradient is
    worth grows during training, 1812.06162 (`diag/noise_scale` tells).
    """

    stages: tuple[Stage, ...] = Field(description="In order; the batch grows from each to the next.")
    by: Literal["steps", "samples"] = Field(default="samples", description="What `until` is a share of.")
    learning_rate: Literal["none", "sqrt", "linear"] = Field(
        default="none", description="How the learning rate follows the batch."
    )

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if not self.stages:
            raise ValueError("batch_ramp.stages is empty; give at least one, or set batch_ramp to off")
        for before, after in pairwise(self.stages):
            if after.until <= before.until or after.accumulation <= before.accumulation:
                raise ValueError(
                    "batch_ramp.stages must end later and be larger one after the other; found "
                    f"until {before.until} with {before.accumulation} micro-batches before until "
                    f"{after.until} with {after.accumulation}"
                )
        return self

    def check(self, final: int, steps: int) -> None:
        """Raises: ValueError if the last stage is no smaller than `final`, or a stage gets no update."""
        last = self.stages[-1].accumulation
        if last >= final:
            raise ValueError(
                f"batch_ramp ends with {last} micro-batches, but training.accumulation, which holds after "
                f"it, is {final}. Raise training.accumulation, or lower the stages."
            )
        ends = self.ends(final, steps)
        if any(end <= start for start, end in zip((0, *ends), (*ends, steps), strict=True)):
            raise ValueError(
                f"batch_ramp: of {steps} steps a stage gets none (stages end at {list(ends)}). Raise "
                "training.steps, or leave out a stage."
            )

    def ends(self, final: int, steps: int) -> tuple[int, ...]:
        """The update (0-based) before which each stage ends, in a run of `steps` that ends at `final`."""
        bounds = [0.0, *(stage.until for stage in self.stages), 1.0]
        sizes = [*(stage.accumulation for stage in self.stages), final]
        shares = [after - before for before, after in pairwise(bounds)]
        if self.by == "samples":
            shares = [share / size for share, size in zip(shares, sizes, strict=True)]
        total = sum(shares)
        return tuple(round(steps * done / total) for done in accumulate(shares[:-1]))

    def accumulation_at(self, step: int, final: int, steps: int) -> int:
        """Micro-batches of update `step` (0-based)."""
        number = bisect_right(self.ends(final, steps), step)
        return self.stages[number].accumulation if number < len(self.stages) else final

    def rate_factor(self, accumulation: int, final: int) -> float:
        """What the learning rates are multiplied by at `accumulation` micro-batches."""
        ratio = accumulation / final
        return {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[self.learning_rate]
