"""The progress term: how much of the episode lies behind?"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.distributed.ranks import mean_over_ranks
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue
from tutti.objectives.weight_schedule import Weight
from tutti.types import Batch, Features, UserError, precise


class ProgressConfig(BaseTermConfig):
    """`kind: progress`."""

    kind: Literal["progress"] = "progress"
    weight: Weight = 0.1
    hidden: PositiveInt = Field(default=128, description="width of the head's hidden layer")

    def build(self, model: Model, name: str) -> ProgressTerm:
        """The term for a readout as wide as that of `model`."""
        return ProgressTerm(self, model.fusion.width, name=name)


class ProgressTerm(Term):
    """L = mean_i [-y_i log y^_i - (1 - y_i) log(1 - y^_i)] with y = t / (length - 1) and
    y^ = sigmoid(head(readout)).

    The cross-entropy of a soft target, because its gradient in the logit is y^ - y: it does not vanish where
    the sigmoid saturates, as that of an absolute or squared error would. Its floor is not 0 but the mean
    entropy of y; where the episode's end cannot be foreseen, y^ learns the mean progress, not the median.

    Source: progress as a target beside the action, ProgVLA (2605.28231; abstract). Differs: theirs are
    critics over the remaining horizon that also weigh the imitation; ours is a plain regression.
    """

    def __init__(self, config: ProgressConfig, width: int, *, name: str = "progress") -> None:
        super().__init__(name=name, stop_gradient=config.stop_gradient)
        self.head = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1))

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The mean over the batch; metrics `floor`, `mean_baseline` (the value of answering the batch's mean
        progress each time) and `l1`, the mean |y^ - y|.

        Raises: UserError if the batch has no progress.
        """
        if batch.progress is None:
            raise UserError(
                f"objective.{self.name} needs batch.progress, t / (length - 1) of each window, but the batch "
                "has none. Build it with tutti.data.windows.WindowIndex.gather, or set "
                f"objective.{self.name} to null."
            )
        logits = precise(self.head(features.readout)[:, 0])
        target = batch.progress.to(logits.dtype)
        value = F.binary_cross_entropy_with_logits(logits, target)
        with torch.no_grad():
            metrics = {
                f"{self.name}/floor": binary_entropy(target).mean(),
                f"{self.name}/mean_baseline": binary_entropy(mean_over_ranks(target.mean())),
                f"{self.name}/l1": (logits.sigmoid() - target).abs().mean(),
            }
        return TermValue(value=value, metrics=metrics)


def binary_entropy(share: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-y log y - (1 - y) log(1 - y), in nats; 0 log 0 is 0."""
    return torch.special.entr(share) + torch.special.entr(1 - share)
