"""Outliers by their running mean and variance; clipping of gradients at a fixed norm or as outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.parameter import Parameter

from tutti.distributed.sharded_tensors import clip_to, total_norm
from tutti.frozen_config import FrozenConfig
from tutti.training.optim.learning_rates import part_of

WHOLE = "all"
MIN_RELATIVE_DEVIATION = 1e-3
"""The standard deviation counts as at least this share of the mean: on a loss that hardly changes, a rise of
half a per cent is no outlier."""


@dataclass(slots=True)
class RunningMoments:
    """Exponential mean and variance of `count` values."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    @property
    def deviation(self) -> float:
        """The standard deviation, at least MIN_RELATIVE_DEVIATION of the mean."""
        return max(math.sqrt(self.variance), MIN_RELATIVE_DEVIATION * abs(self.mean), 1e-12)

    def z(self, value: float) -> float:
        """(value - mean) / standard deviation."""
        return (value - self.mean) / self.deviation

    def add(self, value: float, decay: float) -> None:
        """With d = value - mean and w = max(1 - decay, 1 / count): mean += w d, variance = (1 - w)(variance
        + w d^2). So the first values count alike, and later ones fade."""
        self.count += 1
        weight = max(1 - decay, 1 / self.count)
        difference = value - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)


class ZClipConfig(FrozenConfig):
    """Clip what lies far above the gradient norm's own recent values (2504.02507).

    With mean m and deviation s of the norms so far, z = (|g| - m) / s and the threshold k:

        |g| <- m + (k / z) k s   where z > k          a larger outlier is cut down further
        m <- a m + (1 - a) |g|;   s^2 <- a s^2 + (1 - a) (|g| - m)^2      with the clipped |g| and the new m

    The first `warmup` norms only give the first m and s. Chosen over unit-wise adaptive clipping (AGC,
    2102.06171), whose ratio |g| / |w| of each unit hardly matters to Adam and Muon: both undo a constant
    scale of the gradient. What harms them is a gradient that is suddenly larger than those before it.

    Differs from the authors' code: s counts as at least 0.1 % of m, so that equal norms are no division by 0.
    """

    z_threshold: float = Field(
        default=2.5, gt=0, description="k: standard deviations above the mean from which on to clip."
    )
    decay: float = Field(default=0.97, gt=0, lt=1, description="a: decay of mean and variance, each update.")
    warmup: int = Field(default=25, ge=2, description="Norms that give the first mean and variance.")


@dataclass(slots=True)
class NormMoments(RunningMoments):
    """Mean and variance of a gradient's norm; `first` are the norms of the warm-up, until it is over."""

    first: list[float] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """True once the warm-up is over."""
        return self.count > 0 and not self.first

    def limit(self, size: float, config: ZClipConfig) -> float:
        """Adds the norm of an update. Gives the norm to clip it to; infinity if it is no outlier."""
        if not self.ready:
            self.first.append(size)
            self.count += 1
            if self.count == config.warmup:
                self.mean = sum(self.first) / len(self.first)
                self.variance = sum((one - self.mean) ** 2 for one in self.first) / len(self.first)
                self.first = []
            return math.inf
        z, deviation = self.z(size), self.deviation
        limit = self.mean + config.z_threshold**2 / z * deviation if z > config.z_threshold else math.inf
        clipped = min(size, limit)
        self.count += 1
        self.mean = config.decay * self.mean + (1 - config.decay) * clipped
        self.variance = config.decay * self.variance + (1 - config.decay) * (clipped - self.mean) ** 2
        return limit


class Clipper:
    """Scales gradients down to min(`norm`, the adaptive limit): by one factor, or by one for each part."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        *,
        norm: float | Literal["off"],
        by: Literal["global", "part"],
        zclip: ZClipConfig | Literal["off"],
    ) -> None:
        self.norm = math.inf if norm == "off" else norm
        self.by = by
        self.zclip = zclip
        self.groups: dict[str, list[Parameter]] = {}
        for name, parameter in parameters.items():
            self.groups.setdefault(part_of(name) if by == "part" else WHOLE, []).append(parameter)
        self.histories: dict[str, NormMoments] = {}

    def clip(self, norm: Tensor, size: float) -> dict[str, float]:
        """Clips `.grad`, whose global norm is `norm` (`size` as a number). Gives metrics."""
        shares: dict[str, float] = {}
        norms, sizes = {WHOLE: norm}, [size]
        if self.by == "part":
            present = {name: [p.grad for p in own if p.grad is not None] for name, own in self.groups.items()}
            norms = {name: total_norm(own) for name, own in present.items() if own}
            sizes = torch.stack(list(norms.values())).tolist() if norms else []
        for (name, own), length in zip(norms.items(), sizes, strict=True):
            members, limit = self.groups[name], self.norm
            if isinstance(self.zclip, ZClipConfig) and length > 0:
                history = self.histories.setdefault(name, NormMoments())
                limit = min(limit, history.limit(length, self.zclip))
            if length > limit:
                clip_to(members, limit, own)
            shares[name] = float(length > limit)
        clipped = max(shares.values(), default=0.0)
        values = {"optim/grad_norm": size, "optim/grad_norm_max": size, "optim/clip_share": clipped}
        if self.by == "part":
            values |= {f"optim/clip_share/{name}": share for name, share in shares.items()}
        if self.zclip != "off":
            for name, history in self.histories.items():
                if history.ready:
                    values["optim/grad_norm_mean" + ("" if name == WHOLE else f"/{name}")] = history.mean
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values."""
        return {name: asdict(history) for name, history in self.histories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        self.histories = {
            name: NormMoments(**history) for name, history in state.items() if name in self.groups
        }
