"""The action term: the error of the model's own action decoder on the chunk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from tutti.objectives.term import BaseTermConfig, Boundary, ChunkDecoder, Model, Term, TermValue
from tutti.types import Batch, Features, masked_mean


class ChunkConfig(BaseTermConfig):
    """`kind: chunk`."""

    kind: Literal["chunk"] = "chunk"

    def build(self, model: Model, name: str) -> ChunkTerm:
        """The term for the decoder of `model`."""
        return ChunkTerm(model.action, name=name, stop_gradient=self.stop_gradient)


class ChunkTerm(Term):
    """sum m e / sum m, e the decoder's error of each action: for the regression decoder e = |a^ - a|.

    The decoder belongs to the model, because the robot needs it: it is used here but is no submodule, so
    the objective's parameters and checkpoint do not hold it twice. To score other weights (an average,
    say), put them into the same model rather than into a copy.
    """

    def __init__(
        self, decoder: ChunkDecoder, *, name: str = "action", stop_gradient: Collection[Boundary] = ()
    ) -> None:
        super().__init__(name=name, stop_gradient=stop_gradient)
        self._decoder = (decoder,)  # in a tuple, so that torch does not register it

    def compute(self, features: Features, batch: Batch) -> TermValue:
        """The masked mean of the decoder's error. Metrics, in evaluation mode only because a generative
        decoder samples for them: `first_l1`, the masked mean |a^_0 - a_0| of the first predicted action, and
        `chunk_l1`, that of the chunk, which compare decoders whose errors are of different kinds."""
        (decoder,) = self._decoder
        value = masked_mean(decoder(features, batch), batch.action_mask, of=_actions)
        if self.training:
            return TermValue(value=value, metrics={})
        with torch.no_grad():
            error = (decoder.predict(features) - batch.actions).abs()
            metrics = {
                f"{self.name}/first_l1": masked_mean(error[:, 0], batch.action_mask[:, 0]),
                f"{self.name}/chunk_l1": masked_mean(error, batch.action_mask),
            }
        return TermValue(value=value, metrics=metrics)


def _actions(batch: Batch) -> Bool[Tensor, "b t a"]:
    return batch.action_mask
