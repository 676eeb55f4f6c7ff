"""A loss term of your own: the model also learns how its state will have changed `offset` actions later."""

from __future__ import annotations

from typing import Any

from torch import nn

from tutti.objectives.term import Model, Term, TermValue
from tutti.types import Batch, Features, UserError, masked_mean


class StateChange(Term):
    """mean m (head(readout) - (s_{t+k} - s_t))^2 over batch and dimensions; m: t + k is in the episode."""

    def __init__(self, model: Model, *, offset: int = 4, **term: Any) -> None:
        super().__init__(needs_future=offset, **term)
        self.head = nn.Linear(model.fusion.width, model.spec.state_dim)

    def compute(self, features: Features, batch: Batch) -> TermValue:
        if batch.future is None or batch.future_mask is None:
            raise UserError(f"{self.name} needs a future observation in the batch")
        change = batch.future.state - batch.observation.state
        error = (self.head(features.readout) - change).square()
        return TermValue(value=masked_mean(error, batch.future_mask[:, None]), metrics={})


# objective: {extra: {state_change: {target: "own_term:StateChange", options: {offset: 4}, weight: 0.1}}}
