"""K gradients, one for each term, combined by weights that follow from their Gramian matrix."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor
from torch.nn.parameter import Parameter

from tutti.frozen_config import FrozenConfig
from tutti.objectives.objective import PRIMARY
from tutti.training.backward.aggregators import AggregatorConfig, CosineGateAggregatorConfig, Weighting
from tutti.training.backward.masked import BackwardUnderMask
from tutti.training.backward.term_gradients import (
    Gradients,
    added,
    averaged_gradients,
    separate_gradients,
    shared_numbers,
)
from tutti.training.rng import own_randomness
from tutti.types import LossTerms

log = logging.getLogger("tutti.training")

ALL = "all"


class KGradientsConfig(FrozenConfig):
    """`kind: k_gradients`: one gradient for each term, and an aggregator that combines them."""

    kind: Literal["k_gradients"] = "k_gradients"
    aggregator: AggregatorConfig = Field(
        default=CosineGateAggregatorConfig(), description="How the K gradients become one."
    )
    scope: Literal["all", "part"] = Field(
        default="all", description="One Gramian for all shared parameters, or one for each part of the model."
    )
    rescale: Literal["sum", "none"] = Field(
        default="sum",
        description="sum: weights without a conflict add up to K, so that they compare with the plain sum; "
        "none: as published, mostly to 1.",
    )
    may_train: dict[str, tuple[str, ...]] = Field(
        default={}, description="Parts that a term may train; a term that is not named trains every part."
    )
    seed: int = Field(default=0, ge=0, description="Seed of random draws; the run's unless given.")

    def build(self, parameters: Mapping[str, Parameter], terms: Collection[str] = ()) -> KGradientsBackward:
        """The backward of a run that moves these parameters.

        Raises: UserError for an unknown name, or if a solver is not installed.
        """
        return KGradientsBackward(self, parameters, terms)


class KGradientsBackward(BackwardUnderMask):
    """grad_p = sum_i w_i g_i,p over the shared parameters p, and the plain sum_i g_i,p elsewhere.

    g_i is the gradient of lambda_i L_i, summed over the micro-batches of an update before anything else.
    Shared are the parameters that the action term and at least one other term move: a head has a row of zeros
    for the action, and an aggregator would stop or distort it, so heads, the action decoder and what action
    does not reach get their plain sum. G_ij = g_i . g_j is taken in float64 over all of the shared
    parameters, or (scope `part`) over those of each part, which then has weights of its own. In an update
    without an action term all is the plain sum.

    Costs K backward passes instead of one and K gradients of memory; the solvers work on K x K numbers.
    """

    averages_ranks: ClassVar[bool] = True

    def __init__(
        self, config: KGradientsConfig, parameters: Mapping[str, Parameter], terms: Collection[str] = ()
    ) -> None:
        super().__init__(config.may_train, parameters, terms)
        self.config = config
        self.updates = 0
        self._weightings: dict[str, Weighting] = {}
        self._new_weighting()  # a missing solver is an error now, not in the first update
        self._sums: Gradients = {}
        self._told = False

    def add(self, terms: LossTerms, accumulation: int) -> None:
        weighted = {name: terms.lambdas[name] * value / accumulation for name, value in terms.values.items()}
        # Summed pass by pass: besides the K sums, one further gradient is in memory at a time.
        for name, found in separate_gradients(weighted, self.parameters, self.numbers, keep_graph=False):
            self._sums = added(self._sums, {name: found})

    def finish(self) -> dict[str, float]:
        """Combines the gradients into `.grad`. Gives each term's weight and each pair's cosine, by scope."""
        metrics: dict[str, float] = {}
        self._sums = averaged_gradients(self._sums)
        weights: dict[int, dict[str, float]] = {}
        for scope, numbers in self._scopes().items():
            found, measured = self._weights(scope, numbers)
            weights |= dict.fromkeys(numbers, found)
            where = "" if scope == ALL else f"{scope}/"
            metrics |= {f"backward/weight/{where}{term}": weight for term, weight in found.items()}
            metrics |= {f"backward/cosine/{where}{pair}": cosine for pair, cosine in measured.items()}
        for number, parameter in enumerate(self.parameters):
            own = weights.get(number, {})
            moved = {name: g for name, sums in self._sums.items() if (g := sums[number]) is not None}
            if moved:
                # In the parameter's own layout, which fused optimisers and clipping rely on.
                total = torch.zeros_like(parameter)
                for name, gradient in moved.items():
                    total.add_(gradient, alpha=own.get(name, 1.0))
                parameter.grad = total
        self._sums = {}
        self.updates += 1
        return metrics

    def drop(self) -> None:
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        states = {scope: weighting.state_dict() for scope, weighting in self._weightings.items()}
        return {"updates": self.updates, "weightings": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self._weightings = state["updates"], {}
        for scope, saved in state["weightings"].items():
            self._weightings[scope] = self._new_weighting()
            self._weightings[scope].load_state_dict(saved)

    def _new_weighting(self) -> Weighting:
        return self.config.aggregator.build(rescaled=self.config.rescale == "sum")

    def _scopes(self) -> dict[str, list[int]]:
        """The shared parameters by scope."""
        shared = shared_numbers(self._sums)
        if not shared and len(self._sums) > 1 and not self._told:
            log.info("backward: '%s' shares nothing with another term at present: plain sum", PRIMARY)
            self._told = True
        if self.config.scope == ALL:
            return {ALL: shared} if shared else {}
        parts: dict[str, list[int]] = {}
        for number in shared:
            parts.setdefault(self.parts[number], []).append(number)
        return parts

    def _weights(self, scope: str, numbers: Sequence[int]) -> tuple[dict[str, float], dict[str, float]]:
        """The weights of the terms that move these parameters, and the cosines of their pairs."""
        # The primary term's row is the first: the gate and PCD hold all others against it.
        order = [PRIMARY, *(name for name in self._sums if name != PRIMARY)]
        terms = [name for name in order if any(self._sums[name][number] is not None for number in numbers)]
        gramian = gramian_of([[self._sums[name][number] for number in numbers] for name in terms])
        plain = dict.fromkeys(terms, 1.0)
        if not bool(gramian.isfinite().all()):
            return plain, {}  # the trainer stops at a gradient that is not finite, and says where it is
        if scope not in self._weightings:
            self._weightings[scope] = self._new_weighting()
        weighting = self._weightings[scope]
        # A gradient of zeros is no objection, but MGDA and CAGrad would take it for one and stop.
        moving = [place for place in range(len(terms)) if weighting.keeps_zeros or gramian[place, place] > 0]
        chosen = [terms[place] for place in moving]
        if len(chosen) > 1:
            # A draw depends on run, update and scope alone, so that a resumed run draws it again.
            with own_randomness(self.config.seed, self.updates, zlib.crc32(scope.encode())):
                found = weighting.weights(gramian[moving][:, moving], chosen)
            plain |= dict(zip(chosen, found.tolist(), strict=True))
        return plain, cosines(gramian, terms)


def gramian_of(rows: Sequence[Sequence[Tensor | None]]) -> Float64[Tensor, "k k"]:
    """G_ij = sum over the parameters of g_i . g_j in float64, on the CPU; None is a gradient of zeros."""
    total: Tensor | None = None
    for gradients in zip(*rows, strict=True):
        there = [gradient for gradient in gradients if gradient is not None]
        if there:
            zeros = torch.zeros_like(there[0])
            stacked = torch.stack([zeros if gradient is None else gradient for gradient in gradients])
            flat = stacked.to(torch.float64).flatten(1)
            product = flat @ flat.T
            total = product if total is None else total + product
    return torch.zeros(len(rows), len(rows), dtype=torch.float64) if total is None else total.cpu()


def cosines(gramian: Float64[Tensor, "k k"], terms: Sequence[str]) -> dict[str, float]:
    """cos_ij = G_ij / sqrt(G_ii G_jj) of every pair, named "a~b", unless one of the two is zero."""
    norms = gramian.diagonal().sqrt().tolist()
    return {
        f"{terms[i]}~{terms[j]}": float(gramian[i, j]) / (norms[i] * norms[j])
        for i, j in combinations(range(len(terms)), 2)
        if norms[i] * norms[j] > 0
    }
