"""Intervals and tests for success rates: what k successes of n rollouts do and do not say.

Every rate is a fraction in [0, 1]. Every interval is two-sided. Everything that draws random numbers is a
function of its `seed`. Numbers to remember: 10 of 10 is 72-100 % (Wilson); 40 against 45 of 50 is p = .21.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

DRAWS = 10_000  # bootstrap resamples; the Monte Carlo error of a 95 % bound is then about 1 % of its width


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """low <= high, with the name of the rule that gave them."""

    low: float
    high: float
    rule: str

    def overlaps(self, other: Interval) -> bool:
        """Whether some value lies in both; touching counts."""
        return self.low <= other.high and other.low <= self.high

    def percent(self) -> str:
        """The bounds in whole per cent, as "72-100"."""
        return f"{100 * self.low:.0f}-{100 * self.high:.0f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference of two rates, second minus first, with its interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval; None where a single cluster cannot give one."""

    value: float
    interval: Interval | None

    def affine(self, scale: int | float, shift: int | float) -> Estimate:
        """scale * x + shift, for the number and its bounds."""
        if self.interval is None:
            return Estimate(value=scale * self.value + shift, interval=None)
        ends = sorted(scale * bound + shift for bound in (self.interval.low, self.interval.high))
        interval = Interval(low=ends[0], high=ends[1], rule=self.interval.rule)
        return Estimate(value=scale * self.value + shift, interval=interval)

    def below(self, bound: float) -> bool:
        """Whether the whole interval lies below `bound`; False without an interval."""
        return self.interval is not None and self.interval.high < bound

    def above(self, bound: float) -> bool:
        """Whether the whole interval lies above `bound`; False without an interval."""
        return self.interval is not None and self.interval.low > bound


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a fraction between 0 and 1 (such as 0.95), not {confidence}")
    return float(stats.norm.ppf(0.5 + confidence / 2))


def _check(k: int, n: int) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"k successes of n rollouts needs n >= 1 and 0 <= k <= n, not k = {k}, n = {n}")


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a rate: ((k + z^2/2) +- z sqrt(k (n - k)/n + z^2/4)) / (n + z^2).

    Source: E. B. Wilson, JASA 22 (1927). Mean coverage is close to nominal at small n, also near 0 and 1.
    """
    _check(k, n)
    z = _z(confidence)
    centre = k + z * z / 2
    spread = z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)
    # At k = 0 and k = n the bound is exactly 0 or 1; rounding must not leave 1e-17.
    return Interval(low=0.0 if k == 0 else low, high=1.0 if k == n else high, rule="Wilson")


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """The exact, conservative interval: Beta^-1(a/2; k, n - k + 1) to Beta^-1(1 - a/2; k + 1, n - k).

    Source: Clopper and Pearson, Biometrika 26 (1934). Covers at least at `confidence` for every rate.
    """
    _check(k, n)
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(stats.beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(stats.beta.ppf(1 - tail, k + 1, n - k))
    return Interval(low=low, high=high, rule="Clopper-Pearson")


def barnard(k1: int, n1: int, k2: int, n2: int) -> float:
    """Two-sided p of Barnard's exact test that two independent arms share one rate.

    More powerful than Fisher's at robot sample sizes: 40 against 45 of 50 gives .21 (Fisher .26). For arms
    that met the same starts use `mcnemar`. Source: Barnard, Biometrika 34 (1947), by
    `scipy.stats.barnard_exact`.
    """
    _check(k1, n1)
    _check(k2, n2)
    return float(stats.barnard_exact([[k1, k2], [n1 - k1, n2 - k2]]).pvalue)


def discordant(first: ArrayLike, second: ArrayLike) -> tuple[int, int]:
    """(b, c) of two arms on the same starts: b only the first succeeded, c only the second."""
    one, two = _paired(first, second)
    return int((one & ~two).sum()), int((~one & two).sum())


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p of the exact McNemar test: the binomial test of b in b + c trials at 1/2.

    `first`, `second`: success per start, same starts in the same order. No discordant start gives p = 1.
    Source: McNemar, Psychometrika 12 (1947).
    """
    b, c = discordant(first, second)
    return 1.0 if b + c == 0 else float(stats.binomtest(b, b + c, 0.5).pvalue)


def newcombe_difference(k1: int, n1: int, k2: int, n2: int, confidence: float = 0.95) -> Difference:
    """p2 - p1 of two independent arms, with Newcombe's hybrid score interval (his method 10).

    With Wilson bounds l, u of each arm and D = p2 - p1:
    D - sqrt((p2 - l2)^2 + (u1 - p1)^2)  to  D + sqrt((u2 - p2)^2 + (p1 - l1)^2).
    Source: R. G. Newcombe, Statistics in Medicine 17 (1998).
    """
    one, two = wilson(k1, n1, confidence), wilson(k2, n2, confidence)
    p1, p2 = k1 / n1, k2 / n2
    low = p2 - p1 - math.hypot(p2 - two.low, one.high - p1)
    high = p2 - p1 + math.hypot(two.high - p2, p1 - one.low)
    return Difference(value=p2 - p1, interval=Interval(low=low, high=high, rule="Newcombe"))


def paired_bootstrap_difference(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Difference of the task means of two arms (second - first) that met the same starts.

    Each argument holds, per task, the success of each start; the starts are resampled inside each task,
    both arms together, tasks stay fixed, percentile interval. Source: Efron and Tibshirani (1993), ch. 13.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"paired arms need the same tasks (at least one), not {len(first)} and {len(second)}"
        )
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    value = 0.0
    for one, two in zip(first, second, strict=True):
        a, b = _paired(one, two)
        delta = b.astype(np.float64) - a
        total += delta[generator.integers(len(delta), size=(draws, len(delta)))].mean(axis=1)
        value += float(delta.mean())
    interval = _percentiles(total / len(first), confidence, "paired bootstrap over starts, tasks fixed")
    return Difference(value=value / len(first), interval=interval)


def stratified_bootstrap(
    successes: Sequence[Sequence[ArrayLike]],
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the task mean; `successes[training seed][task]` holds one 0/1 per start.

    One draw resamples training seeds, then for each chosen seed the starts inside each task, and takes
    the mean over tasks and seeds. Tasks stay fixed: the claim is about these tasks. With one training
    seed it says nothing about other trainings; where every start of every task agrees its width is 0 (see
    `mean_of_rates`). Source: stratified bootstrap as in rliable (arXiv 2108.13264).
    """
    if not successes or len({len(tasks) for tasks in successes}) != 1 or not successes[0]:
        raise ValueError("successes needs at least one training seed, each with the same tasks, at least one")
    generator = np.random.default_rng(seed)
    count, tasks = len(successes), len(successes[0])
    total = np.zeros(draws)
    for _ in range(count):
        chosen = generator.integers(count, size=draws)
        for task in range(tasks):
            arms = [_bits(successes[s][task]) for s in range(count)]
            n = np.array([len(arm) for arm in arms])
            k = np.array([int(arm.sum()) for arm in arms])
            # n draws with replacement from n bits of which k are set: exactly Binomial(n, k/n) successes.
            total += generator.binomial(n[chosen], (k / n)[chosen]) / n[chosen]
    over = "training seeds and starts" if count > 1 else "starts"
    return _percentiles(total / (count * tasks), confidence, f"stratified bootstrap over {over}, tasks fixed")


def ratio_of_sums(
    top: ArrayLike,
    bottom: ArrayLike,
    clusters: ArrayLike,
    *,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """sum(top) / sum(bottom), with the percentile bootstrap over whole clusters.

    Rows of one cluster (the windows of an episode, say) are not independent, so clusters are drawn with
    replacement and their sums divided. One cluster gives no interval. Source: Davison and Hinkley, Bootstrap
    Methods and their Application (1997), 3.8.
    """
    numbers = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums = np.stack([np.bincount(numbers, np.asarray(part, np.float64)) for part in (top, bottom)])
    count = sums.shape[1]
    smallest = np.finfo(np.float64).tiny
    value = float(sums[0].sum() / max(sums[1].sum(), smallest))
    if count < 2:
        return Estimate(value=value, interval=None)
    generator = np.random.default_rng(seed)
    times = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    drawn = np.einsum("dc,kc->dk", times, sums)
    ratios = drawn[:, 0] / np.maximum(drawn[:, 1], smallest)
    return Estimate(
        value=value, interval=_percentiles(ratios, confidence, f"bootstrap over {count} episodes")
    )


def mean_of_rates(counts: Sequence[tuple[int, int]], confidence: float = 0.95) -> Interval:
    """Interval of the mean of the tasks' rates from their (k, n), which keeps a width at all 0 or all n.

    MOVER: with p, l, u of each task's Wilson interval and T tasks, mean - sqrt(sum (p - l)^2)/T to
    mean + sqrt(sum (u - p)^2)/T. Source: Zou and Donner, Statistics in Medicine 27 (2008).
    """
    if not counts:
        raise ValueError("the mean of rates needs at least one task")
    bounds = [wilson(k, n, confidence) for k, n in counts]
    rates = [k / n for k, n in counts]
    mean = sum(rates) / len(rates)
    low = mean - math.sqrt(sum((p - i.low) ** 2 for p, i in zip(rates, bounds, strict=True))) / len(rates)
    high = mean + math.sqrt(sum((i.high - p) ** 2 for p, i in zip(rates, bounds, strict=True))) / len(rates)
    return Interval(low=max(0.0, low), high=min(1.0, high), rule="MOVER of Wilson, tasks fixed")


def t_interval(means: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean +- t(1 - a/2; m - 1) s / sqrt(m) of m training seeds' means: the honest one below 5 seeds.

    A seed standard deviation of 3 points gives +-7.5 at 3 seeds, +-3.7 at 5. Source: Student (1908).
    """
    if len(means) < 2:
        raise ValueError(f"a t-interval needs at least 2 training seeds, not {len(means)}")
    values = np.asarray(means, dtype=np.float64)
    quantile = stats.t.ppf(0.5 + confidence / 2, len(values) - 1)
    half = float(quantile * values.std(ddof=1) / math.sqrt(len(values)))
    centre = float(values.mean())
    return Interval(low=centre - half, high=centre + half, rule="t over training seeds")


def episodes_needed(p1: float, p2: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Rollouts per independent arm to tell rate p1 from p2 with `power`.

    n = (z_a sqrt(2 p q) + z_b sqrt(p1 q1 + p2 q2))^2 / (p1 - p2)^2, p = (p1 + p2)/2, q = 1 - p (Fleiss 1981).
    .50 against .60 takes 388.
    """
    if p1 == p2:
        raise ValueError("no number of rollouts tells two equal rates apart: p1 and p2 must differ")
    p = (p1 + p2) / 2
    spread = math.sqrt(p1 * (1 - p1) + p2 * (1 - p2))
    top = _z(confidence) * math.sqrt(2 * p * (1 - p)) + float(stats.norm.ppf(power)) * spread
    return math.ceil((top / (p1 - p2)) ** 2)


def paired_episodes_needed(
    difference: float, discordant_share: float, power: float = 0.8, confidence: float = 0.95
) -> int:
    """Shared starts to see a paired `difference` D: ((z_a sqrt(q) + z_b sqrt(q - D^2)) / D)^2, q the share of
    starts on which the arms disagree (Miettinen, Biometrics 24 (1968)). D .10 at q .30 takes 234.
    """
    if difference == 0 or abs(difference) > discordant_share:
        raise ValueError(
            f"difference: expected not 0, at most the discordant share {discordant_share}, got {difference}"
        )
    top = _z(confidence) * math.sqrt(discordant_share)
    top += float(stats.norm.ppf(power)) * math.sqrt(discordant_share - difference**2)
    return math.ceil((top / difference) ** 2)


def _bits(values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0 or not np.isin(array, (0, 1)).all():
        raise ValueError(f"successes are a non-empty row of 0 and 1, not an array of shape {array.shape}")
    return array.astype(bool)


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    one, two = _bits(first), _bits(second)
    if len(one) != len(two):
        raise ValueError(f"paired arms need the same starts, not {len(one)} and {len(two)} of them")
    return one, two


def _percentiles(values: NDArray[np.float64], confidence: float, rule: str) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high), rule=rule)
