"""Axes of charts: scales from values to pixels, round ticks, smoothing and thinning of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from tutti.report.formatting import Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A straight or logarithmic map from [low, high] to the pixels [start, end]."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def pixel(self, value: Number) -> Number:
        """The pixel of `value`; what lies outside is cut to the edge, so a spike stays in the picture."""
        low, high = self._inner(self.low), self._inner(self.high)
        share = (self._inner(max(value, self.low)) - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _inner(self, value: Number) -> Number:
        return math.log10(value) if self.log else value

    def ticks(self, wanted: int = 5) -> list[Number]:
        """Round values inside [low, high]."""
        if not self.log:
            return linear_ticks(self.low, self.high, wanted)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = max(1, math.ceil(len(decades) / 7))
        steps = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [m * 10.0**d for i, d in enumerate(decades) if i % every == 0 for m in steps]
        return [t for t in ticks if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]


def linear_ticks(low: Number, high: Number, wanted: int = 5) -> list[Number]:
    """About `wanted` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    step = _round_step((high - low) / max(1, wanted))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _round_step(rough: Number) -> Number:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def value_scale(
    values: Sequence[Number], start: Number, end: Number, *, log: bool | None, zero: bool
) -> Scale:
    """The scale for these values; `log` None takes a log scale where they span more than a factor 40.

    A linear scale begins at 0 if `zero`, else a little below the smallest value.
    """
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    positive = bool(finite) and low > 0
    if positive and (log or (log is None and high / low > 40)):
        return Scale(low=low / 1.15, high=high * 1.15, start=start, end=end, log=True)
    if zero and low >= 0:
        low = 0.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - max(abs(low) * 0.1, 1e-9), high + max(abs(high) * 0.1, 1e-9)
    room = 0.06 * (high - low)
    return Scale(low=low if low == 0 else low - room, high=high + room, start=start, end=end)


def smooth(values: Sequence[Number], share: Number = 0.01) -> list[Number]:
    """Mean weighted by d^|distance|, to both sides alike, so that a falling curve is not drawn late.

    s_t = sum_k d^|t-k| x_k / sum_k d^|t-k| with d = exp(-1 / (share * points)); values that are not finite
    are left out.
    """
    keep = math.exp(-1 / max(1.0, share * len(values)))
    before = _sums(values, keep)
    after = _sums(values[::-1], keep)[::-1]
    result = []
    for value, (top, weight), (later, later_weight) in zip(values, before, after, strict=True):
        here = math.isfinite(value)  # counted in both directions
        total = weight + later_weight - here
        result.append((top + later - (value if here else 0.0)) / total if total else math.nan)
    return result


def _sums(values: Sequence[Number], keep: Number) -> list[tuple[Number, Number]]:
    """Discounted (sum, weight) up to each value."""
    top = weight = 0.0
    sums = []
    for value in values:
        top, weight = keep * top, keep * weight
        if math.isfinite(value):
            top, weight = top + value, weight + 1
        sums.append((top, weight))
    return sums


def thin(
    xs: Sequence[Number], ys: Sequence[Number], max_points: int = 400
) -> tuple[list[Number], list[Number]]:
    """About `max_points` points, with each stretch's smallest and largest value (so spikes stay)."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if len(points) > max_points:
        stretch = math.ceil(2 * len(points) / max_points)
        extremes: list[tuple[Number, Number]] = [points[0]]
        for i in range(0, len(points), stretch):
            part = points[i : i + stretch]
            extremes += sorted({min(part, key=itemgetter(1)), max(part, key=itemgetter(1))})
        points = [*extremes, points[-1]]
    return [x for x, _ in points], [y for _, y in points]
