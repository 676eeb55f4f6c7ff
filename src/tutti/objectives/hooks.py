"""Hooks around an update: what the trainer tells an objective, and the objective its balancing."""

from __future__ import annotations

from collections.abc import Mapping


class UpdateHooks:
    """Methods that the trainer calls around each update. All may stay as they are."""

    def before_step(self, step: int) -> None:
        """Called before each update of a run (0-based), whether it is made or skipped."""

    def wants_gradients(self, step: int) -> bool:
        """True if `observe_gradients` must be called in this update (0-based), before its last backward
        pass."""
        return False

    def observe_gradients(self, norms: Mapping[str, float]) -> None:
        """Norm of d L_i / d theta of each raw term, a mean over the update's micro-batches, over the
        parameters that the action term moves too."""

    @property
    def needs_losses_after_step(self) -> bool:
        """True if `reevaluate` must be called after each update, which costs one more forward pass."""
        return False

    def reevaluate(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """The raw terms of the same batches before and after the update."""

    def after_step(self, values: Mapping[str, float]) -> None:
        """Called after each update with its raw terms, means over the micro-batches."""
