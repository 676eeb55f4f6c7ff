"""The statistics of success rates against scipy and against the numbers of science.md, section 10."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tutti.evaluation.statistics import intervals as st


@pytest.mark.parametrize(
    ("k", "n", "percent"),
    [(10, 10, "72-100 %"), (50, 100, "40-60 %"), (475, 500, "93-97 %"), (1600, 2000, "78-82 %")],
)
def test_table_of_wilson_widths(k: int, n: int, percent: str) -> None:
    assert st.wilson(k, n).percent() == percent
    assert st.wilson(0, n).low == 0.0 and st.wilson(n, n).high == 1.0


def test_mcnemar_is_the_binomial_test_of_the_discordant_starts() -> None:
    first = [1] * 8 + [0] * 2 + [1] * 5
    second = [0] * 8 + [1] * 2 + [1] * 5
    assert st.discordant(first, second) == (8, 2)
    assert st.mcnemar(first, second) == pytest.approx(stats.binomtest(8, 10, 0.5).pvalue)
    assert st.mcnemar(first, first) == 1.0


def coverage(rates: list[float], n: int) -> float:
    """The share of 20,000 evaluations whose interval holds the mean of these rates."""
    random = np.random.default_rng(0)
    drawn = random.binomial(n, rates, size=(20_000, len(rates)))
    rows, times = np.unique(np.sort(drawn, axis=1), axis=0, return_counts=True)  # the order is of no matter
    truth = float(np.mean(rates))
    bounds = [st.mean_of_rates([(k, n) for k in row]) for row in rows.tolist()]
    return sum(t for b, t in zip(bounds, times, strict=True) if b.low <= truth <= b.high) / len(drawn)


@pytest.mark.parametrize(
    ("tasks", "rate", "n"), [(8, 0.95, 20), (10, 0.99, 20), (10, 0.01, 20), (4, 0.5, 10)]
)
def test_interval_of_the_task_mean_covers_at_high_success_too(tasks: int, rate: float, n: int) -> None:
    assert coverage([rate] * tasks, n) >= 0.94


def test_interval_of_the_task_mean_covers_over_unequal_tasks() -> None:
    assert coverage([0.4, 0.7, 0.9, 0.95, 0.99, 1.0, 1.0, 1.0], 20) >= 0.94


def test_interval_of_the_task_mean_is_price_and_bonetts() -> None:
    # Two tasks: p = (k + 1)/(n + 2) are 10/12 and 3/12; (10/12 + 3/12)/2 +- 1.96 sqrt(.011574 + .015625)/2.
    found = st.mean_of_rates([(9, 10), (2, 10)])
    assert (found.low, found.high) == pytest.approx((0.541667 - 0.161621, 0.541667 + 0.161621), abs=2e-6)
    # At 8 x 20 of 20: p = 20.25/20.5 = .987805; half = 1.96 sqrt(8 p (1 - p)/20.5)/8 = .016798.
    whole = st.mean_of_rates([(20, 20)] * 8)
    assert (whole.low, whole.high) == (pytest.approx(0.987805 - 0.016797, abs=2e-6), 1.0)
    nothing = st.mean_of_rates([(0, 20)] * 8)
    assert (nothing.low, nothing.high) == (0.0, pytest.approx(1 - whole.low))


def test_interval_of_the_task_mean_of_failures_mirrors_that_of_successes() -> None:
    counts = [(3, 20), (11, 20), (20, 20), (0, 15)]
    found, mirrored = st.mean_of_rates(counts), st.mean_of_rates([(n - k, n) for k, n in counts])
    assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))
    assert st.mean_of_rates(counts[::-1]).low == pytest.approx(found.low)


def test_readme_and_results_show_the_interval_of_the_demo() -> None:
    root = Path(__file__).resolve().parents[2]
    counts = json.loads((root / "benchmarks" / "results" / "demo.json").read_text())["success"].values()
    low, high = st.mean_of_rates([(k, n) for k, n in counts]).percent().removesuffix(" %").split("-")
    rate = sum(k / n for k, n in counts) / len(counts)
    for page in ("README.md", "docs/background/results.md"):
        text = (root / page).read_text(encoding="utf-8")
        assert f"{100 * rate:.1f} % ({low} to {high} %, Price and Bonett)" in text


def test_one_task_has_one_interval_wherever_it_is_shown() -> None:
    assert st.mean_of_rates([(7, 20)]) == st.wilson(7, 20)
    assert st.seeds_and_starts([[[1, 1, 0, 1]]]) == st.wilson(3, 4)
    bits = [[1, 1, 0, 1], [0, 0, 1, 1]]
    assert st.seeds_and_starts([bits]) == st.mean_of_rates([(3, 4), (2, 4)])


@pytest.mark.parametrize("counts", [[], [(1, 0)], [(3, 2), (1, 2)]])
def test_mean_of_impossible_counts_is_refused(counts: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="needs"):
        st.mean_of_rates(counts)


def components(table: np.ndarray) -> tuple[float, float, float]:
    """Variance of the seeds' means, of the starts' means, and of what is left, of one task."""
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    return table.mean(1).var(), table.mean(0).var(), left.var()


def half_width(draws: np.ndarray) -> float:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(high - low) / 2


def test_resampled_means_have_the_variance_of_crossed_seeds_and_starts() -> None:
    random = np.random.default_rng(0)
    seeds, starts = 6, 15
    of_seeds = random.normal(size=(seeds, 1))
    tables = [
        of_seeds + scale * random.normal(size=(1, starts)) + random.normal(size=(seeds, starts))
        for scale in (0.5, 2.0)
    ]
    both = np.mean([table.mean(1) for table in tables], axis=0).var() / seeds
    truth = (
        both
        + sum(starts_ / starts + rest / (seeds * starts) for _, starts_, rest in map(components, tables)) / 4
    )
    draws = st.resampled_means(tables, 20_000)
    assert draws.var() == pytest.approx(truth, rel=0.03)
    assert half_width(draws) == pytest.approx(1.96 * truth**0.5, rel=0.04)
    assert draws.mean() == pytest.approx(np.mean([table.mean() for table in tables]), abs=0.02)


def test_seeds_alone_and_starts_alone_each_give_their_own_width() -> None:
    random = np.random.default_rng(1)
    seeds, starts = random.normal(size=(10, 1)), random.normal(size=(1, 25))
    only_seeds = half_width(st.resampled_means([seeds + np.zeros((10, 25))] * 3))
    assert only_seeds == pytest.approx(1.96 * seeds.std() / 10**0.5, rel=0.05)  # tasks do not average it out
    only_starts = half_width(st.resampled_means([starts + np.zeros((10, 25))] * 4))
    # Ten seeds on the same starts are no more starts; four tasks have starts of their own.
    assert only_starts == pytest.approx(1.96 * starts.std() / 25**0.5 / 2, rel=0.05)


def test_bootstrap_of_the_task_mean_covers_over_new_seeds_and_new_starts() -> None:
    random, hits = np.random.default_rng(2), 0
    for _ in range(300):
        tables = [0.6 * random.normal(size=(1, 20)) + 0.5 * random.normal(size=(12, 20)) for _ in range(2)]
        shared = 0.2 * random.normal(size=(12, 1))
        low, high = np.quantile(st.resampled_means([table + shared for table in tables], 600), [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 300 >= 0.92


@pytest.mark.parametrize(("b", "c"), [(0.0, 0.1), (0.1, 0.1), (0.1, 0.3), (0.02, 0.02)])
@pytest.mark.parametrize("n", [20, 40])
def test_paired_interval_covers_over_all_outcomes(n: int, b: float, c: float) -> None:
    """Every number of starts that only the first (b) or only the second (c) solves, with its probability."""
    covered = 0.0
    for lost in range(n + 1):
        for won in range(n + 1 - lost):
            first = [1] * lost + [0] * (n - lost)
            second = [0] * lost + [1] * won + [0] * (n - lost - won)
            found = st.paired_interval(first, second)
            chance = stats.multinomial.pmf([lost, won, n - lost - won], n, [b, c, 1 - b - c])
            covered += float(chance) * (found.low <= c - b <= found.high)
    assert covered >= 0.93


def test_paired_interval_is_that_of_the_formula_and_turns_with_its_arms() -> None:
    first, second = [1] * 8 + [0] * 2 + [1] * 10, [0] * 8 + [1] * 2 + [1] * 10
    found, turned = st.paired_interval(first, second), st.paired_interval(second, first)
    # (3 - 9)/22 +- 1.959964 sqrt((12/22 - (6/22)^2)/22)
    assert (found.low, found.high) == pytest.approx((-0.272727 - 0.286801, -0.272727 + 0.286801), abs=2e-6)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_a_ratio_is_one_of_sums_with_whole_clusters_drawn() -> None:
    """Clusters with sums (3, 2) and (3, 4): 6/6, and a draw of one of them twice gives 3/2 or 3/4."""
    found = st.ratio_of_sums([1, 2, 3], [1, 1, 4], ["a", "a", "b"])
    assert found.value == 1.0 and found.interval is not None
    assert (found.interval.low, found.interval.high) == (0.75, 1.5)
    assert st.ratio_of_sums([1, 2], [1, 1], ["a", "a"]).interval is None


def test_seeds_and_starts_keeps_its_draws_and_refuses_other_starts() -> None:
    arms = [[[1, 0, 1, 1], [0, 0, 1, 1]], [[1, 1, 1, 1], [0, 1, 1, 1]]]
    found = st.seeds_and_starts(arms)
    assert found == st.seeds_and_starts(arms), "the same seed gives the same interval"
    assert "training seeds and starts" in found.rule
    for wrong in ([], [[]], [[[1, 0]], [[1, 0, 1]]], [[[1, 0]], [[1, 0], [1, 1]]]):
        with pytest.raises(ValueError, match="the same tasks and starts"):
            st.seeds_and_starts(wrong)


@pytest.mark.parametrize(("count", "half"), [(3, 7.5), (5, 3.7)])
def test_t_interval_at_a_seed_deviation_of_three_points(count: int, half: float) -> None:
    base = np.arange(count, dtype=float)
    means = list(50 + 3 * (base - base.mean()) / base.std(ddof=1))
    found = st.t_interval(means)
    assert (found.high - found.low) / 2 == pytest.approx(half, abs=0.05)


@pytest.mark.parametrize(
    ("difference", "share", "paired"), [(0.1, 0.3, 234), (0.1, 0.2, 155), (0.05, 0.15, 469), (0.05, 0.1, 312)]
)
def test_sample_sizes_of_the_table(difference: float, share: float, paired: int) -> None:
    assert abs(st.paired_episodes_needed(difference, share) - paired) <= 1


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_and_unequal_pairs_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="k successes of n rollouts"):
        st.wilson(k, n)
    with pytest.raises(ValueError, match="same starts"):
        st.mcnemar([1, 0], [1, 0, 1])
