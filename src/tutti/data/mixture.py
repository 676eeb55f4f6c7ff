"""The order of training windows over one or several weighted sources, computed from a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt16
from pydantic import Field

from tutti.frozen_config import FrozenConfig

UNLABELLED = 7
"""The key of the stream of windows without actions, which no other random draw of the data has."""


class MixtureConfig(FrozenConfig):
    """How windows are drawn into batches, besides the weights of the sources."""

    labelled: Annotated[float, Field(gt=0, le=1)] | Literal["by_weight"] = Field(
        default="by_weight",
        description="Share of the windows with actions in every batch, exactly; by_weight: what the weights "
        "of the sources give.",
    )
    temperature: float = Field(
        default=2.0,
        ge=1,
        le=1000,
        description="T of sources with `weight: auto`: their weight is n^(1/T), n their windows to train on. "
        "1: by size; 2: by its square root; the larger, the more alike.",
    )
    near_key_frames: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Windows at most data.horizon actions before a gripper opens or closes are drawn so many "
        "times as often.",
    )


@dataclass(frozen=True, slots=True)
class Stream:
    """What a stream gives some rows of a batch: those at `rows`, with its own rows from `first` on, of the
    `count` that it gives to all of the batch. `key` tells its random numbers from those of another."""

    key: tuple[int, ...]
    rows: slice | Int64[np.ndarray, " _"]
    first: int
    count: int


@dataclass(slots=True)
class Mixture:
    """An endless stream of windows; entry j is a function of (seed, j), whoever asks and when.

    The stream runs in epochs of as many entries as there are windows. In epoch e source i gets so many that
    it has had weights[i] / sum(weights) of all entries so far, to about one: what rounding took from it is
    made up for later, so over the epochs its share is exact however small it is. They come in a shuffled
    order; a source's own windows come in one permutation after another, keyed by (seed, source, pass), so
    each is seen once before any is seen again. With one source, an epoch is one permutation keyed by (seed,
    0, epoch). Streams with another `key` are independent. `numbers` are those of the sources in the config.
    """

    windows: tuple[Int64[np.ndarray, " _"], ...]
    weights: tuple[float, ...]
    seed: int
    key: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    _shares: tuple[int, ...] = field(init=False)
    _spent: tuple[int, tuple[int, ...]] = field(init=False)
    _last: tuple[int, Int[np.ndarray, " _"], UInt16[np.ndarray, " _"]] | None = field(
        init=False, default=None
    )

    def __post_init__(self) -> None:
        self.numbers = self.numbers or tuple(range(len(self.windows)))
        exact = [Fraction(repr(float(weight))) for weight in self.weights]  # the decimal number as written
        unit = lcm(*(weight.denominator for weight in exact))
        self._shares = tuple(int(weight * unit) for weight in exact)
        self._spent = (0, (0,) * len(exact))

    @property
    def epoch_length(self) -> int:
        """Entries in an epoch: the number of windows of all sources."""
        return sum(len(windows) for windows in self.windows)

    def streams(self, rows: slice, size: int) -> Iterator[Stream]:
        """What fills the `rows` of a batch of `size`."""
        yield Stream((), slice(None), rows.start, size)  # all of them, which copies no pictures

    def take(self, start: int, count: int) -> Int64[np.ndarray, " {count}"]:
        """The windows at the entries [start, start + count) of the stream."""
        parts = []
        while count > 0:
            # From the position alone, so that a resume and a replay need no history of what was drawn.
            epoch, place = divmod(start, self.epoch_length)
            part = self._epoch(epoch)[0][place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)

    def drawn(self, entries: int) -> dict[int, int]:
        """How many of the first `entries` of the stream are of each source, by its number."""
        epoch, place = divmod(entries, self.epoch_length)
        begun = np.bincount(self._epoch(epoch)[1][:place], minlength=len(self.windows)).tolist()
        before = self._before(epoch)
        return {number: had + new for number, had, new in zip(self.numbers, before, begun, strict=True)}

    def _epoch(self, epoch: int) -> tuple[Int[np.ndarray, " _"], UInt16[np.ndarray, " _"]]:
        """All entries of one epoch, and the source of each; the last one computed is kept, in half the bytes
        where its numbers are below 2^31: each process has its own."""
        last = self._last  # read and set at once: the loader's thread and a replay may both be here
        if last is None or last[0] != epoch:
            before = self._before(epoch)
            counts = self._counts(epoch, before)
            length = self.epoch_length
            largest = max(int(windows.max(initial=0)) for windows in self.windows)
            entries = np.empty(length, dtype=np.int32 if largest < 2**31 else np.int64)
            if len(self.windows) == 1:
                sources = np.broadcast_to(np.zeros(1, np.uint16), length)
                entries[:] = self._of_source(0, before[0], counts[0])
            else:
                # Shuffled apart from the sources' own windows: another weight leaves their order as it is.
                sources = np.repeat(np.arange(len(self.windows), dtype=np.uint16), counts)
                sources = np.random.default_rng([self.seed, *self.key, 1, epoch]).permutation(sources)
                for source, (start, count) in enumerate(zip(before, counts, strict=True)):
                    entries[sources == source] = self._of_source(source, start, count)
            self._last = last = (epoch, entries, sources)
        return last[1:]

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
            random = np.random.default_rng([self.seed, *self.key, 0, source, number])
            part = windows[random.permutation(len(windows))][place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class ComposedMixture:
    """Batches of windows with actions and windows without, `counts` of each: two streams beside each other.

    Each is the stream that a run on its windows alone would have: the labelled windows of batch k are those
    of batch k of a run on the labelled sources with that batch size. They lie evenly among the rows, so that
    any rank's rows, which are neighbours, have their share of both.
    """

    labelled: Mixture
    unlabelled: Mixture
    counts: tuple[int, int]
    _filled: tuple[tuple[Mixture, int, Bool[np.ndarray, " b"]], ...] = field(
        init=False, repr=False, compare=False
    )
    """Each stream, how many rows of a batch it fills, and which."""

    def __post_init__(self) -> None:
        # The labelled stream fills row i where floor(s (i + 1)) > floor(s i), s its share.
        filled = np.diff(np.arange(sum(self.counts) + 1) * self.counts[0] // sum(self.counts)) > 0
        streams = ((self.labelled, self.counts[0], filled), (self.unlabelled, self.counts[1], ~filled))
        object.__setattr__(self, "_filled", streams)  # it is frozen

    @property
    def seed(self) -> int:
        """That of both streams."""
        return self.labelled.seed

    @property
    def epoch_length(self) -> int:
        """Entries until every labelled window has come once."""
        return -(-self.labelled.epoch_length * sum(self.counts) // self.counts[0])

    def streams(self, rows: slice, size: int) -> Iterator[Stream]:
        """What fills the `rows` of a batch, all of whose `size` is that of `counts`."""
        for mixture, own, filled in self._filled:
            yield Stream(mixture.key, np.flatnonzero(filled[rows]), int(filled[: rows.start].sum()), own)

    def drawn(self, entries: int) -> dict[int, int]:
        """How many of the first `entries`, whole batches, are of each source, by its number."""
        batches, found = entries // sum(self.counts), dict[int, int]()
        for mixture, own, _ in self._filled:
            for number, count in mixture.drawn(batches * own).items():
                found[number] = found.get(number, 0) + count
        return found

    def take(self, start: int, count: int) -> Int64[np.ndarray, " {count}"]:
        """The windows at the entries [start, start + count) of all batches laid end to end."""
        size = sum(self.counts)
        first, last = start // size, -(-(start + count) // size)
        found = np.empty((last - first, size), dtype=np.int64)
        for mixture, own, filled in self._filled:
            found[:, filled] = mixture.take(first * own, (last - first) * own).reshape(-1, own)
        return found.reshape(-1)[start - first * size :][:count]
