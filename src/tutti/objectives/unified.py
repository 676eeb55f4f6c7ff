"""The unified loss: every term raw, its lambda, and total = sum_i lambda_i * value_i."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from tutti.objectives.balancing.interface import Balancing, FixedBalancingConfig
from tutti.objectives.balancing.kinds import BalancingConfig
from tutti.objectives.objective import Objective
from tutti.objectives.ownership import check_ownership
from tutti.objectives.term import Model, Term
from tutti.objectives.terms.action import ChunkConfig
from tutti.objectives.terms.contrastive import ContrastiveConfig
from tutti.objectives.terms.future_patches import FuturePatchesConfig
from tutti.objectives.terms.future_states import FutureStatesConfig
from tutti.objectives.terms.kinds import TermConfig
from tutti.objectives.weight_schedule import Weight, schedule_of
from tutti.types import Batch, DataNeeds, Features, LossTerms, UserError, precise

DEFAULT_KINDS = {
    "align": "contrastive",
    "action": "chunk",
    "recon": "future_patches",
    "state": "future_states",
}
"""What a term of the default objective is where its `kind` is not given."""


class ObjectiveConfig(BaseModel):
    """Which terms there are and what each weighs: any number of them, each under a name of its own.

    `align`, `action`, `recon` and `state` are there unless they are set to `null`, which removes the term
    together with its head; `action` must stay. Every other key is a further term: `{kind: ..., weight: ...}`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, TermConfig | None]  # pyright: ignore[reportIncompatibleVariableOverride]

    align: TermConfig | None = Field(
        default=ContrastiveConfig(),
        description="Aligns pictures and text; contrastive unless `kind` says otherwise.",
    )
    action: TermConfig = Field(
        default=ChunkConfig(), description="The error of the predicted action chunk: the loss of the policy."
    )
    recon: TermConfig | None = Field(
        default=FuturePatchesConfig(), description="Predicts what changes in the pictures some steps later."
    )
    state: TermConfig | None = Field(
        default=FutureStatesConfig(), description="Predicts later states from pictures and text."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        for name, kind in DEFAULT_KINDS.items():
            if isinstance(filled.get(name), dict) and "kind" not in filled[name]:
                filled[name] = {"kind": kind, **filled[name]}
        for name, value in filled.items():
            if not (isinstance(name, str) and name.isidentifier() and name.islower()):
                raise ValueError(f"{name!r} cannot be a term's name: use lower-case letters, digits and _")
            if isinstance(value, dict) and "kind" not in value:
                near = difflib.get_close_matches(name, DEFAULT_KINDS, n=1)
                meant = f" Did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"'{name}' is a further term, which needs a `kind`.{meant}")
        return filled

    def terms(self) -> dict[str, TermConfig]:
        """The terms that are on, by name, in the order of the sum."""
        default = {name: getattr(self, name) for name in DEFAULT_KINDS}
        chosen = {**default, **(self.__pydantic_extra__ or {})}
        return {name: config for name, config in chosen.items() if config is not None}

    def weights(self) -> dict[str, Weight]:
        """The weight of each term that is on, in the order of the sum."""
        return {name: config.weight for name, config in self.terms().items()}

    def needs(self) -> DataNeeds:
        """What the terms that ever count ask of the data, from the keys of the config alone.

        >>> ObjectiveConfig().needs().futures
        (4,)
        >>> ObjectiveConfig.model_validate({"recon": None}).needs().futures
        ()

        Raises: UserError if a term needs key frames and names no gripper, or two terms name different ones.
        """
        needs = {
            name: config.needs(name)
            for name, config in self.terms().items()
            if not schedule_of(config.weight).is_zero
        }
        for name, asked in needs.items():
            if "next_key" in asked.states and not asked.grippers:
                raise UserError(
                    f"objective.{name} needs the states at the next key frames, but names no gripper, whose "
                    "opening and closing makes them: give `grippers`, its dimensions in the action."
                )
        grippers = {name: list(asked.grippers) for name, asked in needs.items() if asked.grippers}
        if len({frozenset(dimensions) for dimensions in grippers.values()}) > 1:
            named = ", ".join(f"objective.{name}: {dimensions}" for name, dimensions in grippers.items())
            raise UserError(
                f"The terms' grippers differ ({named}), but a batch has one next key frame each. Name the "
                "same dimensions in all of them."
            )
        return DataNeeds.union(needs.values())

    def build(self, model: Model, balancing: BalancingConfig | None = None) -> UnifiedLoss:
        """The loss for `model`, with fresh heads from torch's global generator; lambdas are fixed unless
        `balancing` says otherwise. Raises UserError where sizes clash or a term owns what `model` owns."""
        terms = {name: config.build(model, name) for name, config in self.terms().items()}
        schedules = {name: schedule_of(weight) for name, weight in self.weights().items()}
        loss = UnifiedLoss(terms, (balancing or FixedBalancingConfig()).build(schedules))
        if isinstance(model, nn.Module):
            check_ownership(model, loss)
        return loss


class UnifiedLoss(Objective):
    """L_total = sum_i lambda_i * L_i, summed in the order of `terms`, in one backward pass.

    A term whose lambda is exactly 0 (switched off, or its schedule has ended), or which is not among `only`,
    is not computed and costs nothing: it is then absent from `values` and `lambdas`, rather than reported as
    0.
    """

    def __init__(self, terms: dict[str, Term], balancing: Balancing) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.balancing = balancing

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.terms)

    def forward(
        self,
        features: Features,
        batch: Batch,
        model: nn.Module,
        progress: float = 0.0,
        only: Collection[str] | None = None,
    ) -> LossTerms:
        """Every active term at `progress` in [0, 1] of the run, its lambda, the total and the metrics."""
        values: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if not self.balancing.is_active(name, progress) or (only is not None and name not in only):
                continue
            result = term(features, batch, model)
            values[name] = precise(result.value)
            metrics.update({key: metric.detach() for key, metric in result.metrics.items()})
        lambdas = self.balancing(values, progress)
        total = features.readout.new_zeros(())
        for name, value in values.items():
            total = total + lambdas[name] * value
        return LossTerms(values=values, lambdas=lambdas, total=total, metrics=metrics)

    def before_step(self, step: int) -> None:
        self.balancing.before_step(step)

    def wants_gradients(self, step: int) -> bool:
        return self.balancing.wants_gradients(step)

    def observe_gradients(self, norms: Mapping[str, float]) -> None:
        self.balancing.observe_gradients(norms)

    @property
    def needs_losses_after_step(self) -> bool:
        return self.balancing.needs_losses_after_step

    def reevaluate(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self.balancing.reevaluate(before, after)

    def after_step(self, values: Mapping[str, float]) -> None:
        self.balancing.after_step(values)

    def update_targets(self, model: nn.Module) -> None:
        for term in self.terms.values():
            term.update_targets(model)  # pyright: ignore[reportCallIssue]
