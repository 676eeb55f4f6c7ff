"""The interface of a backward (how K losses become one gradient), and `one`: the plain sum in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from torch.nn.parameter import Parameter

from tutti.frozen_config import FrozenConfig
from tutti.training.backward.term_gradients import Gradients
from tutti.types import LossTerms


class Backward(ABC):
    """Computes `.grad` of every parameter from the terms of one update. One object serves a whole run.

    `is_sum`: the result is sum_i lambda_i g_i, with g_i as `masked` leaves it. `averages_ranks`: on several
    ranks it averages the gradient of each term over them before it combines them, which every backward must
    do that makes something else than the sum (`tutti.training.backward.term_gradients.averaged_gradients`).
    """

    is_sum: ClassVar[bool] = False
    averages_ranks: ClassVar[bool] = False

    @abstractmethod
    def add(self, terms: LossTerms, accumulation: int) -> None:
        """Adds one micro-batch of `accumulation`; the loss of the update is the mean over them."""

    def finish(self) -> dict[str, float]:
        """Called after the update's last micro-batch, when `.grad` must be complete. Gives metrics."""
        return {}

    def drop(self) -> None:  # noqa: B027 (most keep nothing)
        """Forgets the micro-batches since the last `finish`: the update does not happen."""

    def masked(self, gradients: Gradients) -> Gradients:
        """Gradients of raw terms, None where this backward does not let the term train the parameter."""
        return gradients

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Continues from a saved state."""


class OneBackward(Backward):
    """d total / d theta, total = sum_i lambda_i L_i, in a single pass."""

    is_sum: ClassVar[bool] = True

    def add(self, terms: LossTerms, accumulation: int) -> None:
        """One backward pass; none where the total depends on no parameter that learns."""
        if terms.total.requires_grad:
            (terms.total / accumulation).backward()


class OneBackwardConfig(FrozenConfig):
    """`kind: one`: the plain sum."""

    kind: Literal["one"] = "one"
    may_train: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The loss x part mask: the parts that a term may train. Empty: every term trains every part."""

    def build(self, parameters: Mapping[str, Parameter], terms: Collection[str] = ()) -> OneBackward:
        """The backward of a run that moves these parameters, by name (model... or objective...)."""
        return OneBackward()
