"""The state term: where will the robot's hand be later: in a moment, when it next grasps, and at the end?"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.gripper_dims import gripper_dimensions
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import Batch, DataNeeds, Features, StateLabel, masked_mean, precise


class GripperConfig(FrozenConfig):
    """Which dimensions of the action open and close a hand."""

    dimension: int | Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        description="place in the action, from 0, -1 the last; a list for several hands"
    )

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Those dimensions, as given."""
        return (self.dimension,) if isinstance(self.dimension, int) else self.dimension


class FutureStatesConfig(BaseTermConfig):
    """`kind: future_states`."""

    kind: Literal["future_states"] = "future_states"
    weight: Weight = WeightSchedule(start=5.0, end=0.3, schedule="cosine")
    offsets: tuple[PositiveInt, ...] = Field(
        default=(2, 4, 6, 8, 12, 16, 24), min_length=1, description="how many actions ahead the states lie"
    )
    last: bool = Field(default=True, description="also predict the last state of the episode")
    gripper: GripperConfig | Literal["off"] = Field(
        default="off",
        description="also predict the state at the next key frame: where this gripper grasps or lets go, or "
        "the end; off: no key frames",
    )
    hidden: PositiveInt = Field(default=256, description="width of the head's hidden layer")

    @model_validator(mode="before")
    @classmethod
    def _of_older_configs(cls, given: Any) -> Any:
        """`key` was a switch, and the gripper always the last dimension."""
        if not isinstance(given, dict) or not isinstance(given.get("key"), bool):
            return given
        rest = {name: value for name, value in given.items() if name != "key"}
        if not given["key"]:
            return rest | {"gripper": "off"}
        return rest | ({"gripper": {"dimension": -1}} if rest.get("gripper", "off") == "off" else {})

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.offsets) != sorted(set(self.offsets)):
            raise ValueError(f"offsets {self.offsets} must rise and not repeat")
        return self

    @property
    def labels(self) -> tuple[StateLabel, ...]:
        """The states that are predicted, in the order of the head's outputs."""
        named: dict[StateLabel, bool] = {"last": self.last, "next_key": self.gripper != "off"}
        return (*self.offsets, *(label for label, wanted in named.items() if wanted))

    def needs(self, name: str) -> DataNeeds:
        """The states of `labels`."""
        grippers = () if self.gripper == "off" else self.gripper.dimensions
        return DataNeeds(states=self.labels, grippers=grippers)

    def build(self, model: Model, name: str) -> FutureStatesTerm:
        """The term for states and a readout as those of `model`."""
        return FutureStatesTerm(self, model, name=name)


class FutureStatesTerm(Term):
    """Waypoints of the robot itself: s^_{t+k} from the readout, for several k and for the episode's end.

    L = sum m |s^ - s| / sum m over offsets and dimensions of the normalised state
        + mean |s^ - s| over the dimensions of the state at the next key frame, if a gripper is named.

    Offsets past the end are masked; the last state and the next key frame never are. The labels are
    proprioception and the gripper's command alone. In an episode the command must have two values, open and
    closed, or the data are refused: another dimension's changes are no key frames (data/keyframes.py).

    Why it is there: where the hand will be when it grasps is where the object is, in metres. The action hides
    that: it is clipped, and depends on the present position as well. So this term teaches the vision encoder
    to localise long before the action loss alone does. The next grasp is a sum of its own because it is the
    only label of a small object, in the few windows before the grasp (docs/log.md has the figures).

    Source: key frames as targets, ARM (2105.14829) and PerAct (2209.05451). Differs: they predict the key
    pose as the action; here it is a regression beside the action, as are several offsets, with the absolute
    error.
    """

    def __init__(self, config: FutureStatesConfig, model: Model, *, name: str = "state") -> None:
        super().__init__(name=name, stop_gradient=config.stop_gradient)
        self.labels = config.labels
        self.has_key = config.gripper != "off"
        if config.gripper != "off":
            key = f"objective.{name}.gripper.dimension"
            gripper_dimensions(config.gripper.dimensions, model.spec.action_dim, key)
        self.num_offsets = len(self.labels) - int(self.has_key)
        self.state_dim = model.spec.state_dim
        self.head = nn.Sequential(
            nn.Linear(model.fusion.width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, len(self.labels) * self.state_dim),
        )

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The sum of both means; metrics `hold_baseline`, the value of predicting that the hand stays,
        and `key_l1`, the part of the next key frame."""
        later = self.later_states(batch, self.labels)
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
        count = self.num_offsets
        parts = [masked_mean(errors[:, :count], mask[:, :count, None], of=self._at_offsets)]
        if self.has_key:
            parts.append(masked_mean(errors[:, count:], mask[:, count:, None], of=self._at_key))
        return parts

    def _at_offsets(self, batch: Batch) -> Bool[Tensor, "b o"]:
        return self.later_states(batch, self.labels).mask[:, : self.num_offsets]

    def _at_key(self, batch: Batch) -> Bool[Tensor, "b o"]:
        return self.later_states(batch, self.labels).mask[:, self.num_offsets :]

    def predict(self, readout: Float[Tensor, "b d"]) -> Float[Tensor, "b o s"]:
        """The normalised states at the offsets, then at the episode's last and at its next key frame."""
        return self.head(readout).view(len(readout), len(self.labels), self.state_dim)
