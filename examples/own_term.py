"""A loss term of your own: the model also learns how its state will have changed `offset` actions later."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tutti.objectives.term import Model, Term, TermValue
from tutti.types import Batch, Features, masked_mean


class StateChange(Term):
    """mean m (head(readout) - (s_{t+k} - s_t))^2 over batch and dimensions; m: t + k is in the episode."""

    def __init__(self, model: Model, *, offset: int = 4, **term: Any) -> None:
        super().__init__(needs_futures=(offset,), **term)
        self.offset = offset
        self.head = nn.Linear(model.fusion.width, model.spec.state_dim)

    def mask(self, batch: Batch) -> Tensor:
        return self.future(batch, self.offset).mask[:, None]

    def compute(self, features: Features, batch: Batch) -> TermValue:
        change = self.future(batch, self.offset).observation.state - batch.observation.state
        error = (self.head(features.readout) - change).square()
        return TermValue(value=masked_mean(error, self.mask(batch), of=self.mask), metrics={})


# objective: {state_change: {kind: "own_term:StateChange", options: {offset: 4}, weight: 0.1}}
