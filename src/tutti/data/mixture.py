"""Which window comes when: a fixed order over one or several sources, computed from a seed alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64


@dataclass(slots=True)
class Mixture:
    """An endless stream of windows; entry j is a function of (seed, j), whoever asks and when.

    The stream runs in epochs of as many entries as there are windows. In each epoch source i gets the
    share weights[i] / sum(weights) of the entries (to the nearest whole), in a shuffled order; its own
    windows come in one permutation after another, keyed by (seed, source, pass), so each is seen once
    before any is seen again. With one source, an epoch is one permutation keyed by (seed, 0, epoch).
    """

    windows: tuple[Int64[np.ndarray, " _"], ...]
    weights: tuple[float, ...]
    seed: int
    _counts: Int64[np.ndarray, " _"] = field(init=False)
    _last: tuple[int, Int64[np.ndarray, " _"]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        exact = self.epoch_length * np.asarray(self.weights) / sum(self.weights)
        counts = np.floor(exact).astype(np.int64)
        # Largest remainder: the missing entries go where rounding down took most.
        order = np.argsort(-(exact - counts), kind="stable")
        counts[order[: self.epoch_length - int(counts.sum())]] += 1
        self._counts = counts

    @property
    def epoch_length(self) -> int:
        """Entries in an epoch: the number of windows of all sources."""
        return sum(len(windows) for windows in self.windows)

    def take(self, start: int, count: int) -> Int64[np.ndarray, " {count}"]:
        """The windows at the entries [start, start + count) of the stream."""
        parts = []
        while count > 0:
            epoch, place = divmod(start, self.epoch_length)
            part = self._epoch(epoch)[place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        """All entries of one epoch; the last one computed is kept."""
        last = self._last  # read and set at once: the loader's thread and a replay may both be here
        if last is None or last[0] != epoch:
            sources = np.repeat(np.arange(len(self.windows)), self._counts)
            if len(self.windows) > 1:
                sources = np.random.default_rng([self.seed, 1, epoch]).permutation(sources)
            entries = np.empty(self.epoch_length, dtype=np.int64)
            for source, count in enumerate(self._counts.tolist()):
                entries[sources == source] = self._of_source(source, epoch * count, count)
            self._last = last = (epoch, entries)
        return last[1]

    def _of_source(self, source: int, start: int, count: int) -> np.ndarray:
        windows, parts = self.windows[source], [np.empty(0, dtype=np.int64)]
        while count > 0:
            number, place = divmod(start, len(windows))
            random = np.random.default_rng([self.seed, 0, source, number])
            part = windows[random.permutation(len(windows))][place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)
