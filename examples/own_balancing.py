"""A balancing of your own: every weighted term is as large as the action term, on the average of late."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.weight_schedule import WeightSchedule


class EqualLosses(Balancing):
    """b_i = m_action / m_i; m_i is a running mean of the raw term L_i, from 1 on."""

    def __init__(self, schedules: Mapping[str, WeightSchedule], *, decay: float = 0.99) -> None:
        super().__init__(schedules)
        self.decay = decay
        self.register_buffer("means", torch.ones(len(self.names)))  # in a buffer, so the checkpoint has it

    def factors(self, values: dict[str, Tensor]) -> dict[str, float | Tensor]:
        return self.by_name(self.means[self.names.index("action")] / self.means, values)

    def after_step(self, values: Mapping[str, float]) -> None:
        losses = self.in_order(values, like=self.means)
        self.means = torch.where(losses > 0, torch.lerp(losses, self.means, self.decay), self.means)


# balancing: {kind: "own_balancing:EqualLosses", options: {decay: 0.99}}
