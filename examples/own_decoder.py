"""An action decoder of your own: it also learns how sure it is, and its error counts accordingly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tutti.models.interfaces import ActionDecoder
from tutti.types import Batch, DataSpec, Features


class Laplace(ActionDecoder):
    """e = |a^ - a| / s + log(s / least): minus the log-likelihood of a Laplace distribution; s is learned."""

    def __init__(self, spec: DataSpec, width: int, *, hidden: int = 256, least: float = 0.05) -> None:
        super().__init__()
        self.chunk, self.least = (2, spec.horizon, spec.action_dim), least
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 2 * spec.horizon * spec.action_dim)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        action, spread = self.out(self.hidden(features.readout).relu()).unflatten(1, self.chunk).unbind(1)
        ratio = 1 + F.softplus(spread)  # s / least
        return (action - batch.actions).abs() / (self.least * ratio) + ratio.log()

    def predict(self, features: Features) -> Tensor:
        return self.out(self.hidden(features.readout).relu()).unflatten(1, self.chunk)[:, 0]


# model: {action: {kind: "own_decoder:Laplace", options: {hidden: 256}}}
