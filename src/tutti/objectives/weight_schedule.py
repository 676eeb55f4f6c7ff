"""How much a term counts over a run: a weight or a share, each a number or a schedule from start to end."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_serializer, model_validator

from tutti.frozen_config import FrozenConfig

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class WeightSchedule(FrozenConfig):
    """lambda at a progress in [0, 1]; with u = (progress - start_at) / (end_at - start_at) in [0, 1]:

    constant: start.  linear: end + (start - end)(1 - u).  cosine: end + (start - end)(1 + cos(pi u)) / 2.

    Before `start_at` it is start; from `end_at` on it is exactly end. Update k of n (from 0) is at k / n, as
    in the learning rate's schedule; what is measured after the last one is at 1. A term whose lambda is 0
    costs nothing.
    A lambda that only rises is one with start < end. With `warmup` all of that is multiplied by
    min(1, progress / warmup), so that a term may rise first and fall later.
    """

    start: NonNegative = Field(description="lambda at the start")
    end: NonNegative = Field(default=0.0, description="lambda at the end")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how lambda goes from start to end"
    )
    start_at: Share = Field(default=0.0, description="share of the run after which lambda leaves start")
    end_at: Share = Field(default=1.0, description="share of the run after which lambda is end")
    warmup: Share = Field(default=0.0, description="share of the run in which lambda rises from 0")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start_at >= self.end_at:
            raise ValueError(f"start_at {self.start_at} must come before end_at {self.end_at}")
        if self.schedule == "constant" and "end" in self.model_fields_set and self.end != self.start:
            raise ValueError(
                f"a constant schedule never reaches end {self.end}; leave it out, or use linear or cosine"
            )
        if self.schedule != "constant" and self.warmup >= self.end_at:
            raise ValueError(f"warmup {self.warmup} must end before end_at {self.end_at}")
        return self

    def at(self, progress: float) -> float:
        """lambda at `progress`, which is clamped to [0, 1].

        >>> falling = WeightSchedule(start=0.2, end=0.0, schedule="linear", end_at=0.5)
        >>> [falling.at(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.2, 0.1, 0.0, 0.0]
        """
        progress = min(1.0, max(0.0, progress))
        rise = progress / self.warmup if progress < self.warmup else 1.0
        if self.schedule == "constant":
            return rise * self.start
        u = min(1.0, max(0.0, (progress - self.start_at) / (self.end_at - self.start_at)))
        left = 1 - u if self.schedule == "linear" else (1 + cos(pi * u)) / 2
        # The ends are exact, so that a finished schedule is 0 and not nearly 0.
        return rise * (self.start if left == 1 else self.end + (self.start - self.end) * left)

    @property
    def is_zero(self) -> bool:
        """True if lambda is 0 for the whole run."""
        return self.start == 0 and (self.end == 0 or self.schedule == "constant")


Weight = Annotated[
    NonNegative | WeightSchedule,
    Field(description="lambda: a number, or a schedule over the run."),
]


def schedule_of(weight: float | WeightSchedule) -> WeightSchedule:
    """The schedule that `weight` is, or the constant one that a number stands for."""
    if isinstance(weight, WeightSchedule):
        return weight
    return WeightSchedule(start=weight, schedule="constant")


AMOUNTS = ("weight", "share")
"""The keys that say how much a term counts; it has one of them."""


class WeighedConfig(FrozenConfig):
    """The keys of a term that say how much it counts, of which it has one."""

    share_by_default: ClassVar[Weight | None] = 0.1
    """The share where neither is given; None: a weight of 1."""

    weight: Weight | None = Field(
        default=None, description="lambda: a number, or a schedule over the run; this or `share`."
    )
    share: Weight | None = Field(
        default=None,
        description="In place of a weight: the size of the term's part of the update, relative to action's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _amount_by_default(cls, given: Any) -> Any:
        if not isinstance(given, dict) or any(given.get(key) is not None for key in AMOUNTS):
            return given
        share = cls.share_by_default
        return {**given, "weight": 1.0} if share is None else {**given, "share": share}

    @model_validator(mode="after")
    def _weight_or_share(self) -> Self:
        if self.weight is not None and self.share is not None:
            raise ValueError("it has a weight and a share: lambda itself, or what to measure it by. Give one")
        return self

    @model_serializer(mode="wrap")
    def _one_of_them(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without the one that is not given."""
        values = serialize(self)
        return {key: value for key, value in values.items() if key not in AMOUNTS or value is not None}

    @property
    def schedule(self) -> WeightSchedule:
        """The weight or the share, which `share` tells apart, over the run."""
        return schedule_of(next(one for one in (self.weight, self.share) if one is not None))
