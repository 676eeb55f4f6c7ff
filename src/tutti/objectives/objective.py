"""Objective: what the trainer asks of a loss: the terms of a batch, hooks around an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tutti.types import Batch, Features, Label, LossTerms, UserError

PRIMARY = "action"
"""The term that the others are to help; what they share with it is where they compete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermSize:
    """How long a term's vector (a gradient, or a part of an update) is: `own` and that of the primary term,
    `primary`, over the parameters that both move; `anywhere`: its own over all that it moves. `value` is the
    raw term."""

    own: float
    primary: float
    anywhere: float
    value: float


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A stretch of a run as a balancing needs to know it: updates `start` to `end` - 1 (0-based), whether its
    schedules begin anew, and the terms that count."""

    start: int
    end: int
    restarts: bool
    terms: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a balancing has found: a table in words, and numbers by their names in the records."""

    table: str
    values: dict[str, float]


class UpdateHooks:
    """Methods that the trainer calls around each update. All may stay as they are."""

    def before_step(self, step: int) -> None:
        """Called before each update of a run (0-based), whether it is made or skipped; not before one that
        is rehearsed without those before it."""

    def before_run(self, phases: Sequence[PhaseSpan], warmup: int) -> None:
        """Called once, before all others, with the phases of the run and the updates in which its learning
        rate rises."""

    def unmeasured(self, step: int) -> tuple[str, ...]:
        """The terms whose raw gradients must be measured on the batches of this update (0-based) before it is
        made, the term that the others are compared with among them; none: nothing to measure."""
        return ()

    def observe_gradients(self, sizes: Mapping[str, TermSize]) -> None:
        """Sizes of d L_i / d theta of the `unmeasured` terms, of all micro-batches and ranks."""

    @property
    def observes(self) -> Collection[str]:
        """The terms that `observe_updates` asks for."""
        return ()

    def window(self, step: int) -> range | None:
        """The updates over which the terms' parts of the update are measured, of which this is one."""
        return None

    def observe_updates(self, row: int, sizes: Mapping[str, TermSize]) -> None:
        """Sizes of the raw terms' parts of an update, preconditioned momentum (docs/background/balancing.md),
        in the second half of a `window`, whose update it is by `row`. Updates left out are not shown."""

    def take_news(self, progress: float) -> Calibration | None:
        """What was calibrated since the last call, with the lambdas at `progress`."""
        return None

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

    def raw(
        self, features: Features, batch: Batch, model: nn.Module, names: Collection[str]
    ) -> dict[str, Tensor]:
        """The named terms, whether they count at present or not."""
        return self(features, batch, model, only=names).values

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
