"""The unified loss: every term raw, its lambda, and total = sum_i lambda_i * value_i."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from tutti.objectives.action import ChunkConfig
from tutti.objectives.align import ContrastiveConfig
from tutti.objectives.balancing import Balancing, BalancingConfig, FixedBalancingConfig
from tutti.objectives.custom import CustomTermConfig
from tutti.objectives.recon import FuturePatchesConfig
from tutti.objectives.schedule import Weight, schedule_of
from tutti.objectives.state import FutureStatesConfig
from tutti.objectives.term import Model, Term
from tutti.types import Batch, Features, LossTerms, UserError

# Each place's union of kinds: a further kind is one more member here, told apart by `kind`.
AlignConfig = ContrastiveConfig
ActionConfig = ChunkConfig
ReconConfig = FuturePatchesConfig
StateConfig = FutureStatesConfig

BUILT_IN = ("align", "action", "recon", "state")


class ObjectiveConfig(BaseModel):
    """Which terms there are and what each weighs. `null` removes a built-in term together with its head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    align: AlignConfig | None = AlignConfig()
    action: ActionConfig = ActionConfig()
    recon: ReconConfig | None = ReconConfig()
    state: StateConfig | None = StateConfig()
    extra: dict[Annotated[str, Field(pattern=r"^[a-z]\w*$")], CustomTermConfig] = {}

    @model_validator(mode="after")
    def _own_names(self) -> Self:
        for name in self.extra:
            if name in BUILT_IN:
                raise ValueError(f"extra.{name}: the name belongs to a built-in term; choose another")
        return self

    def weights(self) -> dict[str, Weight]:
        """The weight of each term that is on, in the order of the sum."""
        chosen = {
            "align": self.align,
            "action": self.action,
            "recon": self.recon,
            "state": self.state,
            **self.extra,
        }
        return {name: config.weight for name, config in chosen.items() if config is not None}

    def build(self, model: Model, balancing: BalancingConfig | None = None) -> UnifiedLoss:
        """The loss for `model`, with fresh heads from torch's global generator; lambdas are fixed unless
        `balancing` says otherwise. Raises UserError where sizes clash or two terms want different futures."""
        terms: dict[str, Term] = {}
        if self.align is not None:
            terms["align"] = self.align.build(model)
        terms["action"] = self.action.build(model)
        if self.recon is not None:
            terms["recon"] = self.recon.build(model)
        if self.state is not None:
            terms["state"] = self.state.build(model)
        for name, config in self.extra.items():
            terms[name] = config.build(model, name)
        schedules = {name: schedule_of(weight) for name, weight in self.weights().items()}
        return UnifiedLoss(terms, (balancing or FixedBalancingConfig()).build(schedules))


class UnifiedLoss(nn.Module):
    """L_total = sum_i lambda_i * L_i, summed in the order of `terms`, in one backward pass.

    A term whose lambda is exactly 0 (switched off, or its schedule has ended) is not computed and costs
    nothing: it is then absent from `values` and `lambdas`, rather than reported as 0. `needs_future` is the
    offset k of the future observation that a batch must hold, or None if no term ever needs one.
    """

    def __init__(self, terms: dict[str, Term], balancing: Balancing) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.balancing = balancing
        asked = {
            name: term.needs_future
            for name, term in terms.items()
            if term.needs_future is not None and balancing.is_ever_active(name)
        }
        if len(set(asked.values())) > 1:
            wishes = ", ".join(f"{name} wants {offset}" for name, offset in asked.items())
            raise UserError(
                f"objective: a batch holds one future observation, but {wishes}; use one offset for all."
            )
        self.needs_future: int | None = next(iter(asked.values()), None)
        wanted = {
            term.needs_states
            for name, term in terms.items()
            if term.needs_states and balancing.is_ever_active(name)
        }
        if len(wanted) > 1:
            raise UserError(
                f"objective: a batch holds one set of later states, but terms want {sorted(wanted)}; use the "
                "same offsets for all."
            )
        self.needs_states: tuple[int, ...] = next(iter(wanted), ())

    def forward(self, features: Features, batch: Batch, progress: float = 0.0) -> LossTerms:
        """Every active term at `progress` in [0, 1] of the run, its lambda, the total and the metrics."""
        values: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if not self.balancing.is_active(name, progress):
                continue
            result = term(features, batch)
            values[name] = result.value
            metrics.update({key: metric.detach() for key, metric in result.metrics.items()})
        lambdas = self.balancing(values, progress)
        total = features.readout.new_zeros(())
        for name, value in values.items():
            total = total + lambdas[name] * value
        return LossTerms(values=values, lambdas=lambdas, total=total, metrics=metrics)

    def __call__(self, features: Features, batch: Batch, progress: float = 0.0) -> LossTerms:
        return super().__call__(features, batch, progress)
