"""The reconstruction term that looks where something moves: the future picture, weighted by what changed."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from tutti.objectives.term import Boundary, Model
from tutti.objectives.terms.future_patches import FuturePatchesConfig, FuturePatchesTerm
from tutti.objectives.weight_schedule import Weight, WeightSchedule


class ChangedPatchesConfig(BaseModel):
    """`kind: changed_patches`, after the dynamic regions of DreamVLA (2507.04447).

    It is `future_patches` with `weighting: changed` and another floor:

    r_p = floor + 1[mean |x_p(t + k) - x_p(t)| > threshold];  L = sum_p r_p l_p / sum_p r_p.

    Where a share q of the patches changed, the others hold floor (1 - q) / (floor + q) of the weight: at
    q = 5 %, 63 % of it with the floor 0.1 of `future_patches`, 16 % with the 0.01 of this kind. It is not 0,
    so that a batch in which nothing moves still says something. `FuturePatchesTerm` has the rest, and how it
    differs from DreamVLA.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["changed_patches"] = "changed_patches"
    weight: Weight = WeightSchedule(start=0.1, end=0.0, schedule="cosine")
    offset: PositiveInt = Field(default=4, description="k: how many actions ahead the predicted picture lies")
    downsample: PositiveInt = Field(
        default=2, description="the target is averaged over squares of this many pixels a side"
    )
    threshold: float = Field(
        default=0.04, gt=0, description="mean |change| above which a patch changed; pixels in [-1, 1]"
    )
    floor: float = Field(
        default=0.01, gt=0, description="weight of a patch that did not change; one that did has floor + 1"
    )
    width: PositiveInt = 64
    depth: int = Field(default=1, ge=1, le=2)
    heads: PositiveInt = 4
    stop_gradient: tuple[Boundary, ...] = ()

    @model_validator(mode="after")
    def _same_checks(self) -> Self:
        self.as_future_patches()
        return self

    def as_future_patches(self) -> FuturePatchesConfig:
        """The same term in the words of `future_patches`."""
        given = {key: getattr(self, key) for key in type(self).model_fields if key != "kind"}
        return FuturePatchesConfig(weighting="changed", **given)

    def build(self, model: Model, name: str) -> FuturePatchesTerm:
        """The term for pictures and tokens as those of `model`. Raises UserError where sizes clash."""
        return self.as_future_patches().build(model, name)
