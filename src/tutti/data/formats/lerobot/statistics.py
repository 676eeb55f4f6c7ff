"""Computes the statistics that LeRobotDataset v3.0 stores for each feature, of one episode or of all."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_BIG_PICTURE = 300
_FEWEST_FRAMES = 100


class StatsAccumulator:
    """min, max, mean, std, count and quantiles of a feature; `merge` joins episodes exactly.

    Unlike LeRobot 0.6.1, whose stored quantiles are a mean over episodes, these are the true quantiles
    of all values: vectors are kept, pictures are counted in a histogram of their 256 levels a channel.
    Picture statistics are (C, 1, 1) in [0, 1], from max(100, n^0.75) frames, strided from 300 pixels.
    """

    def __init__(self, count: int, values: list[np.ndarray] | None, histogram: np.ndarray | None) -> None:
        self._count, self._values, self._histogram = count, values, histogram

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Of (t, k) or (t,) numbers, or of (t, h, w, c) pictures as bytes."""
        if values.ndim != 4:
            return cls(len(values), [np.asarray(values, dtype=np.float64).reshape(len(values), -1)], None)
        wanted = min(len(values), max(_FEWEST_FRAMES, int(len(values) ** 0.75)))
        rows = np.linspace(0, len(values) - 1, wanted).round().astype(np.int64)
        stride = max(1, min(values.shape[1:3]) // 150) if max(values.shape[1:3]) >= _BIG_PICTURE else 1
        sample = values[rows, ::stride, ::stride]
        levels = [np.bincount(sample[..., c].ravel(), minlength=256) for c in range(values.shape[-1])]
        return cls(wanted, None, np.stack(levels))

    def merge(self, other: StatsAccumulator) -> None:
        """Takes in what `other` has counted."""
        self._count += other._count
        if self._values is not None and other._values is not None:
            self._values.extend(other._values)
        elif self._histogram is not None and other._histogram is not None:
            self._histogram = self._histogram + other._histogram

    def summary(self) -> dict[str, Any]:
        """The statistics as nested lists, in the shapes and order that LeRobot writes."""
        if self._histogram is not None:
            statistics = _of_histogram(self._histogram)
            stats: dict[str, Any] = {key: value[:, None, None].tolist() for key, value in statistics.items()}
        else:
            assert self._values is not None
            statistics = _of_values(np.concatenate(self._values))
            stats = {key: value.tolist() for key, value in statistics.items()}
        return {**{k: stats[k] for k in ("min", "max", "mean", "std")}, "count": [self._count]} | {
            k: stats[k] for k in QUANTILES
        }


def _of_values(values: np.ndarray) -> dict[str, np.ndarray]:
    statistics = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    levels = np.quantile(values, list(QUANTILES.values()), axis=0)
    return statistics | dict(zip(QUANTILES, levels, strict=True))


def _of_histogram(histogram: np.ndarray) -> dict[str, np.ndarray]:
    """`histogram` (c, 256) counts of bytes; results in [0, 1]."""
    level = np.arange(256) / 255.0
    share = histogram / histogram.sum(1, keepdims=True)
    mean = share @ level
    deviation = np.sqrt(np.maximum(share @ level**2 - mean**2, 0.0))
    counted = histogram > 0
    statistics = {"min": level[counted.argmax(1)], "max": level[255 - counted[:, ::-1].argmax(1)]}
    statistics |= {"mean": mean, "std": deviation}
    cumulative = np.cumsum(share, axis=1)
    for name, quantile in QUANTILES.items():
        statistics[name] = level[(cumulative >= quantile - 1e-12).argmax(1)]
    return statistics
