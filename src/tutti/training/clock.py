"""Where the time of a step goes, by a clock that never runs backwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "diagnostics")


class Clock:
    """Times whole steps and their parts. `last` are the seconds of the newest step.

    On a GPU the host waits once in a step, for the loss terms and the gradient norm behind the backward pass.
    "forward" is then the time to queue the forward pass, and "backward" holds the work of both.
    """

    def __init__(self) -> None:
        self.last = 0.0
        self._since = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step."""
        started = monotonic()
        yield
        self.last = monotonic() - started
        self._since += self.last

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one of PARTS inside a step."""
        started = monotonic()
        yield
        self._parts[name] += monotonic() - started

    def take(self, samples: int) -> dict[str, float]:
        """Rate and shares since the last call, in which `samples` windows were consumed; then start anew."""
        since = max(self._since, 1e-9)
        values = {
            "time/samples_per_second": samples / since,
            **{f"time/{name}_share": spent / since for name, spent in self._parts.items()},
        }
        self._since, self._parts = 0.0, dict.fromkeys(PARTS, 0.0)
        return values
