"""Balancings that learn as they go, by an Adam of their own: uncertainty (log-variances) and FAMO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.weight_schedule import WeightSchedule
from tutti.types import UserError

DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8


class VectorAdam(nn.Module):
    """Adam (1412.6980) with its usual constants: m and v are running means of g and g^2, and the step is

        learning_rate * m^ / (sqrt(v^) + 1e-8),    m^ = m / (1 - 0.9^n),    v^ = v / (1 - 0.999^n).

    Differs: an entry that takes no part in an update keeps its m, v and n, each entry has an n of its own.
    """

    def __init__(self, size: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.mean, self.square, self.updates = (
            nn.Buffer(torch.zeros(size, dtype=torch.float64)) for _ in range(3)
        )

    @torch.no_grad()
    def step(self, gradient: Float[Tensor, " k"], counts: Bool[Tensor, " k"]) -> Float[Tensor, " k"]:
        """What to subtract from the vector: 0 for the entries that do not count, whatever their gradient."""
        gradient = torch.where(counts, gradient, 0)
        self.updates += counts
        self.mean.copy_(torch.where(counts, torch.lerp(self.mean, gradient, 1 - DECAY), self.mean))
        square = SQUARE_DECAY * self.square + (1 - SQUARE_DECAY) * gradient.square()
        self.square.copy_(torch.where(counts, square, self.square))
        n = self.updates.clamp(min=1)
        mean, spread = self.mean / (1 - DECAY**n), (self.square / (1 - SQUARE_DECAY**n)).sqrt()
        return torch.where(counts, self.learning_rate * mean / (spread + EPSILON), 0)


class UncertaintyBalancingConfig(FrozenConfig):
    """`kind: uncertainty`. Terms must not be negative."""

    kind: Literal["uncertainty"] = "uncertainty"
    learning_rate: float = Field(
        default=1e-3, gt=0, description="Learning rate of the Adam that moves the log-variances."
    )
    limit: float = Field(
        default=5.0,
        gt=0,
        description="Bound of each log variance s; b = exp(-s) stays in exp(-limit) to exp(limit).",
    )

    def build(self, schedules: Mapping[str, WeightSchedule]) -> UncertaintyBalancing:
        """The balancing of terms with these schedules."""
        return UncertaintyBalancing(schedules, self)


class UncertaintyBalancing(Balancing):
    """b_i = exp(-s_i); after each update s_i follows the gradient of (exp(-s_i) L_i + s_i) / 2,

        d/ds_i = (1 - exp(-s_i) L_i) / 2,    by Adam with a learning rate of its own, from s_i = 0.

    s_i is the log of a variance. It settles where exp(s_i) = L_i, so b_i = 1 / L_i: the sum of logarithms is
    minimised, which favours what is easy, and while a loss keeps falling its factor keeps growing. L_i is the
    raw term, whatever its weight; an update in which it is exactly 0 (nothing to learn from) does not count.

    Source: uncertainty weighting, 1705.07115. Differs: twice the published factor exp(-s_i) / 2, so that
    s = 0 is the plain sum; the s_i / 2 that regularises is no part of the total, which stays
    sum_i lambda_i L_i; s_i has a limit. The scale is the method's own: b does not sum to K.
    """

    def __init__(self, schedules: Mapping[str, WeightSchedule], config: UncertaintyBalancingConfig) -> None:
        super().__init__(schedules)
        self.limit = config.limit
        self.log_variance = nn.Buffer(torch.zeros(len(self.names), dtype=torch.float64))
        self.adam = VectorAdam(len(self.names), config.learning_rate)

    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        return self.by_name((-self.log_variance).exp(), values)

    @torch.no_grad()
    def after_step(self, values: Mapping[str, float]) -> None:
        """Moves s. Raises: UserError if a term is negative."""
        for name, value in values.items():
            if value < 0:
                raise UserError(
                    f"balancing.kind is uncertainty, which takes losses of at least 0, but '{name}' is "
                    f"{value:.4g}. Use another balancing, or shift the term."
                )
        losses = self.in_order(values, self.log_variance)
        gradient = (1 - (-self.log_variance).exp() * losses) / 2
        self.log_variance -= self.adam.step(gradient, losses > 0)
        self.log_variance.clamp_(-self.limit, self.limit)


class FamoBalancingConfig(FrozenConfig):
    """`kind: famo`. Terms must stay above their lower bound."""

    kind: Literal["famo"] = "famo"
    learning_rate: float = Field(
        default=0.025, gt=0, description="Learning rate of the Adam that moves the logits."
    )
    decay: float = Field(
        default=1e-3, ge=0, description="Weight decay of the logits: pulls all terms towards equal factors."
    )
    bounds: dict[str, float] = Field(default={}, description="Least value of a term; one not named: 0.")

    def build(self, schedules: Mapping[str, WeightSchedule]) -> FamoBalancing:
        """The balancing of terms with these schedules. Raises UserError if `bounds` names no such term."""
        return FamoBalancing(schedules, self)


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

    def __init__(self, schedules: Mapping[str, WeightSchedule], config: FamoBalancingConfig) -> None:
        super().__init__(schedules)
        if unknown := sorted(set(config.bounds) - set(self.names)):
            raise UserError(
                f"balancing.bounds names {', '.join(unknown)}; the objective has {', '.join(self.names)}."
            )
        self.decay = config.decay
        self.logits = nn.Buffer(torch.zeros(len(self.names), dtype=torch.float64))
        self.least = {name: config.bounds.get(name, 0.0) for name in self.names}
        least = torch.tensor(list(self.least.values()), dtype=torch.float64)
        self.bounds = nn.Buffer(least, persistent=False)
        self.adam = VectorAdam(len(self.names), config.learning_rate)

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
