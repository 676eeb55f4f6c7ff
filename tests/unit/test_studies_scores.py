"""Scores by hand: means, pairs, verdicts, what it would take, and the sentences about them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fixtures.studies import cell, found, make_study, trained
from tutti.evaluation.statistics.intervals import paired_episodes_needed
from tutti.studies.cells import Cell
from tutti.studies.scores import ArmScore, mcnemar_statement, resolution, score_study
from tutti.studies.tables import Findings, success_table
from tutti.types import UserError

HALF, NONE, ALL = [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]
STUDY = make_study(seeds=3)


def three(arm: str, *reach: list[int]) -> list:
    """A result for each seed: `reach` as given, push always half."""
    return [trained(arm, seed, bits, HALF) for seed, bits in enumerate(reach)]


def scores(*results: list) -> dict[str, ArmScore]:
    together = [one for group in results for one in group]
    return {score.arm: score for score in score_study(STUDY, found(*together))}


def told(scores: list[ArmScore], *missing: Cell) -> Findings:
    return Findings(study=STUDY, data="d", costs={}, found={}, missing=missing, scores=scores)


def test_arm_has_the_task_mean_of_each_seed_and_sums_tasks_over_seeds() -> None:
    own = scores(three("end_to_end", HALF, ALL, NONE))["end_to_end"]
    assert own.seed_means == (0.5, 0.75, 0.25)
    assert own.mean == pytest.approx(0.5)
    assert own.over_seeds is not None
    # t(.975; 2) = 4.3027, sd = .25: half-width .621.
    assert own.over_seeds.high - own.mean == pytest.approx(0.6210, abs=1e-4)
    assert own.tasks == {"reach": (6, 12), "push": (6, 12)}
    assert own.against is None and own.adjusted_p is None
    assert (own.average("seconds"), own.held_out("action"), own.held_out("align")) == (10.0, 0.5, None)


@pytest.mark.parametrize(
    ("base", "arm", "expected"),
    [
        ([NONE, NONE, NONE], [ALL, ALL, ALL], "better"),
        ([ALL, ALL, ALL], [NONE, NONE, NONE], "worse"),
        ([HALF, HALF, HALF], [ALL, HALF, NONE], "unresolved"),
    ],
)
def test_verdict_is_better_worse_or_unresolved(base: list, arm: list, expected: str) -> None:
    against = scores(three("end_to_end", *base), three("action_only", *arm))["action_only"].against
    assert against is not None and against.verdict == expected


def test_difference_is_paired_by_seed_and_start() -> None:
    base = three("end_to_end", [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0])
    arm = three("action_only", [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0])
    own = scores(base, arm)["action_only"]
    assert own.against is not None
    assert own.against.difference.value == pytest.approx((0 + 0.375 + 0) / 3)
    assert own.against.discordant == ((1, 1), (0, 3), (0, 0))
    assert own.against.mcnemar == (1.0, pytest.approx(0.25), 1.0)


def test_only_seeds_that_both_have_are_compared() -> None:
    base = three("end_to_end", HALF, HALF, HALF)[:2]
    own = scores(base, three("action_only", ALL, ALL, ALL)[1:])["action_only"]
    assert own.seeds == (1, 2) and own.shared_seeds == (1,)
    assert own.against is not None and own.against.difference.value == pytest.approx(0.25)
    alone = scores(three("action_only", ALL, ALL, ALL))["action_only"]
    assert alone.against is None and alone.mean == pytest.approx(0.75)


def test_each_level_is_compared_with_the_baseline_at_that_level_and_p_is_adjusted_over_all() -> None:
    study = make_study(seeds=3, episodes_per_task=[2, "all"])
    base = [trained("end_to_end", seed, HALF, HALF, level=level) for level in (2, "all") for seed in range(3)]
    few = [trained("action_only", seed, ALL, bits, level=2) for seed, bits in enumerate((ALL, ALL, HALF))]
    many = [trained("action_only", seed, NONE, HALF, level="all") for seed in range(3)]
    own = {(s.arm, s.level): s for s in score_study(study, found(*base, *few, *many))}
    one, two = own["action_only", 2], own["action_only", "all"]
    assert one.against is not None and two.against is not None
    assert one.against.difference.value == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert two.against.difference.value == pytest.approx(-0.25)
    assert two.against.p == 0.0 and two.adjusted_p == 0.0
    assert one.against.p is not None and one.adjusted_p == pytest.approx(one.against.p)
    assert own["end_to_end", 2].adjusted_p is None


def test_unresolved_says_how_many_starts_or_seeds_it_would_take() -> None:
    base = three("end_to_end", HALF, HALF, HALF)
    arm = three("action_only", [1, 1, 1, 0], HALF, HALF)
    own = scores(base, arm)["action_only"]
    assert own.against is not None
    needed = own.against.needed
    assert needed.starts == paired_episodes_needed(1 / 24, 1 / 24)
    # Differences .125, 0, 0: mean .0417, sd .0722, effect .577: 26 seeds.
    assert needed.seeds == 26
    assert resolution(own) == f"{needed.starts:,} paired starts (now 8 a seed), or 26 seeds"


def test_resolution_asks_for_seeds_where_trainings_scatter_and_for_nothing_where_it_is_told() -> None:
    base = three("end_to_end", NONE, NONE, NONE)
    scattered = scores(base, three("action_only", ALL, NONE, NONE))["action_only"]
    assert "seeds (seeds dominate)" in resolution(scattered)
    same = scores(three("end_to_end", HALF, ALL, NONE), three("action_only", HALF, ALL, NONE))
    assert resolution(same["action_only"]) == "no difference was seen"
    told = scores(base, three("action_only", ALL, ALL, ALL))
    assert resolution(told["action_only"]) == "" == resolution(told["end_to_end"])


def test_tests_of_the_seeds_are_counted_not_pooled() -> None:
    base = [trained("end_to_end", seed, [0] * 8, [0] * 8) for seed in range(3)]
    arm = [trained("action_only", seed, [1] * 8, [0] * 8) for seed in range(2)]
    arm.append(trained("action_only", 2, [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8))
    own = {s.arm: s for s in score_study(STUDY, found(*base, *arm))}["action_only"]
    assert mcnemar_statement(own, "end_to_end") == (
        "of 3 pairs of trainings action_only is the better one in 2, end_to_end in 0, and 1 cannot be told "
        "apart (exact McNemar, p < .05)"
    )


def test_cells_that_were_judged_on_other_starts_are_refused() -> None:
    other = trained("action_only", 0, HALF, HALF, starts={"reach": [5, 6, 7, 8], "push": [0, 1, 2, 3]})
    with pytest.raises(UserError, match="judged on other starts"):
        score_study(STUDY, found(trained("end_to_end", 0, HALF, HALF), other))
    assert score_study(STUDY, {}) == []
    assert told([]).headline.startswith("No arm can be compared yet")


def test_headline_counts_verdicts_and_notes_name_them() -> None:
    own = list(scores(three("end_to_end", NONE, NONE, NONE), three("action_only", ALL, ALL, ALL)).values())
    assert told(own).headline == (
        "1 comparison with end_to_end at equal steps: 1 better, 0 worse, 0 unresolved."
    )
    (note,) = told(own).notes
    assert note.mood == "good" and note.text.startswith("action_only: better, +50.0 points")


def test_cautions_name_missing_cells_few_seeds_and_several_commits() -> None:
    results = [trained("end_to_end", 0, HALF, HALF), trained("action_only", 0, HALF, HALF)]
    results[1] = replace(results[1], commit="c1", versions={"python": "3.12"})
    said = told(score_study(STUDY, found(*results)), cell("action_only", 1)).cautions
    assert said[0] == "1 of 6 cells are missing: action_only, seed 1."
    assert "Some arms have 1 training seed:" in said[1]
    one, level = told(score_study(STUDY, found(*results))), STUDY.levels[0]
    assert "one training: the interval says nothing about other seeds" in success_table(one, level).caption
    assert said[2] == "Cells were trained at different commits: c0, c1."
    assert "different versions" in said[3]
    whole = [one for arm in STUDY.arms for one in three(arm, HALF, HALF, HALF)]
    assert told(score_study(STUDY, found(*whole))).cautions == []
    assert "one training" not in success_table(told(score_study(STUDY, found(*whole))), level).caption
