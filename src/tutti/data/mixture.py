"""The order of training windows over one or several weighted sources, computed from a seed alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

import numpy as np
from jaxtyping import Int64


@dataclass(slots=True)
class Mixture:
    """An endless stream of windows; entry j is a function of (seed, j), whoever asks and when.

    The stream runs in epochs of as many entries as there are windows. In epoch e source i gets so many that
    it has had weights[i] / sum(weights) of all entries so far, to about one: what rounding took from it is
    made up for later, so over the epochs its share is exact however small it is. They come in a shuffled
    order; a source's own windows come in one permutation after another, keyed by (seed, source, pass), so
    each is seen once before any is seen again. With one source, an epoch is one permutation keyed by (seed,
    0, epoch).
    """

    windows: tuple[Int64[np.ndarray, " _"], ...]
    weights: tuple[float, ...]
    seed: int
    _shares: tuple[int, ...] = field(init=False)
    _spent: tuple[int, tuple[int, ...]] = field(init=False)
    _last: tuple[int, Int64[np.ndarray, " _"]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        exact = [Fraction(repr(float(weight))) for weight in self.weights]  # the decimal number as written
        unit = lcm(*(weight.denominator for weight in exact))
        self._shares = tuple(int(weight * unit) for weight in exact)
        self._spent = (0, (0,) * len(exact))

    @property
    def epoch_length(self) -> int:
        """Entries in an epoch: the number of windows of all sources."""
        return sum(len(windows) for windows in self.windows)

    def take(self, start: int, count: int) -> Int64[np.ndarray, " {count}"]:
        """The windows at the entries [start, start + count) of the stream."""
        parts = []
        while count > 0:
            # From the position alone, so that a resume and a replay need no history of what was drawn.
            epoch, place = divmod(start, self.epoch_length)
            part = self._epoch(epoch)[place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        """All entries of one epoch; the last one computed is kept."""
        last = self._last  # read and set at once: the loader's thread and a replay may both be here
        if last is None or last[0] != epoch:
            before = self._before(epoch)
            counts = self._counts(epoch, before)
            sources = np.repeat(np.arange(len(self.windows)), counts)
            # Shuffled apart from the sources' own windows: another weight leaves their order as it is.
            if len(self.windows) > 1:
                sources = np.random.default_rng([self.seed, 1, epoch]).permutation(sources)
            entries = np.empty(self.epoch_length, dtype=np.int64)
            for source, (start, count) in enumerate(zip(before, counts, strict=True)):
                entries[sources == source] = self._of_source(source, start, count)
            self._last = last = (epoch, entries)
        return last[1]

    def _before(self, epoch: int) -> tuple[int, ...]:
        """The entries that each source has had before this epoch."""
        # Epochs mostly come in order: the last sums are gone on from, and only a step back begins anew.
        number, spent = self._spent
        if number > epoch:
            number, spent = 0, (0,) * len(self.windows)
        for passed in range(number, epoch):
            spent = tuple(map(sum, zip(spent, self._counts(passed, spent), strict=True)))
        self._spent = (epoch, spent)
        return spent

    def _counts(self, epoch: int, before: tuple[int, ...]) -> list[int]:
        """The entries of each source in this epoch: what it is owed, rounded down, and one more for those
        that this leaves furthest behind."""
        # In whole numbers: shares in floats would drift over the epochs.
        total, length = sum(self._shares), self.epoch_length
        owed = [
            length * (epoch + 1) * share - total * had
            for share, had in zip(self._shares, before, strict=True)
        ]
        counts = [max(0, one // total) for one in owed]
        behind = sorted(range(len(owed)), key=lambda source: counts[source] * total - owed[source])
        for source in behind[: max(0, length - sum(counts))]:
            counts[source] += 1
        while sum(counts) > length:  # of tiny epochs with many sources that are owed one at once
            counts[next(source for source in reversed(behind) if counts[source])] -= 1
        return counts

    def _of_source(self, source: int, start: int, count: int) -> np.ndarray:
        windows, parts = self.windows[source], [np.empty(0, dtype=np.int64)]
        while count > 0:
            number, place = divmod(start, len(windows))
            # Keyed by the pass: any entry of the stream is computed without those before it.
            random = np.random.default_rng([self.seed, 0, source, number])
            part = windows[random.permutation(len(windows))][place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)
