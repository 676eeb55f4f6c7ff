"""A batch that grows during the run: how many micro-batches make an update, as a function of the step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from tutti.frozen_config import FrozenConfig


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
        return _ends(shares, steps)

    def accumulation_at(self, step: int, final: int, steps: int) -> int:
        """Micro-batches of update `step` (0-based)."""
        number = bisect_right(self.ends(final, steps), step)
        return self.stages[number].accumulation if number < len(self.stages) else final

    def rate_factor(self, accumulation: int, final: int) -> float:
        """What the learning rates are multiplied by at `accumulation` micro-batches."""
        ratio = accumulation / final
        return {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[self.learning_rate]


def _ends(shares: Sequence[float], steps: int) -> tuple[int, ...]:
    total = sum(shares)
    return tuple(round(steps * done / total) for done in accumulate(shares[:-1]))
