"""A loss term of your own: the model also learns how its state will have changed `offset` actions later."""

from typing import Any

from torch import nn

from tutti.objectives.term import Model, Term, TermValue
from tutti.types import Batch, DataNeeds, Features


class StateChange(Term):
    """mean (head(readout) - (s_{t+k} - s_t))^2 over dimensions and the windows that have a state and whose
    t + k is in the episode."""

    def __init__(self, model: Model, *, offset: int = 4, **term: Any) -> None:
        super().__init__(**term)
        self.offset = offset
        self.head = nn.Linear(model.fusion.width, model.spec.state_dim)

    @classmethod
    def needs(cls, *, offset: int = 4) -> DataNeeds:
        return DataNeeds(futures=(offset,), labels=("state",))

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        change = self.future(batch, self.offset).observation.state - batch.observation.state
        return TermValue(value=self.mean((self.head(features.readout) - change).square(), batch))


# objective: {state_change: {kind: "own_term:StateChange", options: {offset: 4}, weight: 0.1}}
