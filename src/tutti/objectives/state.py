"""The state term: where will the robot's hand be later, up to the episode's end?"""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.objectives.schedule import Weight, WeightSchedule
from tutti.objectives.term import Boundary, Model, Term, TermValue
from tutti.types import Batch, Features, UserError, masked_mean


class FutureStatesConfig(BaseModel):
    """`kind: future_states`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["future_states"] = "future_states"
    weight: Weight = WeightSchedule(start=5.0, end=0.3, schedule="cosine")
    offsets: tuple[PositiveInt, ...] = Field(
        default=(2, 4, 6, 8, 12, 16, 24), min_length=1, description="how many actions ahead the states lie"
    )
    last: bool = Field(default=True, description="also predict the last state of the episode")
    hidden: PositiveInt = Field(default=256, description="width of the head's hidden layer")
    stop_gradient: tuple[Boundary, ...] = ()

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.offsets) != sorted(set(self.offsets)):
            raise ValueError(f"offsets {self.offsets} must rise and not repeat")
        return self

    def build(self, model: Model) -> FutureStatesTerm:
        """The term for states and a readout as those of `model`."""
        return FutureStatesTerm(self, model)


class FutureStatesTerm(Term):
    """Waypoints of the robot itself: s^_{t+k} from the readout, for several k and for the episode's end.

    L = sum m |s^ - s| / sum m over offsets o and dimensions of the normalised state; offsets past the end
    are masked, the last state never is. The labels are proprioception alone, so any data set has them.

    Why it is there: where the hand will be in a second is where the object is, or the goal, in metres. The
    action hides that: it is clipped, and depends on the present position as well. So this term teaches the
    vision encoder to localise long before the action loss alone does (docs/log.md has the figures).

    Differs: the table of future-state losses in the literature has one offset and a squared error; several
    offsets and the absolute error (a median, robust to the moment of a grasp) are ours.
    """

    def __init__(self, config: FutureStatesConfig, model: Model) -> None:
        super().__init__(name="state", stop_gradient=config.stop_gradient)
        self.needs_states = (*config.offsets, *((0,) if config.last else ()))
        self.state_dim = model.spec.state_dim
        self.head = nn.Sequential(
            nn.Linear(model.fusion.width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, len(self.needs_states) * self.state_dim),
        )

    def compute(self, features: Features, batch: Batch) -> TermValue:
        """The masked L1; metric `state/hold_baseline`, the loss of predicting that the hand stays."""
        states, mask = batch.future_states, batch.future_states_mask
        if states is None or mask is None:
            raise UserError(
                "objective.state needs later states, but the batch holds none; build the data with "
                "DataNeeds(state_offsets=objective.needs_states)."
            )
        predicted = self.predict(features.readout)
        with torch.no_grad():
            held = (batch.observation.state[:, None] - states).abs()
            baseline = masked_mean(held, mask[..., None])
        value = masked_mean((predicted - states.to(predicted.dtype)).abs(), mask[..., None])
        return TermValue(value=value, metrics={"state/hold_baseline": baseline})

    def predict(self, readout: Float[Tensor, "b d"]) -> Float[Tensor, "b o s"]:
        """The normalised states at the offsets, the last state of the episode behind them."""
        return self.head(readout).view(len(readout), len(self.needs_states), self.state_dim)
