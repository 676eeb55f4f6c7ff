"""How the lambdas are chosen: `fixed` takes them from the config's numbers and schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tutti.objectives.schedule import WeightSchedule


class Balancing(nn.Module, ABC):
    """Chooses lambda for each term. Its state, if it has any, is in its buffers, hence in the checkpoint."""

    @abstractmethod
    def is_active(self, name: str, progress: float) -> bool:
        """False where the term's lambda is exactly 0 at `progress`: the term is then not computed."""

    @abstractmethod
    def is_ever_active(self, name: str) -> bool:
        """False where the term's lambda is exactly 0 for the whole run: its data need not be loaded."""

    @abstractmethod
    def forward(self, values: dict[str, Float[Tensor, ""]], progress: float) -> dict[str, Float[Tensor, ""]]:
        """lambda of every computed term, detached, in the precision and on the device of its value."""

    def __call__(self, values: dict[str, Float[Tensor, ""]], progress: float) -> dict[str, Float[Tensor, ""]]:
        return super().__call__(values, progress)


class FixedBalancing(Balancing):
    """lambda_i is its schedule at the run's progress, whatever the losses do."""

    def __init__(self, schedules: dict[str, WeightSchedule]) -> None:
        super().__init__()
        self.schedules = schedules

    def is_active(self, name: str, progress: float) -> bool:
        return self.schedules[name].at(progress) != 0

    def is_ever_active(self, name: str) -> bool:
        return not self.schedules[name].is_zero

    def forward(self, values: dict[str, Float[Tensor, ""]], progress: float) -> dict[str, Float[Tensor, ""]]:
        # `full` fills on the device; `torch.tensor` would copy there and make the CPU wait.
        return {
            name: torch.full((), self.schedules[name].at(progress), dtype=value.dtype, device=value.device)
            for name, value in values.items()
        }


class FixedBalancingConfig(BaseModel):
    """`kind: fixed`: no balancing method reliably beats tuned fixed lambdas (2201.04122, 2209.11379)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fixed"] = "fixed"

    def build(self, schedules: dict[str, WeightSchedule]) -> FixedBalancing:
        """The balancing of terms with these schedules."""
        return FixedBalancing(schedules)


# A further kind is one more member of this union.
BalancingConfig = FixedBalancingConfig
