"""Config of the objective: its terms by name, and how their lambdas are chosen.

What a term or the balancing may be is a union, told apart by `kind`: a further kind is one more member.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from torch import nn

from tutti.durations import require_steps
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.balancing.learned import FamoBalancingConfig, UncertaintyBalancingConfig
from tutti.objectives.balancing.shares import SharesBalancingConfig
from tutti.objectives.balancing.softmax import DwaBalancingConfig, RandomWeightsBalancingConfig
from tutti.objectives.objective import PRIMARY, check_ownership
from tutti.objectives.term import BaseTermConfig, Model, Term
from tutti.objectives.terms.actions import ChunkConfig, InverseDynamicsConfig
from tutti.objectives.terms.alignment import ContrastiveConfig, SigmoidConfig
from tutti.objectives.terms.future_latent import FutureLatentConfig
from tutti.objectives.terms.masked_patches import MaskedPatchesConfig
from tutti.objectives.terms.next_token import NextTokenConfig
from tutti.objectives.terms.patches import ChangedPatchesConfig, FuturePatchesConfig
from tutti.objectives.terms.recoverable_language import RecoverableLanguageConfig
from tutti.objectives.terms.state_contrastive import StateContrastiveConfig
from tutti.objectives.terms.states import FutureStatesConfig, ProgressConfig
from tutti.objectives.unified import UnifiedLoss
from tutti.objectives.weight_schedule import AMOUNTS, WeightSchedule
from tutti.plugin import CUSTOM, CustomConfig, tag_of
from tutti.types import DataNeeds, UserError


class CustomTermConfig(CustomConfig[Term], BaseTermConfig):
    """`kind: "package.module:Class"`, a `Term`: called as `Class(model, **options, **term)`.

    `term` is for its `super().__init__`: the name, the boundaries where gradients stop, the needed data.
    """

    base = Term

    def needs(self, name: str) -> DataNeeds:
        """What the class asks for: `Class.needs(**options)`."""
        key = f"objective.{name}.kind"
        return self.call(self.find(key).needs, key)

    def build(self, model: Model, name: str) -> Term:
        """The term called `name`. Raises UserError, naming the class, if it cannot be made."""
        key = f"objective.{name}.kind"
        return self.call(self.find(key), key, model, **self.arguments(name))


TermConfig = Annotated[
    Annotated[ContrastiveConfig, Tag("contrastive")]
    | Annotated[SigmoidConfig, Tag("sigmoid")]
    | Annotated[StateContrastiveConfig, Tag("state_contrastive")]
    | Annotated[RecoverableLanguageConfig, Tag("recoverable_language")]
    | Annotated[FutureLatentConfig, Tag("future_latent")]
    | Annotated[ProgressConfig, Tag("progress")]
    | Annotated[ChunkConfig, Tag("chunk")]
    | Annotated[FuturePatchesConfig, Tag("future_patches")]
    | Annotated[ChangedPatchesConfig, Tag("changed_patches")]
    | Annotated[MaskedPatchesConfig, Tag("masked_patches")]
    | Annotated[NextTokenConfig, Tag("next_token")]
    | Annotated[InverseDynamicsConfig, Tag("inverse_dynamics")]
    | Annotated[FutureStatesConfig, Tag("future_states")]
    | Annotated[CustomTermConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]


class CustomBalancingConfig(CustomConfig[Balancing]):
    """`kind: "package.module:Class"`, a `Balancing`: `Class(schedules, **options)`."""

    base, key = Balancing, "balancing.kind"


BalancingConfig = Annotated[
    Annotated[SharesBalancingConfig, Tag("shares")]
    | Annotated[UncertaintyBalancingConfig, Tag("uncertainty")]
    | Annotated[DwaBalancingConfig, Tag("dwa")]
    | Annotated[RandomWeightsBalancingConfig, Tag("rlw")]
    | Annotated[FamoBalancingConfig, Tag("famo")]
    | Annotated[CustomBalancingConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]

DEFAULT_KINDS = {
    "align": "contrastive",
    "action": "chunk",
    "recon": "future_patches",
    "state": "future_states",
}
"""What a term of the default objective is where its `kind` is not given."""


_TAKEN = dict.fromkeys(
    dir(nn.ModuleDict()), "torch's containers of modules have an attribute of this name"
) | {
    "total": "the records call the sum of all terms so",
    "metric": "the records call what terms report so",
}
"""What no term can be called, and why."""


class ObjectiveConfig(BaseModel):
    """Which terms there are and what each weighs: any number of them, each under a name of its own.

    `align`, `action`, `recon` and `state` are there unless they are set to `null`, which removes the term
    together with its head; `action` must stay. Every other key is a further term: `{kind: ..., share: ...}`.
    A term has a `weight`, or a `share` relative to action; action itself, the reference, has a weight.
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
        if PRIMARY in filled:
            filled[PRIMARY] = _weighing(filled[PRIMARY])
        for name, value in filled.items():
            if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
                raise ValueError(f"{name!r} cannot be a term's name: use lower-case letters, digits and _")
            if name in _TAKEN:
                raise ValueError(
                    f"'{name}' cannot be a term's name: {_TAKEN[name]}. Take another, such as '{name}_term'"
                )
            if isinstance(value, dict) and "kind" not in value:
                near = difflib.get_close_matches(name, DEFAULT_KINDS, n=1)
                meant = f" Did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"'{name}' is a further term, which needs a `kind`.{meant}")
        return filled

    @model_validator(mode="after")
    def _action_has_a_weight(self) -> Self:
        if self.action.share is not None:
            raise ValueError(f"shares are relative to '{PRIMARY}': give that a weight, and the others shares")
        return self

    def terms(self) -> dict[str, TermConfig]:
        """The terms that are on, by name, in the order of the sum."""
        default = {name: getattr(self, name) for name in DEFAULT_KINDS}
        chosen = {**default, **(self.__pydantic_extra__ or {})}
        return {name: config for name, config in chosen.items() if config is not None}

    def schedules(self) -> dict[str, WeightSchedule]:
        """The weight or share of each term that is on, over the run, in the order of the sum."""
        return {name: config.schedule for name, config in self.terms().items()}

    def shares(self) -> tuple[str, ...]:
        """The terms that have a share."""
        return tuple(name for name, config in self.terms().items() if config.share is not None)

    def needs_of_terms(self) -> dict[str, DataNeeds]:
        """What each of the terms that ever count asks of the data."""
        counted = {name: config for name, config in self.terms().items() if not config.schedule.is_zero}
        return {name: config.needs(name) for name, config in counted.items()}

    def needs(self) -> DataNeeds:
        """What the terms that ever count ask of the data, from the keys of the config alone.

        >>> ObjectiveConfig().needs().futures
        (4,)
        >>> ObjectiveConfig.model_validate({"recon": None}).needs().futures
        ()

        Raises: UserError if a term needs key frames and names no gripper, two terms name different ones, or
        an offset is still in seconds.
        """
        require_steps(self, "objective")
        needs = self.needs_of_terms()
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
        """The loss for `model`, with fresh heads from torch's global generator; lambdas are weights or follow
        from shares, unless `balancing` says otherwise. Raises UserError where sizes clash, a term owns what
        `model` owns, or reads a state that there is not, or has a share that `balancing` cannot give it."""
        require_steps(self, "objective")
        needs = {name: term.needs(name) for name, term in self.terms().items()}
        reading = [name for name, asked in needs.items() if "state" in asked.labels or asked.states]
        if model.spec.state_dim == 0 and reading:
            raise UserError(
                f"{', '.join(f'objective.{name}' for name in reading)}: nothing to learn from, since "
                "the state has no numbers (data.sources.state is none).\n"
                f"  cure: take it out ({' '.join(f'objective.{name}=null' for name in reading)}), or name "
                "the feature that is the state by sources.state."
            )
        terms = {name: config.build(model, name) for name, config in self.terms().items()}
        balancing, shares = balancing or SharesBalancingConfig(), self.shares()
        if isinstance(balancing, SharesBalancingConfig):
            method: Balancing = balancing.build(self.schedules(), shares)
        elif shares:
            raise UserError(no_shares(shares, f"balancing.kind {balancing.kind}"))
        else:
            method = balancing.build(self.schedules())
        loss = UnifiedLoss(terms, method)
        if isinstance(model, nn.Module):
            check_ownership(model, loss)
        return loss


def no_shares(shares: Collection[str], instead: str) -> str:
    """The message that refuses shares beside what sets the lambdas `instead`."""
    weights = " ".join(f"objective.{name}.weight=1" for name in shares)
    return (
        f"{instead} with a share for {', '.join(shares)}: it chooses how much each term counts by itself, so "
        f"a share would not be kept. Give weights ({weights}), or use balancing.kind=shares and "
        "backward.kind=one."
    )


def plain_weights(objective: Any) -> Any:
    """An objective as it is written, in which terms with neither weight nor share weigh 1, not by a share."""
    if not isinstance(objective, dict):
        return objective
    default: dict[str, Any] = {name: {} for name in DEFAULT_KINDS}
    return {name: _weighing(term) for name, term in (default | objective).items()}


def _weighing(term: Any) -> Any:
    """A term as it is written, with a weight of 1 where it has neither weight nor share."""
    plain = isinstance(term, dict) and all(term.get(key) is None for key in AMOUNTS)
    return {**term, "weight": 1.0} if plain else term
