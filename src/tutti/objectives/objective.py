"""What the trainer asks of an objective: the terms of a batch, and a few moments at which it may act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from torch import nn

from tutti.types import Batch, Features, LossTerms


class Objective(nn.Module, ABC):
    """Features and a batch to `LossTerms`. Only `forward` must be written; the rest may stay as it is."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The terms, in the order of the sum."""

    @abstractmethod
    def forward(
        self, features: Features, batch: Batch, progress: float = 0.0, only: Collection[str] | None = None
    ) -> LossTerms:
        """The terms at `progress` in [0, 1]; those not named in `only` are not computed (None: all are)."""

    def __call__(
        self, features: Features, batch: Batch, progress: float = 0.0, only: Collection[str] | None = None
    ) -> LossTerms:
        return super().__call__(features, batch, progress, only)

    def before_step(self, step: int) -> None:
        """Called before each update of a run (0-based), whether it is made then or left out."""

    def wants_gradients(self, step: int) -> bool:
        """True if `observe_gradients` must be called at this update (0-based), before its last backward
        pass."""
        return False

    def observe_gradients(self, norms: Mapping[str, float]) -> None:
        """Norm of d L_i / d theta of each raw term, a mean over the update's micro-batches, over the
        parameters that the action term moves too."""

    @property
    def looks_again(self) -> bool:
        """True if `look_again` must be called after each update: it costs one more forward pass."""
        return False

    def look_again(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """The raw terms of the same batches before and after the update."""

    def after_step(self, values: Mapping[str, float]) -> None:
        """Called after each update with the step's raw terms, means over its micro-batches."""
