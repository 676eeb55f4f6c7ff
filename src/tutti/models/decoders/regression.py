"""The regression decoder: the readout becomes a whole chunk of actions at once, trained with L1."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from tutti.models.layers import Activation, activate
from tutti.models.parts import ActionDecoder
from tutti.types import Batch, DataSpec, Features

_LAST_LAYER_SCALE = 0.1


class RegressionConfig(BaseModel):
    """`kind: regression`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["regression"] = "regression"
    hidden: PositiveInt = Field(default=256, description="width of the hidden layer")
    activation: Activation = "relu"

    def build(self, spec: DataSpec, width: int) -> RegressionDecoder:
        """The decoder from a readout of `width` to chunks of (spec.horizon, spec.action_dim)."""
        return RegressionDecoder(self, spec, width)


class RegressionDecoder(ActionDecoder):
    """One hidden layer, then all t * a numbers of the chunk. Action chunking: ACT, 2304.13705.

    The last layer starts a tenth of its usual size, so that an untrained policy hardly moves and the first
    losses are those of the mean action.
    """

    def __init__(self, config: RegressionConfig, spec: DataSpec, width: int) -> None:
        super().__init__()
        self.horizon = spec.horizon
        self.action_dim = spec.action_dim
        self.activation: Activation = config.activation
        self.hidden = nn.Linear(width, config.hidden)
        self.out = nn.Linear(config.hidden, spec.horizon * spec.action_dim)
        with torch.no_grad():
            self.out.weight.mul_(_LAST_LAYER_SCALE)
            self.out.bias.zero_()

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """e = |a^ - a| of each action."""
        return (self.predict(features) - batch.actions).abs()

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised."""
        chunk = self.out(activate(self.hidden(features.readout), self.activation))
        return chunk.view(-1, self.horizon, self.action_dim)
