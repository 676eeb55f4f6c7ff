"""Loss spikes: steps in which a term lies far above its own recent values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field

from tutti.frozen_config import FrozenConfig
from tutti.training.optim.clipping import RunningMoments


class SpikesConfig(FrozenConfig):
    """When a term counts as a spike, and how many of their batches are kept."""

    z_threshold: float | Literal["off"] = Field(
        default=6.0,
        description="Standard deviations above its mean that make a term a spike; off: no search.",
    )
    warmup: int = Field(default=100, ge=1, description="Values of a term to see before judging it.")
    decay: float = Field(default=0.98, gt=0, lt=1, description="Decay of the mean and variance, each step.")
    keep: int = Field(default=3, ge=0, description="Newest spikes whose batch and weights are kept; 0: none.")


class SpikeDetector:
    """Compares each raw term with its mean and variance before this step.

    A spike goes into both cut down to the threshold, so that one does not hide the next, while a loss that
    stays high becomes the new level within some dozen steps.
    """

    def __init__(self, config: SpikesConfig) -> None:
        self.config = config
        self.count = 0
        self.moments: dict[str, RunningMoments] = {}

    def detect(self, values: Mapping[str, float]) -> dict[str, float]:
        """Adds one step's raw terms. Gives those that are spikes, with their z."""
        threshold = self.config.z_threshold
        if threshold == "off":
            return {}
        spikes: dict[str, float] = {}
        for term, value in values.items():
            moments = self.moments.setdefault(term, RunningMoments())
            if moments.count >= self.config.warmup and (z := moments.z(value)) > threshold:
                spikes[term] = z
                moments.add(moments.mean + threshold * (value - moments.mean) / z, self.config.decay)
            else:
                moments.add(value, self.config.decay)
        self.count += bool(spikes)
        return spikes

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values."""
        return {
            "count": self.count,
            "moments": {term: asdict(moments) for term, moments in self.moments.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.count = state["count"]
        self.moments = {term: RunningMoments(**moments) for term, moments in state["moments"].items()}
