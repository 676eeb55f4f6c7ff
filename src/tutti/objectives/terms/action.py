"""The action term: the error of the model's own action decoder on the chunk."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue
from tutti.types import Batch, Features, masked_mean


class ChunkConfig(BaseTermConfig):
    """`kind: chunk`."""

    kind: Literal["chunk"] = "chunk"

    def build(self, model: Model, name: str) -> ChunkTerm:
        """The term for the decoder of `model`."""
        return ChunkTerm(name=name, stop_gradient=self.stop_gradient)


class ChunkTerm(Term):
    """sum m e / sum m, e the decoder's error of each action: for the regression decoder e = |a^ - a|.

    The decoder belongs to the model, because the robot needs it.
    """

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The masked mean of the decoder's error. Metrics, in evaluation mode only because a generative
        decoder samples for them: `first_l1`, the masked mean |a^_0 - a_0| of the first predicted action, and
        `chunk_l1`, that of the chunk, which compare decoders whose errors are of different kinds."""
        value = masked_mean(model.action(features, batch), batch.action_mask, of=_actions)
        if self.training:
            return TermValue(value=value, metrics={})
        with torch.no_grad():
            error = (model.action.predict(features) - batch.actions).abs()
            metrics = {
                f"{self.name}/first_l1": masked_mean(error[:, 0], batch.action_mask[:, 0]),
                f"{self.name}/chunk_l1": masked_mean(error, batch.action_mask),
            }
        return TermValue(value=value, metrics=metrics)


def _actions(batch: Batch) -> Bool[Tensor, "b t a"]:
    return batch.action_mask
