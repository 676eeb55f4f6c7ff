"""The action term: the error of the model's own action decoder on the chunk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from tutti.objectives.schedule import Weight
from tutti.objectives.term import Boundary, ChunkDecoder, Model, Term, TermValue
from tutti.types import Batch, Features, masked_mean


class ChunkConfig(BaseModel):
    """`kind: chunk`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["chunk"] = "chunk"
    weight: Weight = 1.0
    stop_gradient: tuple[Boundary, ...] = ()

    def build(self, model: Model) -> ChunkTerm:
        """The term for the decoder of `model`."""
        return ChunkTerm(model.action, stop_gradient=self.stop_gradient)


class ChunkTerm(Term):
    """decoder.loss(readout, actions, mask): for the regression decoder sum m |a^ - a| / sum m.

    The decoder belongs to the model, because the robot needs it: it is used here but is no submodule, so
    the objective's parameters and checkpoint do not hold it twice. To score other weights (an average,
    say), put them into the same model rather than into a copy.
    """

    def __init__(self, decoder: ChunkDecoder, *, stop_gradient: Collection[Boundary] = ()) -> None:
        super().__init__(name="action", stop_gradient=stop_gradient)
        self._decoder = (decoder,)  # in a tuple, so that torch does not register it

    def compute(self, features: Features, batch: Batch) -> TermValue:
        """The decoder's loss. Metric `action/first_l1`: masked mean |a^_0 - a_0| of the first action."""
        (decoder,) = self._decoder
        value = decoder.loss(features.readout, batch.actions, batch.action_mask)
        with torch.no_grad():
            error = (decoder(features.readout)[:, 0] - batch.actions[:, 0]).abs()
            first_l1 = masked_mean(error, batch.action_mask[:, 0])
        return TermValue(value=value, metrics={"action/first_l1": first_l1})
