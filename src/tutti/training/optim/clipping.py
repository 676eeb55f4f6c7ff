"""Outliers by their running mean and variance; clipping of gradients at a fixed norm or as outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
        self.move(value - self.mean, weight)

    def move(self, difference: float, weight: float) -> None:
        """mean += w d, variance = (1 - w)(variance + w d^2)."""
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)


FIRST_DEVIATION = 0.5
"""The standard deviation of log |g| that is assumed before any norm is known: a factor of 1.6 up or down."""
LEAST_DEVIATION = 0.1
"""It counts as at least this much: a norm that hardly changes may rise by a quarter without being clipped."""


class ZClipConfig(FrozenConfig):
    """Clip what lies far above the gradient norm's own recent values (ZClip, 2504.02507, on log norms).

    With mean m and standard deviation s of log |g| so far, z = (log |g| - m) / s and the threshold k:

        |g| <- exp(m + (k / z) k s)   where z > k: a larger outlier is cut down further
        m <- m + w d;   s^2 <- (1 - w)(s^2 + w d^2)   with d = min(log |g|, m + k s) - m

    w is 1 - a, and 1 / n for the first n norms, so that these count alike; an outlier never counts more than
    1 - a. Over the first `warmup` norms s^2 goes over from 0.5^2 to what is measured; s is at least 0.1. So
    the second norm is guarded already, and of norms that stay higher all but the first dozens pass.

    Differs from 2504.02507: logarithms, since norms scatter by factors; no unguarded warm-up; and an outlier
    moves m and s as a norm at the threshold would. With the paper's rule, under which it hardly moves them, a
    norm that rises tenfold for good is clipped in every step from then on. Chosen over unit-wise adaptive
    clipping (AGC, 2102.06171), whose ratio |g| / |w| of each unit hardly matters to Adam and Muon: both undo
    a constant scale of the gradient. What harms them is a gradient suddenly larger than those before it.
    """

    z_threshold: float = Field(
        default=2.5, gt=0, description="k: standard deviations above the mean from which on to clip."
    )
    decay: float = Field(default=0.97, gt=0, lt=1, description="a: decay of mean and variance, each update.")
    warmup: int = Field(default=25, ge=2, description="Norms until the measured deviation counts alone.")


@dataclass(slots=True)
class NormMoments(RunningMoments):
    """Mean and variance of the logarithm of a gradient's norm."""

    def spread(self, config: ZClipConfig) -> float:
        """The standard deviation to judge by."""
        known = min(1.0, self.count / config.warmup)
        return max(math.sqrt((1 - known) * FIRST_DEVIATION**2 + known * self.variance), LEAST_DEVIATION)

    def threshold(self, config: ZClipConfig) -> float:
        """The norm above which the next one is clipped."""
        return math.exp(self.mean + config.z_threshold * self.spread(config))

    def limit(self, size: float, config: ZClipConfig) -> float:
        """Adds the norm of an update, above 0. Gives the norm to clip it to; infinity if it is no outlier."""
        value, k, spread = math.log(size), config.z_threshold, self.spread(config)
        z = (value - self.mean) / spread
        if self.count == 0 or z <= k:
            self.add(value, config.decay)
            return math.inf
        limit = math.exp(self.mean + k**2 / z * spread)
        self.move(k * spread, 1 - config.decay)
        return limit


class Clipper:
    """Scales gradients down to min(`norm`, the limit of `zclip`): by one factor, or by one for each part.

    `norm` "auto" is none, with `zclip` by its defaults where that is off.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        *,
        norm: float | Literal["auto", "off"],
        by: Literal["global", "part"],
        zclip: ZClipConfig | Literal["off"],
    ) -> None:
        self.norm = math.inf if isinstance(norm, str) else norm
        self.by = by
        self.zclip = ZClipConfig() if norm == "auto" and zclip == "off" else zclip
        self.groups: dict[str, list[Parameter]] = {}
        for name, parameter in parameters.items():
            self.groups.setdefault(part_of(name) if by == "part" else WHOLE, []).append(parameter)
        self.histories: dict[str, NormMoments] = {}
        self.factors: dict[str, float] = {}
        """What the last update's gradient was multiplied by, under "all" or by part."""

    @property
    def clipped(self) -> bool:
        """Whether the last update's gradient was."""
        return any(factor != 1.0 for factor in self.factors.values())

    def clip(self, norm: Tensor, size: float) -> dict[str, float]:
        """Clips `.grad`, whose global norm is `norm` (`size` as a number). Gives metrics."""
        shares: dict[str, float] = {}
        self.factors = {}
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
            self.factors[name] = 1.0
            if length > limit:
                clip_to(members, limit, own)
                self.factors[name] = min(1.0, limit / (length + 1e-6))  # as torch clips
            shares[name] = float(length > limit)
        clipped = max(shares.values(), default=0.0)
        values = {"optim/grad_norm": size, "optim/grad_norm_max": size, "optim/clip_share": clipped}
        if self.by == "part":
            values |= {f"optim/clip_share/{name}": share for name, share in shares.items()}
        if isinstance(self.zclip, ZClipConfig):
            for name, history in self.histories.items():
                part = "" if name == WHOLE else f"/{name}"
                values["optim/grad_norm_mean" + part] = math.exp(history.mean)
                values["optim/clip_threshold" + part] = min(self.norm, history.threshold(self.zclip))
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values."""
        return {name: asdict(history) for name, history in self.histories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        self.histories = {
            name: NormMoments(**history) for name, history in state.items() if name in self.groups
        }
