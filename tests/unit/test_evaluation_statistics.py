"""The statistics of success rates against scipy and against the numbers of science.md, section 10."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tutti.evaluation import statistics as st


@pytest.mark.parametrize("n", [1, 10, 20, 50])
def test_wilson_and_clopper_pearson_equal_scipy(n: int) -> None:
    for k in range(n + 1):
        for ours, name in ((st.wilson, "wilson"), (st.clopper_pearson, "exact")):
            reference = stats.binomtest(k, n).proportion_ci(0.95, method=name)
            found = ours(k, n)
            assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_ten_of_ten() -> None:
    assert st.wilson(10, 10).percent() == "72-100"
    assert st.clopper_pearson(10, 10).percent() == "69-100"
    assert st.wilson(0, 7).low == 0.0
    assert st.wilson(7, 7).high == 1.0


@pytest.mark.parametrize(
    ("n", "percents"),
    [
        (100, ("40-60", "71-87", "89-98")),
        (500, ("46-54", "76-83", "93-97")),
        (2000, ("48-52", "78-82", "94-96")),
    ],
)
def test_table_of_wilson_widths(n: int, percents: tuple[str, str, str]) -> None:
    found = tuple(st.wilson(round(p * n), n).percent() for p in (0.5, 0.8, 0.95))
    assert found == percents


def test_barnard_gives_the_published_p() -> None:
    assert st.barnard(40, 50, 45, 50) == pytest.approx(0.21, abs=0.005)
    assert st.barnard(35, 50, 45, 50) == pytest.approx(0.013, abs=0.0005)


def test_mcnemar_is_the_binomial_test_of_the_discordant_starts() -> None:
    first = [1] * 8 + [0] * 2 + [1] * 5
    second = [0] * 8 + [1] * 2 + [1] * 5
    assert st.discordant(first, second) == (8, 2)
    assert st.mcnemar(first, second) == pytest.approx(stats.binomtest(8, 10, 0.5).pvalue)
    assert st.mcnemar(first, first) == 1.0


def test_newcombe_gives_the_papers_example() -> None:
    # Newcombe (1998), table II, example (a), method 10: 56/70 - 48/80 = .20, interval .0524 to .3339.
    found = st.newcombe_difference(48, 80, 56, 70)
    assert found.value == pytest.approx(0.2)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_paired_bootstrap_of_equal_arms_is_zero_and_pairs_matter() -> None:
    bits = np.tile([1, 0], 20)
    same = st.paired_bootstrap_difference([bits], [bits])
    assert (same.value, same.interval.low, same.interval.high) == (0.0, 0.0, 0.0)
    opposite = st.paired_bootstrap_difference([bits], [1 - bits])
    assert opposite.interval.low < 0 < opposite.interval.high


def test_stratified_bootstrap_matches_the_normal_approximation() -> None:
    tasks = [np.arange(200) < 100, np.arange(200) < 160]
    found = st.stratified_bootstrap([tasks])
    sigma = np.sqrt(0.25 / 200 + 0.16 / 200) / 2
    assert (found.low, found.high) == pytest.approx((0.65 - 1.96 * sigma, 0.65 + 1.96 * sigma), abs=0.006)
    assert found == st.stratified_bootstrap([tasks]), "the same seed gives the same interval"
    assert "tasks fixed" in found.rule


def test_stratified_bootstrap_widens_when_training_seeds_differ() -> None:
    low, high = np.arange(50) < 10, np.arange(50) < 40
    one = st.stratified_bootstrap([[low, high]])
    apart = st.stratified_bootstrap([[low, low], [high, high], [low, high]])
    assert apart.high - apart.low > 2 * (one.high - one.low)
    assert "training seeds" in apart.rule


def test_mean_of_rates_keeps_a_width_where_the_bootstrap_has_none() -> None:
    bootstrap = st.stratified_bootstrap([[np.ones(20)] * 8])
    mover = st.mean_of_rates([(20, 20)] * 8)
    assert bootstrap.low == 1.0
    assert 0.9 < mover.low < 1.0
    single, reference = st.mean_of_rates([(7, 20)]), st.wilson(7, 20)
    assert (single.low, single.high) == pytest.approx((reference.low, reference.high))


@pytest.mark.parametrize(("count", "half"), [(3, 7.5), (5, 3.7)])
def test_t_interval_at_a_seed_deviation_of_three_points(count: int, half: float) -> None:
    base = np.arange(count, dtype=float)
    means = list(50 + 3 * (base - base.mean()) / base.std(ddof=1))
    found = st.t_interval(means)
    assert (found.high - found.low) / 2 == pytest.approx(half, abs=0.05)


@pytest.mark.parametrize(
    ("p1", "p2", "n", "share", "paired"),
    [
        (0.5, 0.6, 388, 0.3, 234),
        (0.8, 0.9, 199, 0.2, 155),
        (0.8, 0.85, 906, 0.15, 469),
        (0.9, 0.95, 435, 0.1, 312),
    ],
)
def test_sample_sizes_of_the_table(p1: float, p2: float, n: int, share: float, paired: int) -> None:
    assert abs(st.episodes_needed(p1, p2) - n) <= 1
    assert abs(st.paired_episodes_needed(p2 - p1, share) - paired) <= 1


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="k successes of n rollouts"):
        st.wilson(k, n)


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="same starts"):
        st.mcnemar([1, 0], [1, 0, 1])
