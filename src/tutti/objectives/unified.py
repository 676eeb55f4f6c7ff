"""The unified loss: every term raw, its lambda, and total = sum_i lambda_i * value_i."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.objective import Objective, UpdateHooks
from tutti.objectives.term import Term
from tutti.types import Batch, Features, Label, LossTerms, at_least_float32


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

    def labels(self, name: str) -> tuple[Label, ...]:
        return self.terms[name].needed.labels  # pyright: ignore

    @property
    def hooks(self) -> UpdateHooks:
        return self.balancing

    def forward(
        self,
        features: Features,
        batch: Batch,
        model: nn.Module,
        progress: float = 0.0,
        only: Collection[str] | None = None,
    ) -> LossTerms:
        """Every active term at `progress` in [0, 1] of the run, its lambda, the total and the metrics."""
        values, metrics, by_source = (dict[str, Tensor]() for _ in range(3))
        kept: dict[str, Mapping[str, Tensor]] = {}
        for name, term in self.terms.items():
            if not self.balancing.is_active(name, progress) or (only is not None and name not in only):
                continue
            result = term(features, batch, model)
            values[name] = at_least_float32(result.value)
            kept |= {name: result.per_window} if result.per_window else {}
            by_source |= {} if result.by_source is None else {name: result.by_source}
            for key, metric in result.metrics.items():  # under the term's own name, whatever it is called
                metrics[key if key.startswith(f"{name}/") else f"{name}/{key}"] = metric.detach()
        lambdas = self.balancing(values, progress)
        total = sum((lambdas[name] * values[name] for name in values), start=features.readout.new_zeros(()))
        return LossTerms(
            values=values, lambdas=lambdas, total=total, metrics=metrics, per_window=kept, by_source=by_source
        )

    def joined(self, name: str, per_window: Mapping[str, Tensor]) -> dict[str, float]:
        return self.terms[name].joined(per_window)  # pyright: ignore[reportCallIssue]

    def raw(
        self, features: Features, batch: Batch, model: nn.Module, names: Collection[str]
    ) -> dict[str, Tensor]:
        chosen = {name: term for name, term in self.terms.items() if name in names}
        return {name: at_least_float32(term(features, batch, model).value) for name, term in chosen.items()}

    def update_targets(self, model: nn.Module) -> None:
        for term in self.terms.values():
            term.update_targets(model)  # pyright: ignore[reportCallIssue]
