"""How often the 95 % intervals of evaluations hold the true value: method x rollouts x rate.

python benchmarks/interval_coverage.py: of one rate exactly; of a task mean and of a paired difference by
simulation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from scipy import stats
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.evaluation.statistics.intervals import Z, mean_of_rates, paired_interval, wilson
from tutti.runs.provenance import circumstances, made_with

ROLLOUTS, RATES = (10, 20, 50, 100, 500), (0.05, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
TASKS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("8 tasks at 50 %", (0.5,) * 8),
    ("8 tasks at 95 %", (0.95,) * 8),
    ("10 tasks at 99 %", (0.99,) * 10),
    ("50 tasks from 10 to 100 %", tuple(np.linspace(0.1, 1.0, 50).tolist())),
    ("50 tasks from 70 to 100 %", tuple(np.linspace(0.7, 1.0, 50).tolist())),
)
EACH = (10, 20, 50)
PAIRS = ((0.5, 0.5), (0.8, 0.9), (0.95, 0.97), (0.99, 0.99))
STARTS = (20, 80, 400)
DRAWS = 1000
"""Resamples of the percentile bootstrap, which is there for comparison alone."""
Bounds = tuple[float, float]


def _clopper_pearson(k: int, n: int) -> Bounds:
    found = stats.binomtest(k, n).proportion_ci(0.95, "exact")
    return float(found.low), float(found.high)


def _wilson(k: int, n: int) -> Bounds:
    found = wilson(k, n)
    return found.low, found.high


def _wald(k: int, n: int) -> Bounds:
    half = Z * np.sqrt(k * (n - k) / n) / n
    return k / n - half, k / n + half


ONE_RATE: dict[str, Callable[[int, int], Bounds]] = {
    "Wilson": _wilson,
    "Clopper and Pearson": _clopper_pearson,
    "Wald": _wald,
}


@cache
def bounds(method: str, n: int) -> np.ndarray:
    """Lower and upper bound for each k from 0 to n."""
    return np.array([ONE_RATE[method](k, n) for k in range(n + 1)])


def coverage(method: str, n: int, rate: float) -> float:
    """The sum over k of P(k) where the interval holds `rate`: exact."""
    low, high = bounds(method, n).T
    held = (low - 1e-12 <= rate) & (rate <= high + 1e-12)
    return float(stats.binom.pmf(np.arange(n + 1), n, rate)[held].sum())


def of_task_mean(rates: Sequence[float], n: int, runs: int) -> dict[str, float]:
    """Shares of `runs` evaluations of n rollouts a task whose interval holds the mean of `rates`."""
    random, true = np.random.default_rng([len(rates), n]), float(np.mean(rates))
    held = dict.fromkeys(("Price and Bonett", "Wilson, pooled", "bootstrap"), 0)
    for counts in random.binomial(n, np.array(rates), (runs, len(rates))):
        ours = mean_of_rates([(int(k), n) for k in counts])
        pooled = wilson(int(counts.sum()), n * len(rates))
        means = random.binomial(n, counts / n, (DRAWS, len(rates))).mean(1) / n
        low, high = np.percentile(means, (2.5, 97.5))
        held["Price and Bonett"] += ours.low <= true <= ours.high
        held["Wilson, pooled"] += pooled.low <= true <= pooled.high
        held["bootstrap"] += bool(low <= true <= high)
    return {method: count / runs for method, count in held.items()}


def of_difference(first: float, second: float, n: int, runs: int) -> float:
    """The share of `runs` evaluations of two policies on n shared starts whose interval holds the difference
    of their rates. One number a start decides half of the time for both."""
    random = np.random.default_rng([round(100 * first), round(100 * second), n])
    shared, same = random.random((runs, n)), random.random((runs, n)) < 0.5
    one, two = (np.where(same, shared, random.random((runs, n))) < rate for rate in (first, second))
    found = [paired_interval(a, b) for a, b in zip(one, two, strict=True)]
    return float(np.mean([each.low <= second - first <= each.high for each in found]))


@prints_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Computes, prints and publishes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="simulated evaluations of each line")
    parser.add_argument("--output", type=Path, default=RESULTS / "interval_coverage", help="without suffix")
    given = parser.parse_args(arguments)
    runs, made = given.runs, circumstances()
    exact = {(m, n): [coverage(m, n, rate) for rate in RATES] for m in ONE_RATE for n in ROLLOUTS}
    means = {(name, n): of_task_mean(rates, n, runs) for name, rates in TASKS for n in EACH}
    pairs = {(a, b, n): of_difference(a, b, n, runs) for a, b in PAIRS for n in STARTS}
    methods = tuple(next(iter(means.values())))
    tables = [
        Table(
            title="One rate of n rollouts, exactly",
            heads=("method", "n", *(f"p {rate:g}" for rate in RATES)),
            rows=tuple((m, str(n), *map(_percent, row)) for (m, n), row in exact.items()),
        ),
        Table(
            title=f"Mean of tasks, n rollouts each, {runs} simulations",
            heads=("tasks", "n", *methods),
            rows=tuple((name, str(n), *map(_percent, one.values())) for (name, n), one in means.items()),
        ),
        Table(
            title=f"Difference of two policies on the same n starts (Bonett and Price), {runs} simulations",
            heads=("rates", *(f"n {n}" for n in STARTS)),
            rows=tuple(
                (f"{a:.0%} and {b:.0%}", *(_percent(pairs[a, b, n]) for n in STARTS)) for a, b in PAIRS
            ),
        ),
    ]
    notes = [
        "95 % is the aim: less means that an interval is too narrow. Tutti prints Wilson for a task, Price "
        "and Bonett for a mean of tasks, Bonett and Price for a paired difference; the others are for "
        "comparison. Pooled: all rollouts as one rate, which is too wide where tasks differ.",
        made_with(made),
    ]
    result = {
        **made,
        "runs": runs,
        "one_rate": [{"method": m, "n": n, "p": list(RATES), "coverage": c} for (m, n), c in exact.items()],
        "task_mean": [{"tasks": name, "n": n, **one} for (name, n), one in means.items()],
        "difference": [{"rates": [a, b], "n": n, "coverage": c} for (a, b, n), c in pairs.items()],
    }
    publish(given.output, "benchmarks/interval_coverage", tables, notes, result)
    return 0


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


if __name__ == "__main__":
    sys.exit(main())
