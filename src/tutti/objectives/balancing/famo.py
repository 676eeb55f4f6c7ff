"""Balancing by FAMO: the logarithms of all terms are to fall at the same rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tutti.frozen_config import FrozenConfig
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.balancing.vector_adam import VectorAdam
from tutti.objectives.weight_schedule import WeightSchedule
from tutti.types import UserError

EPSILON = 1e-8


class FamoBalancingConfig(FrozenConfig):
    """`kind: famo`. Terms must stay above their lower bound."""

    kind: Literal["famo"] = "famo"
    learning_rate: float = Field(default=0.025, gt=0, description="Adam's, of the logits.")
    decay: float = Field(default=1e-3, ge=0, description="Pulls the logits towards 0.")
    bounds: dict[str, float] = Field(default={}, description="Least value of a term; one not named: 0.")

    def build(self, schedules: Mapping[str, WeightSchedule]) -> FamoBalancing:
        """The balancing of terms with these schedules. Raises UserError if `bounds` names no such term."""
        return FamoBalancing(
            schedules, learning_rate=self.learning_rate, decay=self.decay, bounds=self.bounds
        )


class FamoBalancing(Balancing):
    """b_i = K c z_i / (L_i - l_i), z = softmax(w), 1 / c = sum_j z_j / (L_j - l_j), over the K terms.

    That is the gradient of K c sum_i z_i log(L_i - l_i), l the lower bounds; b of the computed terms sums to
    K. After each update the same batches are looked at again, with the same random draws, and Adam makes a
    step of w against z^T d + decay |w|^2 / 2,

        d_i = log(L_i - l_i) before - log(L_i - l_i) after,    gradient z_i (d_i - sum_j z_j d_j) + decay w_i,

    which lowers w_i where the logarithm has fallen most. It costs one more forward pass for each update. A
    term that is exactly at its bound (nothing to learn from) or is not finite has no part in that update.

    With accumulation b is that of each micro-batch, by its part of the losses: the update is not quite that
    of one large batch.

    Source: 2306.03792, algorithm 2. Differs: times K; weights other than 1 multiply b, and w does not know.
    """

    logits: Tensor
    bounds: Tensor

    def __init__(
        self,
        schedules: Mapping[str, WeightSchedule],
        *,
        learning_rate: float = 0.025,
        decay: float = 1e-3,
        bounds: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(schedules)
        unknown = sorted(set(bounds or {}) - set(self.names))
        if unknown:
            raise UserError(
                f"balancing.bounds names {', '.join(unknown)}; the objective has {', '.join(self.names)}."
            )
        self.decay = decay
        self.register_buffer("logits", torch.zeros(len(self.names), dtype=torch.float64))
        least = [(bounds or {}).get(name, 0.0) for name in self.names]
        self.least = dict(zip(self.names, least, strict=True))
        self.register_buffer("bounds", torch.tensor(least, dtype=torch.float64), persistent=False)
        self.adam = VectorAdam(len(self.names), learning_rate)

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        if not values:
            return {}
        bounds, logits = (
            torch.stack([vector[self.names.index(name)] for name in values])
            for vector in (self.bounds, self.logits)
        )
        losses = torch.stack([value.detach() for value in values.values()]).to(self.logits)
        above = losses - bounds
        ratios = torch.softmax(logits, 0) / (above + EPSILON)
        ratios = torch.where(above > 0, ratios, 0)
        total = ratios.sum().clamp(min=torch.finfo(ratios.dtype).tiny)
        return dict(zip(values, len(values) * ratios / total, strict=True))

    @property
    def needs_losses_after_step(self) -> bool:
        return True

    @torch.no_grad()
    def reevaluate(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Moves w. Raises: UserError if a term is below its lower bound."""
        for name, bound in self.least.items():
            value = min(before.get(name, bound), after.get(name, bound))
            if value < bound:
                raise UserError(
                    f"balancing.kind is famo, which takes losses above their lower bound, but '{name}' is "
                    f"{value:.4g} and its bound {bound:.4g}. Set balancing.bounds.{name} to its least value."
                )
        first, second = (self.in_order(losses, self.logits) - self.bounds for losses in (before, after))
        counts = (first > 0) & (second > 0) & (first + second).isfinite()
        change = torch.where(counts, (first + EPSILON).log() - (second + EPSILON).log(), 0)
        shares = torch.softmax(self.logits.masked_fill(~counts, -torch.inf), 0).nan_to_num(0.0)
        gradient = shares * (change - (shares * change).sum()) + self.decay * self.logits
        self.logits -= self.adam.step(gradient, counts)
