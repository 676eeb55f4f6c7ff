"""Objective: what the trainer asks of a loss: the terms of a batch, hooks around an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tutti.types import Batch, Features, Label, LossTerms, UserError


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


class Objective(nn.Module, ABC):
    """Features and a batch to `LossTerms`. Only `names` and `forward` must be written."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The terms, in the order of the sum."""

    def labels(self, name: str) -> tuple[Label, ...]:
        """The labels that a row must have to count in this term."""
        return ()

    @property
    def hooks(self) -> UpdateHooks:
        """What is called around each update; a balancing, where there is one."""
        return UpdateHooks()

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

    def joined(self, name: str, per_window: Mapping[str, Tensor]) -> dict[str, float]:
        """What the term of this name reports over all held-out windows (`Term.joined`)."""
        return {}

    def update_targets(self, model: nn.Module) -> None:
        """Called after each update of the weights of `model`, for targets that follow them."""


def check_ownership(model: nn.Module, objective: nn.Module) -> None:
    """Raises: UserError if a term or the balancing has registered a part of the model as its own.

    It would be saved in both, its gradient would count twice in the norm and be clipped twice.
    """
    owned: dict[int, str] = {id(module): name for name, module in model.named_modules() if _tensors(module)}
    owned |= {id(value): name for name, value in _tensors(model)}
    for place, mine in [*objective.named_modules(), *_tensors(objective)]:
        if id(mine) in owned:
            holder, _, attribute = place.removeprefix("terms.").rpartition(".")
            what = f"model.{owned[id(mine)]}" if owned[id(mine)] else "the model itself"
            raise UserError(
                f"objective{f'.{holder}' if holder else ''}: the attribute `{attribute}` is {what}, which "
                "the model owns already. Registered here too it would be saved twice, counted twice in the "
                "gradient's norm and clipped twice.\n"
                "  expected: a term owns its head, and uses the model without registering it\n"
                "  cure: take the part from the argument `model` of `compute`: model.vision. For weights of "
                "its own, a term may register a copy.deepcopy of the part."
            )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
