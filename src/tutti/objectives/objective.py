"""Objective: what the trainer asks of a loss: the terms of a batch, and hooks around an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from tutti.objectives.hooks import UpdateHooks
from tutti.types import Batch, Features, LossTerms


class Objective(UpdateHooks, nn.Module, ABC):
    """Features and a batch to `LossTerms`. Only `names` and `forward` must be written."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The terms, in the order of the sum."""

    @abstractmethod
    def forward(
        self,
        features: Features,
        batch: Batch,
        model: nn.Module,
        progress: float = 0.0,
        only: Collection[str] | None = None,
    ) -> LossTerms:
        """The terms at `progress` in [0, 1]; those not named in `only` are not computed (None: all are).

        `model` made the features; its parts may be used, but belong to it.
        """

    if TYPE_CHECKING:
        __call__ = forward

    def update_targets(self, model: nn.Module) -> None:
        """Called after each update of the weights of `model`, for targets that follow them."""
