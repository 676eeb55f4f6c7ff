"""Aggregators, which combine K gradients into one: the union of all kinds of `backward.aggregator`.

torchjd 0.18 gives all but `cosine_gate`. Its methods are here whose weights follow from the Gramian of
the gradients of one batch. Not here: ConFIG, GradDrop, NashMTL and TrimmedMean have no such weights;
ExcessMTL keeps K numbers for each parameter; MoDo and SDMGrad need two or three batches for each update; Krum
is for many rows of which some are hostile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.types import UserError


class Weighting(ABC):
    """Weights w of K gradients g_i, from G_ij = g_i . g_j alone; the combined gradient is sum_i w_i g_i.

    The first row is the primary term's. One object serves one set of parameters for a whole run.
    `keeps_zeros`: rows of zeros are passed too, so that a state by row stays in place.
    """

    keeps_zeros = False

    @abstractmethod
    def weights(self, gramian: Float64[Tensor, "k k"], terms: Sequence[str]) -> Float64[Tensor, " k"]:
        """The weights of `terms` in one update."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Continues from a saved state."""


class _Method(NamedTuple):
    """A method of torchjd: the name of its `...Weighting` class, the total of its weights where no two
    gradients conflict (K, 1, or something else), and the buffers that it keeps from update to update, by row
    (`keyed_by_dtype`: it starts them anew for another dtype)."""

    name: str
    total: Literal["sum", "mean", "free"] = "mean"
    buffers: tuple[str, ...] = ()
    keyed_by_dtype: bool = False


class TorchjdWeighting(Weighting):
    """A method of torchjd.

    Most depend on nothing but the Gramian (and random draws). It is divided by its trace, since torchjd has
    absolute thresholds: UPGrad and CAGrad would take gradients with a squared norm under 1e-4 for zero.
    `power`: the weights of G are c^-power times those of G / c; 0 where the scale cancels. `rescaled`: where
    no two gradients conflict the weights add up to K.

    One with buffers needs no scale: its weights add up to K, or the length is that of the action gradient.
    torchjd makes its buffers anew at the first call, and a strict load of its state_dict refuses them; here
    they are kept beside the terms that they belong to. Other terms than before start it anew.
    """

    def __init__(self, method: _Method, module: nn.Module, *, power: float, rescaled: bool) -> None:
        self.method, self.module = method, module
        self.power, self.rescaled = power, rescaled
        self.keeps_zeros = bool(method.buffers)
        self.terms: list[str] = []

    def weights(self, gramian: Float64[Tensor, "k k"], terms: Sequence[str]) -> Float64[Tensor, " k"]:
        if self.method.buffers:
            if list(terms) != self.terms:
                self.module.reset()  # pyright: ignore[reportCallIssue]
                self.terms = list(terms)
            return self.module(gramian)
        # Of the scale that torchjd's thresholds are made for; `power` puts back what that takes away.
        trace = gramian.trace()
        weights = self.module(gramian / trace) * trace**-self.power
        if not self.rescaled or self.method.total == "sum":
            return weights
        return len(terms) * (weights if self.method.total == "mean" else weights / weights.sum())

    def state_dict(self) -> dict[str, Any]:
        if not self.method.buffers:
            return {}
        state = {name: getattr(self.module, name) for name in self.method.buffers}
        return {"terms": list(self.terms), **{name: t.clone() for name, t in state.items() if t is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.method.buffers:
            return
        self.terms = list(state["terms"])
        for name in self.method.buffers:
            setattr(self.module, name, state[name].clone() if name in state else None)
        key = (len(self.terms), torch.float64) if self.method.keyed_by_dtype else len(self.terms)
        self.module._state_key = key if self.terms else None  # pyright: ignore[reportArgumentType]


class CosineGate(Weighting):
    """w_i = max(0, c_i), c_i the cosine of g_i and the primary term's gradient, whose own weight is 1.

    c_i is a running mean of the cosines so far, c <- smoothing c + (1 - smoothing) cos, freed of its bias
    towards its start at 0 by 1 - smoothing^n: the cosine of two noisy gradients says little by itself.
    Updates in which a gradient is zero count for nothing. With smoothing 0 it is the published gate.

    Source: 1812.02224 (weighted version). Differs: smoothed.
    """

    keeps_zeros = True

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self.means: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def weights(self, gramian: Float64[Tensor, "k k"], terms: Sequence[str]) -> Float64[Tensor, " k"]:
        weights = [1.0]
        for number, term in enumerate(terms[1:], start=1):
            size = float((gramian[0, 0] * gramian[number, number]).sqrt())
            if size > 0:
                cosine = float(gramian[0, number]) / size
                old = self.means.get(term, 0.0)
                self.means[term] = self.smoothing * old + (1 - self.smoothing) * cosine
                self.counts[term] = self.counts.get(term, 0) + 1
            seen = 1 - self.smoothing ** self.counts.get(term, 0)
            weights.append(max(0.0, self.means[term] / seen) if seen else 0.0)
        return torch.tensor(weights, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means, self.counts = dict(state["means"]), dict(state["counts"])


METHODS = {
    "sum": _Method("Sum", "sum"),
    "mean": _Method("Mean"),
    "random": _Method("Random"),
    "pcgrad": _Method("PCGrad", "sum"),
    "imtl_g": _Method("IMTLG"),
    "upgrad": _Method("UPGrad"),
    "dualproj": _Method("DualProj"),
    "cagrad": _Method("CAGrad"),
    "mgda": _Method("MGDA"),
    "aligned_mtl": _Method("AlignedMTL"),
    "fairgrad": _Method("FairGrad", "free"),
    "gradvac": _Method("GradVac", "sum", ("_phi_t",), keyed_by_dtype=True),
    "pcd": _Method("PCD", "free", ("_sq_norm_ema", "_n_steps")),
}
RENAMED = {"decay": "beta", "iterations": "max_iters", "scale": "scale_mode"}


class _Aggregator(FrozenConfig):
    """A method of torchjd. Its keys are the options of torchjd's class, some under another name (RENAMED)."""

    kind: Any

    @property
    def _power(self) -> float:
        """`power` of its weighting."""
        return 0.0

    def _options(self) -> dict[str, Any]:
        own = self.model_dump(exclude={"kind"})
        return {RENAMED.get(key, key): value for key, value in own.items()}

    def build(self, rescaled: bool) -> Weighting:
        """The weighting of a run. Raises UserError if a solver that it needs is not installed."""
        # Imported here: with the solvers that it looks for torchjd takes two seconds, whatever is started.
        from torchjd import aggregation

        method = METHODS[self.kind]
        try:
            module = getattr(aggregation, f"{method.name}Weighting")(**self._options())
        except ImportError as error:
            raise UserError(
                f"backward.aggregator.kind is {self.kind}, which needs a solver that is not installed. "
                f'Get it with: pip install "tutti-vla[balancing]" ({error})'
            ) from error
        return TorchjdWeighting(method, module, power=self._power, rescaled=rescaled)


class PlainAggregatorConfig(_Aggregator):
    """`sum`: the plain sum, for comparison. `mean`: the same over K, unless rescaled.

    `random`: softmax of normal draws (2111.10603). `pcgrad` (2001.06782): each g_i loses what opposes the
    others, in random order, then the sum. `imtl_g` (Liu et al., Towards impartial multi-task learning, 2021):
    equal projections on all g_i / |g_i|; its direction does not depend on the lambdas.
    """

    kind: Literal["sum", "mean", "random", "pcgrad", "imtl_g"]


class ProjectionAggregatorConfig(_Aggregator):
    """`upgrad` (2406.16232): the mean of the projections of all g_i onto what opposes no g_j. `dualproj`: the
    projection of their mean. Needs `tutti-vla[balancing]`.

    `regularization` is added to the diagonal of the Gramian, whose trace is 1: gradients with less than that
    share of the squared norms are not kept from being opposed. Differs: torchjd's 1e-4.
    """

    kind: Literal["upgrad", "dualproj"]
    regularization: float = Field(
        default=1e-6, gt=0, description="Ridge of the quadratic programme, against nearly parallel gradients."
    )

    def _options(self) -> dict[str, Any]:
        from torchjd.linalg import QuadprogProjector

        return {"projector": QuadprogProjector(norm_eps=0.0, reg_eps=self.regularization)}


class CAGradAggregatorConfig(_Aggregator):
    """`cagrad` (2110.14048): max over d of min_i g_i.d, |d - g_0| <= c |g_0|, g_0 the mean: the plain sum at
    c = 0, longer else. Needs `tutti-vla[balancing]`."""

    kind: Literal["cagrad"] = "cagrad"
    c: float = Field(default=0.4, ge=0, description="Radius around the mean gradient, of its length.")


class MgdaAggregatorConfig(_Aggregator):
    """`mgda` (1810.04650): the shortest vector of the convex hull of all g_i, by Frank-Wolfe. The term with
    the smallest gradient wins."""

    kind: Literal["mgda"] = "mgda"
    epsilon: float = Field(default=1e-3, gt=0, description="Step size at which it stops.")
    iterations: int = Field(default=100, ge=1, description="Iterations at most.")


class AlignedMtlAggregatorConfig(_Aggregator):
    """`aligned_mtl` (2305.19000): the singular values of the gradient matrix are made equal: to the smallest
    of them (`min`), the median or the root of the mean square."""

    kind: Literal["aligned_mtl"] = "aligned_mtl"
    scale: Literal["min", "median", "rmse"] = Field(
        default="min",
        description="The common value of the singular values: their smallest, median or root mean square.",
    )


class FairGradAggregatorConfig(_Aggregator):
    """`fairgrad` (2402.15638): weights with (G w)_i = w_i^(-1 / alpha); at alpha = 1 its direction does not
    depend on the lambdas. Differs: rescaled, the weights sum to K; theirs grow as gradients shrink."""

    kind: Literal["fairgrad"] = "fairgrad"
    alpha: float = Field(default=1.0, gt=0, description="1: proportional fairness; large: max-min.")

    @property
    def _power(self) -> float:
        return self.alpha / (1 + self.alpha)


class GradVacAggregatorConfig(_Aggregator):
    """`gradvac` (2010.05874): as PCGrad, but towards a running mean of each pair's cosine instead of 0."""

    kind: Literal["gradvac"] = "gradvac"
    decay: float = Field(default=0.5, ge=0, le=1, description="Weight of the present cosine in the mean.")


class PcdAggregatorConfig(_Aggregator):
    """`pcd` (2606.29521): the action gradient, moved as little as gives every other term the share `tau` of
    the progress that its own normalised gradient would give; then as long as the action gradient.

    Gradients are normalised by a running mean of their squared norms, so of all lambdas only that of action
    counts. Infeasible constraints are dropped. Evidence comes from compression, not from robots.
    """

    kind: Literal["pcd"] = "pcd"
    tau: float = Field(default=0.02, ge=0, le=1, description="Share of progress for the other terms.")
    decay: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the running mean of the squared gradient norms."
    )


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
