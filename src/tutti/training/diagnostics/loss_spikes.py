"""Loss spikes: a term that jumps far above its own recent values, with the batch that did it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LEAST_SPREAD = 1e-3
"""The standard deviation counts as at least this share of the mean: on a loss that hardly moves at all, a
rise of half a per cent is no spike."""


class SpikesConfig(BaseModel):
    """When a term counts as a spike, and how many of their batches are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    z_threshold: float | Literal["off"] = Field(
        default=6.0,
        description="Standard deviations above its mean that make a term a spike; off: no search.",
    )
    warmup: int = Field(default=100, ge=1, description="Values of a term to see before judging it.")
    decay: float = Field(default=0.98, gt=0, lt=1, description="Decay of the mean and variance, each step.")
    keep: int = Field(default=3, ge=0, description="Newest spikes whose batch and weights are kept; 0: none.")


@dataclass(slots=True)
class Level:
    """Exponential mean and variance of one term; `count` values have gone in."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def z(self, value: float) -> float:
        """(value - mean) / standard deviation."""
        return (value - self.mean) / max(math.sqrt(self.variance), LEAST_SPREAD * abs(self.mean), 1e-12)

    def add(self, value: float, decay: float) -> None:
        """With d = value - mean and w = max(1 - decay, 1 / count): mean += w d, variance = (1 - w)(variance
        + w d^2). So the first values count alike, and later ones fade."""
        self.count += 1
        weight = max(1 - decay, 1 / self.count)
        difference = value - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)


class SpikeDetector:
    """Compares each raw term with its mean and variance before this step.

    A spike goes into both cut down to the threshold, so that one does not hide the next, while a loss that
    stays high becomes the new level within some dozen steps.
    """

    def __init__(self, config: SpikesConfig) -> None:
        self.config = config
        self.count = 0
        self.levels: dict[str, Level] = {}

    def see(self, values: Mapping[str, float]) -> dict[str, float]:
        """Takes in one step's raw terms; gives those that are spikes, with their z."""
        threshold = self.config.z_threshold
        if threshold == "off":
            return {}
        spikes: dict[str, float] = {}
        for term, value in values.items():
            level = self.levels.setdefault(term, Level())
            if level.count >= self.config.warmup and (z := level.z(value)) > threshold:
                spikes[term] = z
                level.add(level.mean + threshold * (value - level.mean) / z, self.config.decay)
            else:
                level.add(value, self.config.decay)
        self.count += bool(spikes)
        return spikes

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values."""
        return {"count": self.count, "levels": {term: asdict(level) for term, level in self.levels.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.count = state["count"]
        self.levels = {term: Level(**level) for term, level in state["levels"].items()}
