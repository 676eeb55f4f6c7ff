"""Traffic of a policy server: counts and latencies, for Prometheus and for the last line."""

from __future__ import annotations

from collections import deque

import numpy as np

KEPT = 10_000
"""Latencies that percentiles are taken over, the last ones."""


class Traffic:
    """What a server has done. `mistakes` are observations that could not be used, `failures` errors of the
    server, `refused` clients without the token or beyond the limit; `clients` are connected now."""

    def __init__(self) -> None:
        self.clients = self.answers = self.mistakes = self.failures = self.refused = 0
        self.seconds = 0.0
        self._latencies: deque[float] = deque(maxlen=KEPT)

    def answered(self, seconds: float) -> None:
        """One more answer, so long after its observation had come."""
        self.answers, self.seconds = self.answers + 1, self.seconds + seconds
        self._latencies.append(seconds)

    def percentile(self, percent: float) -> float:
        """Of the latencies in seconds; 0 where there are none."""
        return float(np.percentile(self._latencies, percent)) if self._latencies else 0.0

    @property
    def recent(self) -> list[float]:
        """The last latencies in seconds, the newest one last."""
        return list(self._latencies)[-200:]

    @property
    def state(self) -> str:
        """Another text whenever something has happened."""
        return f"{self.clients}-{self.answers}-{self.mistakes}-{self.failures}-{self.refused}"

    def exposition(self) -> str:
        """In the text format of Prometheus."""
        lines = ["# TYPE tutti_clients gauge", f"tutti_clients {self.clients}"]
        for name in ("answers", "mistakes", "failures", "refused"):
            lines += [f"# TYPE tutti_{name}_total counter", f"tutti_{name}_total {getattr(self, name)}"]
        lines.append("# TYPE tutti_latency_seconds summary")
        for share in (0.5, 0.9, 0.99):
            lines.append(f'tutti_latency_seconds{{quantile="{share:g}"}} {self.percentile(100 * share):.6f}')
        lines += [
            f"tutti_latency_seconds_sum {self.seconds:.6f}",
            f"tutti_latency_seconds_count {self.answers}",
        ]
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """In one line."""
        wrong = (
            f"{self.mistakes:,} observations not usable, {self.failures:,} failures, {self.refused:,} refused"
        )
        p50, p99 = (f"{1000 * self.percentile(percent):.1f} ms" for percent in (50.0, 99.0))
        return f"{self.answers:,} answers; latency p50 {p50}, p99 {p99}; {wrong}"
