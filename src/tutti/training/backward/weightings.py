"""Weights of K gradients from their Gramian matrix: torchjd's weightings, and the cosine gate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor, nn

Total = Literal["sum", "mean", "free"]
"""The sum of a method's weights where no two gradients conflict: K, 1, or something else."""


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


class StatelessWeighting(Weighting):
    """A weighting of torchjd that depends on nothing but the Gramian (and random draws).

    The Gramian is divided by its trace, since torchjd has absolute thresholds: without that UPGrad and CAGrad
    take gradients with a squared norm under 1e-4 for zero. `power`: the weights of G are c^-power times those
    of G / c; 0 where the scale cancels. `rescaled`: where no two gradients conflict the weights add up to K.
    """

    def __init__(
        self, weighting: nn.Module, *, total: Total, power: float = 0.0, rescaled: bool = True
    ) -> None:
        self.module = weighting
        self.total: Total = total
        self.power = power
        self.rescaled = rescaled

    def weights(self, gramian: Float64[Tensor, "k k"], terms: Sequence[str]) -> Float64[Tensor, " k"]:
        trace = gramian.trace()
        weights = self.module(gramian / trace) * trace**-self.power
        if not self.rescaled or self.total == "sum":
            return weights
        return len(terms) * (weights if self.total == "mean" else weights / weights.sum())


class StatefulWeighting(Weighting):
    """A weighting of torchjd that keeps `buffers` from update to update, by row.

    torchjd makes its buffers anew at the first call, and a strict load of its state_dict refuses them; here
    they are kept beside the terms that they belong to. Other terms than before start it anew.
    """

    keeps_zeros = True

    def __init__(self, weighting: nn.Module, buffers: Sequence[str], *, keyed_by_precision: bool) -> None:
        self.module = weighting
        self.buffers = tuple(buffers)
        self.keyed_by_precision = keyed_by_precision
        self.terms: list[str] = []

    def weights(self, gramian: Float64[Tensor, "k k"], terms: Sequence[str]) -> Float64[Tensor, " k"]:
        if list(terms) != self.terms:
            self.module.reset()  # pyright: ignore[reportCallIssue]
            self.terms = list(terms)
        return self.module(gramian)

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self.module, name) for name in self.buffers}
        return {"terms": list(self.terms), **{name: t.clone() for name, t in state.items() if t is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.terms = list(state["terms"])
        for name in self.buffers:
            setattr(self.module, name, state[name].clone() if name in state else None)
        size = len(self.terms)
        key = (size, torch.float64) if self.keyed_by_precision else size
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
