"""Each term's share of the update, now and then: its momentum over a window of consecutive updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.parameter import Parameter

from tutti.training.backward.term_gradients import Gradients
from tutti.training.diagnostics.measures import Parts, update_shares
from tutti.training.optim.optimizers import OptimizerSet
from tutti.training.optim.update_parts import MomentumParts

WINDOW, EVERY = 30, 20
"""Updates of a window, which ends at each so many diagnostic steps: 29 further steps for every twenty."""
FIRST = 2
"""The diagnostic step at which the first window ends: short runs have one too, after their first updates."""


def measured_fraction(every: int) -> float:
    """The fraction of all updates in which the terms' gradients are taken; 0 without diagnostic steps."""
    return min(1.0, (1 + (WINDOW - 1) / EVERY) / every) if every else 0.0


class UpdateShares:
    """Follows the terms' momenta over the last WINDOW updates before a window's end, from 0 on.

    The momentum from before the window is left out: beta^WINDOW of it would be left at the end, 4 % with
    AdamW (beta 0.9), 21 % with Muon (0.95).
    """

    def __init__(self, every: int, optimizer: OptimizerSet, parameters: Mapping[str, Parameter]) -> None:
        self.every, self.optimizer, self.parameters = every, optimizer, parameters
        self.momenta = MomentumParts(optimizer, parameters)
        self.end = 0

    def left(self, number: int) -> int:
        """Updates from update `number` (from 1) to the end of the next window, which begins at WINDOW - 1."""
        return (FIRST * self.every - number) % (EVERY * self.every)

    def follows(self, number: int) -> bool:
        """Whether update `number` (from 1) is in a window."""
        return self.every > 0 and self.left(number) < WINDOW

    def add(
        self,
        number: int,
        gradients: Gradients,
        lambdas: Mapping[str, float],
        clip: Mapping[str, float],
        parts: Parts,
    ) -> dict[str, float]:
        """Adds the gradients of the raw terms in update `number`, whose `.grad` is clipped. Gives
        `update_share/<term>/<part>` at the end of a window."""
        if (end := number + self.left(number)) != self.end:
            self.momenta, self.end = MomentumParts(self.optimizer, self.parameters), end
        weighted: Gradients = {
            term: [None if one is None else lambdas[term] * one for one in own]
            for term, own in gradients.items()
        }
        self.momenta.add(weighted, clip)
        if number != end:
            return {}
        moved, self.momenta = self.momenta.parts(), MomentumParts(self.optimizer, self.parameters)
        return update_shares(moved, dict.fromkeys(moved, 1.0), parts)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values and tensors: none outside of a window."""
        return {"end": self.end, **self.momenta.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues within the window of `state`, if there is one."""
        self.end, self.momenta = state.get("end", 0), MomentumParts(self.optimizer, self.parameters)
        if state:
            self.momenta.load_state_dict(state)
