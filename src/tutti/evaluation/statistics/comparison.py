"""Paired comparison of two arms over training seeds: difference, verdict, and the sample size it would take;
and contrasts of several, such as the main effect of a factor.

Both arms have the same training seeds and met the same starts. Arguments named `base` and `other` are
[training seed][task] -> one 0/1 per start; every difference is `other` minus `base`, of task means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from tutti.evaluation.statistics.intervals import (
    CONFIDENCE,
    DRAWS,
    OVER_BOTH,
    POWER,
    Difference,
    Interval,
    Z,
    discordant,
    mcnemar,
    paired_episodes_needed,
    percentiles,
    resampled_means,
    t_interval,
)

Arm = Sequence[Sequence[ArrayLike]]
Verdict = Literal["better", "worse", "unresolved"]

MAX_SEEDS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """Sample sizes that would resolve a difference as large as the observed one, with a power of 80 % at 5 %.

    `starts`: paired starts between two trainings that scatter as these do; `seeds`: training seeds of both
    arms, each with the starts of now. None where no number is enough or nothing is known. `seeds_dominate`:
    the trainings' own scatter is more of the variance than the starts, so more starts would not do.
    """

    starts: int | None
    seeds: int | None
    seeds_dominate: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm against the baseline.

    `over_seeds` is the t-interval of the seeds' differences and `p` its two-sided p; both None with one
    seed. `mcnemar` has the exact p of each seed, over its starts: it compares two trainings, not two methods.
    `discordant` has each seed's (only the baseline succeeded, only the arm did).
    """

    difference: Difference
    over_seeds: Interval | None
    p: float | None
    verdict: Verdict
    mcnemar: tuple[float, ...]
    discordant: tuple[tuple[int, int], ...]
    needed: Needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A weighted sum of arms, over the same seeds and starts: its value, that of each seed, and intervals and
    verdict as in `Comparison`."""

    difference: Difference
    of_seeds: tuple[float, ...]
    over_seeds: Interval | None
    p: float | None
    verdict: Verdict


def contrast(arms: Sequence[Arm], weights: Sequence[int | float], draws: int = DRAWS) -> Contrast:
    """sum_k weights[k] * task mean of arms[k], formed seed by seed and start by start.

    Two arms with the weights -1 and 1 give their difference. A factor of a full design over K arms gives its
    main effect with 2/K where it is on and -2/K where it is off; an interaction of two has the product of
    their signs. Source: Box, Hunter and Hunter, Statistics for Experimenters (2005), ch. 5.

    Raises: ValueError where the arms do not have the same seeds, tasks and starts.

    >>> off, on = [[[0, 0, 1, 1]], [[0, 1, 1, 0]]], [[[1, 0, 1, 1]], [[1, 1, 1, 1]]]
    >>> contrast([off, on], [-1, 1]).difference.value
    0.375
    """
    tables = _weighted(arms, weights)
    difference = _difference(tables, draws)
    of_seeds = np.mean([table.mean(axis=1) for table in tables], axis=0).tolist()
    over_seeds = t_interval(of_seeds) if len(of_seeds) > 1 else None
    return Contrast(
        difference=difference,
        of_seeds=tuple(of_seeds),
        over_seeds=over_seeds,
        p=paired_t(of_seeds) if len(of_seeds) > 1 else None,
        verdict=verdict(difference.interval, over_seeds),
    )


def compare_arms(base: Arm, other: Arm, draws: int = DRAWS) -> Comparison:
    """Compares `other` with `base`, seed by seed and start by start.

    Raises: ValueError where the arms do not have the same seeds, tasks and starts.

    >>> base = [[[0, 0, 1, 1, 0, 1]], [[0, 1, 1, 0, 0, 1]], [[0, 0, 1, 0, 1, 1]]]
    >>> other = [[[1, 0, 1, 1, 1, 1]], [[1, 1, 1, 0, 1, 1]], [[1, 0, 1, 1, 1, 0]]]
    >>> result = compare_arms(base, other)
    >>> f"{result.difference.value:+.2f}, bootstrap {result.difference.interval.percent()}"
    '+0.28, bootstrap -11-67 %'
    >>> result.over_seeds.percent(), result.verdict
    ('4-52 %', 'unresolved')
    """
    difference = paired_difference(base, other, draws=draws)
    deltas = seed_differences(base, other)
    over_seeds = t_interval(deltas) if len(deltas) > 1 else None
    flat = [(np.concatenate([*a]), np.concatenate([*b])) for a, b in zip(base, other, strict=True)]
    return Comparison(
        difference=difference,
        over_seeds=over_seeds,
        p=paired_t(deltas) if len(deltas) > 1 else None,
        verdict=verdict(difference.interval, over_seeds),
        mcnemar=tuple(mcnemar(before, after) for before, after in flat),
        discordant=tuple(discordant(before, after) for before, after in flat),
        needed=needed(base, other),
    )


def paired_difference(base: Arm, other: Arm, draws: int = DRAWS) -> Difference:
    """Difference of the task means (other - base), percentile interval of a bootstrap over seeds and starts.

    `resampled_means` of the start-wise differences, so both arms are drawn together. Resampling three seeds
    gives too narrow an interval: see `verdict`.

    Raises: ValueError where the arms do not have the same seeds, tasks and starts.
    """
    return _difference([np.stack(task) for task in zip(*_deltas(base, other), strict=True)], draws)


def seed_differences(base: Arm, other: Arm) -> list[float]:
    """The difference of task means of each training seed.

    Raises: ValueError as `paired_difference`.
    """
    return [float(np.mean([delta.mean() for delta in tasks])) for tasks in _deltas(base, other)]


def verdict(bootstrap: Interval, over_seeds: Interval | None) -> Verdict:
    """Better or worse only where both intervals lie on one side of 0, else unresolved.

    Resampling three seeds gives too narrow an interval, so it may not decide alone; with one seed nothing is
    known about other trainings.
    """
    if over_seeds is None:
        return "unresolved"
    if min(bootstrap.low, over_seeds.low) > 0:
        return "better"
    return "worse" if max(bootstrap.high, over_seeds.high) < 0 else "unresolved"


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p of Student's t-test that the seeds' differences have mean 0; equal ones give 0, zeros 1."""
    values = np.asarray(differences, dtype=np.float64)
    if np.ptp(values) == 0:
        return 1.0 if values[0] == 0 else 0.0
    t = float(values.mean() / (values.std(ddof=1) / math.sqrt(len(values))))
    return float(2 * stats.t.sf(abs(t), len(values) - 1))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p of each: sorted, the i-th smallest of m times m - i + 1, never below the one before.

    None (nothing was tested) stays None and is not counted. Source: Holm, Scand. J. Statistics 6 (1979).
    """
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = highest
    return adjusted


def needed(base: Arm, other: Arm) -> Needed:
    """What it would take to see the difference that was seen, if it is the true one.

    `starts` by Miettinen's formula from the observed difference and the share of discordant starts (mean of
    the tasks' shares, over all seeds); `seeds` by `seeds_needed`. The starts' part of a seed's variance is
    sum over tasks s^2/n / T^2 with s^2 the variance of the start-wise differences inside the task; the
    seeds dominate where the variance of the seeds' differences is more than twice that.
    """
    tables = _deltas(base, other)
    values = seed_differences(base, other)
    difference = round(float(np.mean(values)), 12)  # equal totals differ by 1e-17
    share = float(np.mean([[np.abs(delta).mean() for delta in tasks] for tasks in tables]))
    starts = None
    if difference != 0:
        starts = paired_episodes_needed(difference, max(share, abs(difference)))
    if len(values) < 2:
        return Needed(starts=starts, seeds=None, seeds_dominate=None)
    dominate = None
    if all(len(delta) > 1 for delta in tables[0]):
        of_starts = float(np.mean([_variance_of_starts(tasks) for tasks in tables]))
        dominate = float(np.var(values, ddof=1)) > 2 * of_starts
    return Needed(starts=starts, seeds=seeds_needed(values), seeds_dominate=dominate)


def seeds_needed(differences: Sequence[float]) -> int | None:
    """Training seeds for a t-test to find the mean of these differences, given their standard deviation.

    The smallest n whose power under the noncentral t with shift mean/sd * sqrt(n) reaches `power`: mean =
    sd takes 10, mean = sd/2 takes 34. None for a mean of 0, or beyond 100,000 seeds. Source: Cohen,
    Statistical Power Analysis (1988), ch. 2.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, deviation = abs(float(values.mean())), float(values.std(ddof=1))
    if mean == 0:
        return None
    if deviation == 0:
        return 2
    effect = mean / deviation
    rough = (Z + stats.norm.ppf(POWER)) / effect
    if rough**2 > MAX_SEEDS:
        return None
    count = max(2, math.floor(rough**2))  # the normal approximation: never above what the t-test needs
    while _t_power(effect, count) < POWER:
        count += 1
    return count


def _t_power(effect: float, count: int) -> float:
    critical = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)
    shift = effect * math.sqrt(count)
    upper = stats.nct.sf(critical, count - 1, shift)
    lower = stats.nct.cdf(-critical, count - 1, shift)
    # Far out in the tail scipy gives NaN; there the chance to err on that side is 0.
    return float(upper) + (0.0 if math.isnan(lower) else float(lower))


def _difference(tables: Sequence[np.ndarray], draws: int) -> Difference:
    """The mean of the tasks' means, [seed, start] each, with its bootstrap."""
    interval = percentiles(resampled_means(tables, draws), f"paired {OVER_BOTH}")
    return Difference(value=float(np.mean([table.mean() for table in tables])), interval=interval)


def _weighted(arms: Sequence[Arm], weights: Sequence[int | float]) -> list[np.ndarray]:
    """For each task the weighted sum of the arms' successes, [seed, start]."""
    for other in arms[1:]:
        _deltas(arms[0], other)  # the same seeds, tasks and starts
    tables = [[np.stack(task) for task in zip(*arm, strict=True)] for arm in arms]
    return [
        sum((w * table for w, table in zip(weights, task, strict=True)), np.zeros(task[0].shape))
        for task in zip(*tables, strict=True)
    ]


def _deltas(base: Arm, other: Arm) -> list[list[np.ndarray]]:
    """[seed][task] -> other - base of each start."""
    shapes, others = ([[np.shape(task) for task in tasks] for tasks in arm] for arm in (base, other))
    sizes = {shape for tasks in shapes for shape in tasks}
    same = shapes == others and all(tasks == shapes[0] for tasks in shapes)
    if not sizes or not same or any(len(size) != 1 or size[0] == 0 for size in sizes):
        raise ValueError("paired arms need the same training seeds, each with the same tasks and starts")
    return [
        [
            np.asarray(after, np.float64) - np.asarray(before, np.float64)
            for before, after in zip(*tasks, strict=True)
        ]
        for tasks in zip(base, other, strict=True)
    ]


def _variance_of_starts(tasks: Sequence[np.ndarray]) -> float:
    """Variance of a seed's task-mean difference that the choice of starts explains."""
    return float(sum(delta.var(ddof=1) / len(delta) for delta in tasks) / len(tasks) ** 2)
