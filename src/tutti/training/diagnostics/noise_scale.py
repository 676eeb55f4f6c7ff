"""The gradient noise scale: the batch size at which noise and signal of the gradient are equal."""

from __future__ import annotations

from typing import Any

KEEP = 0.9
"""Decay of the averages, each diagnostic step: single estimates scatter by more than their own size."""


class NoiseScale:
    """B_simple = tr(Sigma) / |G|^2 from the gradient's norm at two batch sizes b < B (1812.06162, app. A).

        |G|^2     = (B |G_B|^2 - b |G_b|^2) / (B - b)          unbiased, may be negative
        tr(Sigma) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)

    Each is averaged by itself (a ratio's mean would be biased): a <- KEEP a + (1 - KEEP) new. Well below
    B_simple doubling the batch nearly halves the steps that are needed; well above it, it hardly helps.

    Differs: the b windows are among the B ones. Both expectations hold all the same, and the scatter is
    less. A term whose value depends on the number of windows (a contrastive one) biases the estimate.
    """

    def __init__(self) -> None:
        self.signal = 0.0
        self.trace = 0.0

    def add(self, small: float, large: float, b: int, B: int) -> dict[str, float]:
        """Adds |G_b|^2 = `small` and |G_B|^2 = `large`. Gives both estimates, and the ratio of the
        averages where both are positive."""
        signal = (B * large - b * small) / (B - b)
        trace = (small - large) / (1 / b - 1 / B)
        self.signal = KEEP * self.signal + (1 - KEEP) * signal
        self.trace = KEEP * self.trace + (1 - KEEP) * trace
        estimates = {"signal": signal, "noise_trace": trace}
        if self.signal > 0 and self.trace > 0:
            estimates["noise_scale"] = self.trace / self.signal
        return estimates

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"signal": self.signal, "trace": self.trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.signal, self.trace = state["signal"], state["trace"]
