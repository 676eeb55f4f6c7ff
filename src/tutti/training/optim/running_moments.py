"""Running mean and variance of a scalar, to tell outliers: loss spikes, divergence, large gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
