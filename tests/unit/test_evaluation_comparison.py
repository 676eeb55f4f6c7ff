"""Two arms held against each other over seeds and starts: differences, verdicts, what more it would take."""

from __future__ import annotations

import numpy as np
import pytest

from tutti.evaluation.statistics.comparison import (
    compare_arms,
    holm,
    needed,
    paired_difference,
    paired_t,
    seed_differences,
    seeds_needed,
    verdict,
)
from tutti.evaluation.statistics.intervals import Interval, paired_episodes_needed


def test_paired_difference_covers_its_value_and_is_exactly_zero_of_equal_arms() -> None:
    base = [[[0] * 8, [0, 1] * 4], [[0] * 8, [0, 1] * 4]]
    other = [[[1] * 8, [0, 1] * 4], [[1] * 6 + [0] * 2, [0, 1] * 4]]
    found = paired_difference(base, other, draws=500)
    assert found.value == pytest.approx((1.0 + 0.75) / 4)
    assert 0 < found.interval.low < found.value < found.interval.high <= 0.5
    found = paired_difference(base, base, draws=200)
    assert (found.value, found.interval.low, found.interval.high) == (0.0, 0.0, 0.0)


def width(base: np.ndarray, other: np.ndarray, draws: int = 10_000) -> float:
    """Of the interval between two arms, [seed, task, start]."""
    interval = paired_difference(list(map(list, base)), list(map(list, other)), draws=draws).interval
    return interval.high - interval.low


def test_paired_difference_sees_the_scatter_of_seeds() -> None:
    """Every start of a seed differs alike, so only other seeds could change the difference."""
    random = np.random.default_rng(0)
    base, of_seeds = random.normal(size=(8, 3, 20)), random.normal(size=(8, 1, 1))
    assert width(base, base + of_seeds) == pytest.approx(2 * 1.96 * of_seeds.std() / 8**0.5, rel=0.05)


def test_paired_difference_does_not_take_the_starts_of_more_seeds_for_more_starts() -> None:
    """Every seed differs alike at a start, so only other starts could, however many seeds there are."""
    random = np.random.default_rng(0)
    base, of_starts = random.normal(size=(8, 3, 20)), random.normal(size=(1, 3, 20))
    truth = 2 * 1.96 * (of_starts.var(axis=2).sum() / 20) ** 0.5 / 3
    assert width(base, base + of_starts) == pytest.approx(truth, rel=0.05)


def test_paired_difference_is_as_wide_as_the_components_of_variance_say() -> None:
    """The mean difference of an experiment scatters by sqrt(A/S + B/(n T) + C/(S n T))."""
    seeds, tasks, starts, of_seeds, of_starts, rest = 30, 2, 60, 0.3, 1.0, 0.8
    random = np.random.default_rng(0)
    truth = (
        of_seeds**2 / seeds + of_starts**2 / (starts * tasks) + rest**2 / (seeds * starts * tasks)
    ) ** 0.5
    found = []
    for _ in range(12):
        delta = of_seeds * random.normal(size=(seeds, 1, 1))
        delta = delta + of_starts * random.normal(size=(1, tasks, starts))
        delta = delta + rest * random.normal(size=(seeds, tasks, starts))
        found.append(width(np.zeros_like(delta), delta, draws=1500))
    assert np.mean(found) == pytest.approx(2 * 1.96 * truth, rel=0.06)


def test_paired_difference_covers_a_model_of_seeds_and_starts_where_the_nested_one_does_not() -> None:
    """A success is 1 where the effects of seed, of start and of both together add up to more than 0.

    Both arms have the rate 1/2, so the true difference is 0: 95 % of the intervals of 80 experiments, give
    or take 4.5 points, hold it. Starts resampled inside each seed, as if every seed had met others, give
    intervals of two thirds of the width.
    """
    random, hits, widths = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    seeds, tasks, starts, draws, experiments = 10, 2, 20, 300, 80
    for _ in range(experiments):
        effects = [
            random.normal(size=(2, seeds, 1, 1)) * 0.3,
            random.normal(size=(2, 1, tasks, starts)) * 1.5,
            random.normal(size=(2, seeds, tasks, starts)),
        ]
        base, other = (sum(effects) > 0).astype(int)
        crossed = paired_difference(list(map(list, base)), list(map(list, other)), draws=draws).interval
        of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
        of_starts = (
            random.multinomial(starts, np.full(starts, 1 / starts), size=(draws, seeds, tasks)) / starts
        )
        means = ((other - base) * of_starts).sum(axis=3).mean(axis=2)
        nested = np.quantile((means * of_seeds).sum(axis=1), [0.025, 0.975])
        bounds = np.array([[crossed.low, crossed.high], nested])
        hits += (bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)
        widths += bounds[:, 1] - bounds[:, 0]
    covered = hits / experiments
    assert covered[0] == pytest.approx(0.95, abs=0.045)
    assert covered[1] < 0.88 and widths[1] < 0.75 * widths[0]


@pytest.mark.parametrize(
    ("bootstrap", "seeds", "expected"),
    [
        ((0.1, 0.2), (0.05, 0.3), "better"),
        ((-0.2, -0.1), (-0.3, -0.05), "worse"),
        ((0.1, 0.2), (-0.1, 0.4), "unresolved"),
        ((-0.1, 0.2), (0.05, 0.1), "unresolved"),
        ((-0.2, -0.1), (-0.3, 0.1), "unresolved"),
        ((-0.3, 0.1), (-0.2, -0.1), "unresolved"),
        ((0.1, 0.2), None, "unresolved"),
    ],
)
def test_verdict_needs_both_intervals_on_one_side_of_zero(
    bootstrap: tuple[float, float], seeds: tuple[float, float] | None, expected: str
) -> None:
    over_seeds = Interval(low=seeds[0], high=seeds[1], rule="t") if seeds else None
    assert verdict(Interval(low=bootstrap[0], high=bootstrap[1], rule="b"), over_seeds) == expected


def test_comparison_keeps_seeds_apart() -> None:
    base = [[[1, 0, 0, 0], [1, 0]], [[0, 0, 0, 0], [1, 1]]]
    other = [[[1, 1, 1, 0], [1, 1]], [[0, 0, 0, 1], [0, 1]]]
    found = compare_arms(base, other, draws=200)
    assert seed_differences(base, other) == [0.5, -0.125]
    assert found.difference.value == pytest.approx(0.1875)
    assert found.discordant == ((0, 3), (1, 1))
    assert found.mcnemar == (pytest.approx(0.25), 1.0)
    assert found.verdict == "unresolved"
    assert found.p == pytest.approx(paired_t([0.5, -0.125]))


def test_one_seed_resolves_nothing() -> None:
    found = compare_arms([[[0] * 20]], [[[1] * 20]], draws=200)
    assert (found.verdict, found.over_seeds, found.p) == ("unresolved", None, None)
    assert found.mcnemar[0] == pytest.approx(2 * 0.5**20)
    assert (found.needed.seeds, found.needed.seeds_dominate) == (None, None)


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ([], []),
        ([[[1]]], [[[1]], [[1]]]),
        ([[[1], [0]]], [[[1]]]),
        ([[[1, 0]]], [[[1]]]),
        ([[[1, 0]], [[1, 0]]], [[[1, 0]]]),
        ([[[1, 0]], [[1]]], [[[1, 0]], [[1]]]),
        ([[[]]], [[[]]]),
    ],
)
def test_arms_that_do_not_pair_are_refused(base: list, other: list) -> None:
    with pytest.raises(ValueError, match="paired arms need"):
        compare_arms(base, other, draws=10)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls() -> None:
    assert holm([0.04, 0.01, None, 0.03]) == [
        pytest.approx(0.06),
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
    ]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_t_is_that_of_the_tables() -> None:
    # mean 2, sd 1, n 3: t = 3.4641 with 2 degrees of freedom.
    assert paired_t([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)
    assert (paired_t([0.0, 0.0]), paired_t([0.1, 0.1])) == (1.0, 0.0)


@pytest.mark.parametrize(("mean", "seeds"), [(1.0, 10), (0.5, 34), (0.8, 15), (0.2, 199)])
def test_seeds_needed_are_those_of_cohens_table(mean: float, seeds: int) -> None:
    spread = 2**-0.5  # of two values at mean +- this the standard deviation is 1
    assert seeds_needed([mean - spread, mean + spread]) == seeds


def test_no_number_of_seeds_finds_a_difference_of_nothing() -> None:
    assert seeds_needed([0.1, -0.1]) is None
    assert seeds_needed([0.1, 0.1]) == 2
    assert seeds_needed([-0.1, 0.10001]) is None


def test_needed_starts_come_from_the_observed_difference_and_discordant_share() -> None:
    base = [[[0] * 8 + [1] * 2]] * 2
    other = [[[1] * 3 + [0] * 5 + [0] + [1]]] * 2
    found = needed(base, other)
    assert found.starts == paired_episodes_needed(0.2, 0.4)
    assert needed(base, base).starts is None
    first, second = (
        [[[0] * (5 - k) + [1] * (5 + k) for k in gains]] * 2 for gains in ((0, 0, 0), (-3, 1, 2))
    )
    assert needed(first, second).starts is None, "equal totals, whatever the rounding"


def test_seeds_dominate_where_trainings_scatter_more_than_starts_explain() -> None:
    zero = [[0] * 10] * 2
    whole, none = [[1] * 9 + [0]] * 2, [[1] + [0] * 9] * 2
    assert needed([zero, zero], [whole, none]).seeds_dominate
    half = [[0, 1] * 5] * 2
    assert needed([zero, zero], [half, half]).seeds_dominate is False
    assert needed([[[0]], [[0]]], [[[1]], [[0]]]).seeds_dominate is None


@pytest.mark.parametrize(("second", "dominate"), [(7, False), (8, True)])
def test_seeds_dominate_above_twice_the_variance_of_the_starts(second: int, dominate: bool) -> None:
    """Two tasks of ten starts; one seed gains 5 of 10 in both, the other 7 or 8.

    Starts: the mean over the seeds of 2 (k (10 - k)/90)/10/4: .0128 and .0114. Seeds: .2^2/2 = .02 and
    .3^2/2 = .045, against twice that.
    """
    gains = [[[1] * k + [0] * (10 - k)] * 2 for k in (5, second)]
    assert needed([[[0] * 10] * 2] * 2, gains).seeds_dominate is dominate
