"""The regression decoder: the readout becomes a whole chunk of actions at once, trained with L1."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.models.decoders.chunks import present_actions
from tutti.models.decoders.gripper import Gripper, GripperConfig
from tutti.models.interfaces import ActionDecoder
from tutti.models.layers import Activation, MlpActivation, activate
from tutti.types import Batch, DataSpec, Features

_LAST_LAYER_SCALE = 0.1


class RegressionConfig(FrozenConfig):
    """`kind: regression`."""

    kind: Literal["regression"] = "regression"
    hidden: PositiveInt = Field(default=256, description="width of the hidden layer")
    activation: MlpActivation = "relu"
    loss: Literal["l1", "smooth_l1"] = Field(default="l1", description="the error of an action")
    beta: float = Field(default=1.0, gt=0, description="smooth_l1 is quadratic below this error")
    gripper: GripperConfig | Literal["off"] = Field(
        default="off", description="an action dimension with two values, trained as a binary choice"
    )

    def build(self, spec: DataSpec, width: int) -> RegressionDecoder:
        """The decoder from a readout of `width` to chunks of (spec.horizon, spec.action_dim).

        Raises: UserError if the gripper's dimension is none of the action's.
        """
        return RegressionDecoder(self, spec, width)


class RegressionDecoder(ActionDecoder):
    """One hidden layer, then all t * a numbers of the chunk. Action chunking: ACT, 2304.13705.

        l1           e = |a^ - a|
        smooth_l1    e = (a^ - a)^2 / (2 beta) where |a^ - a| < beta, else |a^ - a| - beta / 2 (1504.08083)
        gripper      e = weight * binary cross-entropy in its dimension (`gripper.py`); predicted is one of
                     the two values

    The last layer starts a tenth of its usual size, so that an untrained policy hardly moves and the first
    losses are those of the mean action.
    """

    def __init__(self, config: RegressionConfig, spec: DataSpec, width: int) -> None:
        super().__init__()
        self.horizon = spec.horizon
        self.action_dim = spec.action_dim
        self.activation: Activation = config.activation
        self.loss, self.beta = config.loss, config.beta
        self.gripper: Gripper | None = None
        if config.gripper != "off":
            self.gripper = config.gripper.build(spec, config.kind)
            self.needs_fit = True
        self.hidden = nn.Linear(width, config.hidden)
        self.out = nn.Linear(config.hidden, spec.horizon * spec.action_dim)
        with torch.no_grad():
            self.out.weight.mul_(_LAST_LAYER_SCALE)
            self.out.bias.zero_()

    def fit(self, actions: Float[Tensor, "n t a"], action_mask: Bool[Tensor, "n t a"]) -> None:
        """The two values of the gripper, if there is one.

        Raises: UserError if its dimension is not binary.
        """
        if self.gripper is not None:
            self.gripper.fit(actions, action_mask)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """e of each action.

        Raises: UserError if there is a gripper and `fit` was not called.
        """
        output, actions = self._output(features), present_actions(batch)
        if self.loss == "l1":
            error = (output - actions).abs()
        else:
            error = F.smooth_l1_loss(output, actions, reduction="none", beta=self.beta)
        if self.gripper is None:
            return error
        place = self.gripper.dimension
        question = self.gripper.error(output[..., place], actions[..., place])
        return _replaced(error, place, question)

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised."""
        output = self._output(features)
        if self.gripper is None:
            return output
        place = self.gripper.dimension
        return _replaced(output, place, self.gripper.choose(output[..., place]))

    def _output(self, features: Features) -> Float[Tensor, "b t a"]:
        """Actions; in the gripper's dimension logits."""
        chunk = self.out(activate(self.hidden(features.readout), self.activation))
        return chunk.view(-1, self.horizon, self.action_dim)


def _replaced(
    chunk: Float[Tensor, "b t a"], place: int, values: Float[Tensor, "b t"]
) -> Float[Tensor, "b t a"]:
    """The chunk with other values in one dimension."""
    return torch.cat([chunk[..., :place], values[..., None], chunk[..., place + 1 :]], dim=-1)
