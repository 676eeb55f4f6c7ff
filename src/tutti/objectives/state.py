"""The state term: where will the robot's hand be later: in a moment, when it next grasps, and at the end?"""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.objectives.schedule import Weight, WeightSchedule
from tutti.objectives.term import Boundary, Model, Term, TermValue
from tutti.types import Batch, Features, masked_mean, precise


class FutureStatesConfig(BaseModel):
    """`kind: future_states`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["future_states"] = "future_states"
    weight: Weight = WeightSchedule(start=5.0, end=0.3, schedule="cosine")
    offsets: tuple[PositiveInt, ...] = Field(
        default=(2, 4, 6, 8, 12, 16, 24), min_length=1, description="how many actions ahead the states lie"
    )
    last: bool = Field(default=True, description="also predict the last state of the episode")
    key: bool = Field(
        default=True, description="also predict the state at the next key frame: a grasp, a release, the end"
    )
    hidden: PositiveInt = Field(default=256, description="width of the head's hidden layer")
    stop_gradient: tuple[Boundary, ...] = ()

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.offsets) != sorted(set(self.offsets)):
            raise ValueError(f"offsets {self.offsets} must rise and not repeat")
        return self

    def build(self, model: Model, name: str) -> FutureStatesTerm:
        """The term for states and a readout as those of `model`."""
        return FutureStatesTerm(self, model, name=name)


class FutureStatesTerm(Term):
    """Waypoints of the robot itself: s^_{t+k} from the readout, for several k and for the episode's end.

    L = sum m |s^ - s| / sum m over offsets and dimensions of the normalised state
        + mean |s^ - s| over the dimensions of the state at the next key frame.

    Offsets past the end are masked; the last state and the next key frame never are. The labels are
    proprioception and the gripper's command alone, so any data set has them.

    Why it is there: where the hand will be when it grasps is where the object is, in metres. The action hides
    that: it is clipped, and depends on the present position as well. So this term teaches the vision encoder
    to localise long before the action loss alone does. The next grasp is a sum of its own because it is the
    only label of a small object, in the few windows before the grasp (docs/log.md has the figures).

    Source: key frames as targets, ARM (2105.14829) and PerAct (2209.05451). Differs: they predict the key
    pose as the action; here it is a regression beside the action, as are several offsets, with the absolute
    error.
    """

    def __init__(self, config: FutureStatesConfig, model: Model, *, name: str = "state") -> None:
        wanted = (*config.offsets, *((0,) if config.last else ()), *((-1,) if config.key else ()))
        super().__init__(name=name, stop_gradient=config.stop_gradient, needs_states=wanted)
        self.has_key = config.key
        self.state_dim = model.spec.state_dim
        self.head = nn.Sequential(
            nn.Linear(model.fusion.width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, len(self.needs_states) * self.state_dim),
        )

    def compute(self, features: Features, batch: Batch) -> TermValue:
        """The sum of both means; metrics `hold_baseline`, the value of predicting that the hand stays,
        and `key_l1`, the part of the next key frame."""
        later = self.later_states(batch)
        states, mask = later.values, later.mask
        predicted = precise(self.predict(features.readout))
        with torch.no_grad():
            baseline = sum(self._parts((batch.observation.state[:, None] - states).abs(), mask))
        parts = self._parts((predicted - states.to(predicted.dtype)).abs(), mask)
        metrics: dict[str, Tensor] = {f"{self.name}/hold_baseline": torch.as_tensor(baseline)}
        if self.has_key:
            metrics[f"{self.name}/key_l1"] = parts[-1].detach()
        return TermValue(value=torch.stack(parts).sum(), metrics=metrics)

    def _parts(self, errors: Float[Tensor, "b o s"], mask: Bool[Tensor, "b o"]) -> list[Tensor]:
        """The mean over offsets and the end, and then, if it is asked for, that of the next key frame."""
        count = errors.shape[1] - int(self.has_key)
        parts = [masked_mean(errors[:, :count], mask[:, :count, None])]
        return [*parts, masked_mean(errors[:, count:], mask[:, count:, None])] if self.has_key else parts

    def predict(self, readout: Float[Tensor, "b d"]) -> Float[Tensor, "b o s"]:
        """The normalised states at the offsets, then at the episode's last and at its next key frame."""
        return self.head(readout).view(len(readout), len(self.needs_states), self.state_dim)
