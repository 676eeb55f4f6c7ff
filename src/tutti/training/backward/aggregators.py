"""Aggregators, which combine K gradients into one: the union of all kinds of `backward.aggregator`.

torchjd 0.18 gives all but `cosine_gate`. Its methods are here whose weights follow from the Gramian of
the gradients of one batch. Not here: ConFIG, GradDrop, NashMTL and TrimmedMean have no such weights;
ExcessMTL keeps K numbers for each parameter; MoDo and SDMGrad need two or three batches for each update; Krum
is for many rows of which some are hostile.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from tutti.frozen_config import FrozenConfig
from tutti.training.backward.weightings import (
    CosineGate,
    StatefulWeighting,
    StatelessWeighting,
    Total,
    Weighting,
)
from tutti.types import UserError


class _Aggregator(FrozenConfig):
    """A weighting of torchjd without a state; a subclass makes it."""

    @abstractmethod
    def _module(self) -> nn.Module: ...

    def _scale(self) -> tuple[Total, float]:
        """`total` and `power` of its `StatelessWeighting`."""
        return "mean", 0.0

    def build(self, rescaled: bool) -> Weighting:
        """The weighting of a run. Raises UserError if a solver that it needs is not installed."""
        total, power = self._scale()
        return StatelessWeighting(self._module(), total=total, power=power, rescaled=rescaled)


class PlainAggregatorConfig(_Aggregator):
    """`sum`: the plain sum, for comparison. `mean`: the same over K, unless rescaled.

    `random`: softmax of normal draws (2111.10603). `pcgrad` (2001.06782): each g_i loses what opposes the
    others, in random order, then the sum. `imtl_g` (Liu et al., Towards impartial multi-task learning, 2021):
    equal projections on all g_i / |g_i|; its direction does not depend on the lambdas.
    """

    kind: Literal["sum", "mean", "random", "pcgrad", "imtl_g"]

    def _scale(self) -> tuple[Total, float]:
        return "sum" if self.kind in ("sum", "pcgrad") else "mean", 0.0

    def _module(self) -> nn.Module:
        names = {"sum": "Sum", "mean": "Mean", "random": "Random", "pcgrad": "PCGrad", "imtl_g": "IMTLG"}
        return _torchjd(names[self.kind])


class ProjectionAggregatorConfig(_Aggregator):
    """`upgrad` (2406.16232): the mean of the projections of all g_i onto what opposes no g_j. `dualproj`: the
    projection of their mean. Needs `tutti-vla[balancing]`.

    `regularization` is added to the diagonal of the Gramian, whose trace is 1: gradients with less than that
    share of the squared norms are not kept from being opposed. Differs: torchjd's 1e-4.
    """

    kind: Literal["upgrad", "dualproj"]
    regularization: float = Field(default=1e-6, gt=0, description="Of the quadratic programme.")

    def _module(self) -> nn.Module:
        def make(aggregation: Any) -> nn.Module:
            from torchjd.linalg import QuadprogProjector

            projector = QuadprogProjector(norm_eps=0.0, reg_eps=self.regularization)
            name = "UPGradWeighting" if self.kind == "upgrad" else "DualProjWeighting"
            return getattr(aggregation, name)(projector=projector)

        return _make(self.kind, make)


class CAGradAggregatorConfig(_Aggregator):
    """`cagrad` (2110.14048): max over d of min_i g_i.d, |d - g_0| <= c |g_0|, g_0 the mean: the plain sum at
    c = 0, longer else. Needs `tutti-vla[balancing]`."""

    kind: Literal["cagrad"] = "cagrad"
    c: float = Field(default=0.4, ge=0, description="Radius around the mean gradient, of its length.")

    def _module(self) -> nn.Module:
        return _make("cagrad", lambda aggregation: aggregation.CAGradWeighting(c=self.c))


class MgdaAggregatorConfig(_Aggregator):
    """`mgda` (1810.04650): the shortest vector of the convex hull of all g_i, by Frank-Wolfe. The term with
    the smallest gradient wins."""

    kind: Literal["mgda"] = "mgda"
    epsilon: float = Field(default=1e-3, gt=0, description="Step size at which it stops.")
    iterations: int = Field(default=100, ge=1, description="Most iterations.")

    def _module(self) -> nn.Module:
        return _torchjd("MGDA", epsilon=self.epsilon, max_iters=self.iterations)


class AlignedMtlAggregatorConfig(_Aggregator):
    """`aligned_mtl` (2305.19000): the singular values of the gradient matrix are made equal: to the smallest
    of them (`min`), the median or the root of the mean square."""

    kind: Literal["aligned_mtl"] = "aligned_mtl"
    scale: Literal["min", "median", "rmse"] = Field(default="min", description="The value they get.")

    def _module(self) -> nn.Module:
        return _torchjd("AlignedMTL", scale_mode=self.scale)


class FairGradAggregatorConfig(_Aggregator):
    """`fairgrad` (2402.15638): weights with (G w)_i = w_i^(-1 / alpha); at alpha = 1 its direction does not
    depend on the lambdas. Differs: rescaled, the weights sum to K; theirs grow as gradients shrink."""

    kind: Literal["fairgrad"] = "fairgrad"
    alpha: float = Field(default=1.0, gt=0, description="1: proportional fairness; large: max-min.")

    def _scale(self) -> tuple[Total, float]:
        return "free", self.alpha / (1 + self.alpha)

    def _module(self) -> nn.Module:
        return _torchjd("FairGrad", alpha=self.alpha)


class GradVacAggregatorConfig(FrozenConfig):
    """`gradvac` (2010.05874): as PCGrad, but towards a running mean of each pair's cosine instead of 0."""

    kind: Literal["gradvac"] = "gradvac"
    decay: float = Field(default=0.5, ge=0, le=1, description="Weight of the present cosine in the mean.")

    def build(self, rescaled: bool) -> Weighting:
        """The weighting of a run; its weights add up to K already."""
        return StatefulWeighting(_torchjd("GradVac", beta=self.decay), ("_phi_t",), keyed_by_precision=True)


class PcdAggregatorConfig(FrozenConfig):
    """`pcd` (2606.29521): the action gradient, moved as little as gives every other term the share `tau` of
    the progress that its own normalised gradient would give; then as long as the action gradient.

    Gradients are normalised by a running mean of their squared norms, so of all lambdas only that of action
    counts. Infeasible constraints are dropped. Evidence comes from compression, not from robots.
    """

    kind: Literal["pcd"] = "pcd"
    tau: float = Field(default=0.02, ge=0, le=1, description="Share of progress for the other terms.")
    decay: float = Field(default=0.999, ge=0, lt=1, description="Of the mean of the squared norms.")

    def build(self, rescaled: bool) -> Weighting:
        """The weighting of a run; the length is that of the action gradient either way."""
        module = _torchjd("PCD", tau=self.tau, beta=self.decay)
        return StatefulWeighting(module, ("_sq_norm_ema", "_n_steps"), keyed_by_precision=False)


class CosineGateAggregatorConfig(FrozenConfig):
    """`cosine_gate` (1812.02224): g_action + sum over the others of max(0, cos(g_action, g_i)) g_i."""

    kind: Literal["cosine_gate"] = "cosine_gate"
    smoothing: float = Field(default=0.9, ge=0, lt=1, description="Decay of the running mean of the cosine.")

    def build(self, rescaled: bool) -> Weighting:
        """The weighting of a run; it has no scale to choose."""
        return CosineGate(self.smoothing)


AggregatorConfig = Annotated[
    PlainAggregatorConfig
    | ProjectionAggregatorConfig
    | CAGradAggregatorConfig
    | MgdaAggregatorConfig
    | AlignedMtlAggregatorConfig
    | FairGradAggregatorConfig
    | GradVacAggregatorConfig
    | PcdAggregatorConfig
    | CosineGateAggregatorConfig,
    Field(discriminator="kind"),
]

DECIDES_ALONE = ("imtl_g", "fairgrad", "pcd")
"""Aggregators that undo what a balancing does, since they normalise the gradients."""


def _torchjd(name: str, **options: Any) -> nn.Module:
    return _make(name, lambda aggregation: getattr(aggregation, f"{name}Weighting")(**options))


def _make(name: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    """Calls `make` with the module `torchjd.aggregation`.

    Raises: UserError if a solver that it needs is not installed.
    """
    # Imported here: with the solvers that it looks for torchjd takes two seconds, whatever is started.
    from torchjd import aggregation

    try:
        return make(aggregation)
    except ImportError as error:
        raise UserError(
            f"backward.aggregator.kind is {name}, which needs a solver that is not installed. "
            f'Get it with: pip install "tutti-vla[balancing]" ({error})'
        ) from error
