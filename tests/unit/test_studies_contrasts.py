"""Comparisons fixed beforehand and factorial designs: planted effects are found, and 95 % intervals cover."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fixtures.studies import found, make_study, trained
from tutti.evaluation.statistics.comparison import compare_arms, contrast, holm
from tutti.studies.config import BudgetConfig, StudyConfig
from tutti.studies.costs import StepCost, affordable_steps
from tutti.studies.page import _effects, _forest
from tutti.studies.scores import ContrastScore, score_contrasts, score_study
from tutti.studies.tables import Findings, contrast_table, difference_table

FACTORS = ("align", "recon", "state")
ARMS = {
    "-".join(name for name, is_on in zip(FACTORS, switches, strict=True) if is_on) or "action": switches
    for switches in product((False, True), repeat=3)
}


def factorial(seeds: int = 5, **changes: Any) -> StudyConfig:
    factors = {factor: [arm for arm, on in ARMS.items() if on[place]] for place, factor in enumerate(FACTORS)}
    arms = {arm: [f"training.gradients.clip_norm={1 + n}"] for n, arm in enumerate(ARMS)}
    return make_study(**({"arms": arms, "baseline": "action", "seeds": seeds, "factors": factors} | changes))


def simulate(
    random: np.random.Generator,
    effects: dict[str, float],
    seeds: int = 5,
    starts: int = 40,
    scatter: float = 0.03,
) -> dict[str, list[list[np.ndarray]]]:
    """Successes [arm][seed][task][start]: a start's difficulty is shared by all arms and seeds, each training
    has a deviation of its own, and each factor that is on adds its effect to the rate."""
    difficulty = random.uniform(-0.2, 0.2, size=(2, starts))
    common = random.normal(0, scatter, size=seeds)
    arms: dict[str, list[list[np.ndarray]]] = {}
    for arm, switches in ARMS.items():
        gain = sum(effects.get(f, 0.0) * on for f, on in zip(FACTORS, switches, strict=True))
        own = common + random.normal(0, scatter, size=seeds)
        rates = 0.4 + gain + own[:, None, None] + difficulty
        arms[arm] = [list(bits) for bits in (random.random(rates.shape) < rates).astype(int)]
    return arms


def scored(arms: dict[str, list[list[np.ndarray]]], **changes: Any) -> dict[str, ContrastScore]:
    study = factorial(**changes)
    results = [
        trained(arm, seed, *(bits.tolist() for bits in tasks))
        for arm, of_seeds in arms.items()
        for seed, tasks in enumerate(of_seeds)
    ]
    return {one.name: one for one in score_contrasts(study, score_study(study, found(*results)))}


def test_weights_are_those_of_the_textbook() -> None:
    study = factorial()
    assert study.contrasts["align"] == {arm: 0.25 if on[0] else -0.25 for arm, on in ARMS.items()}
    assert list(study.interactions) == [
        "align x recon", "align x state", "recon x state", "align x recon x state",
    ]  # fmt: skip
    crossed = study.interactions["align x recon"]
    assert crossed["align-recon"] == crossed["action"] == crossed["state"] == 0.25
    assert crossed["align"] == crossed["recon-state"] == -0.25
    assert make_study(comparisons=["action_only - end_to_end"]).contrasts == {
        "action_only - end_to_end": {"action_only": 1.0, "end_to_end": -1.0}
    }


def test_a_contrast_of_two_arms_is_their_comparison_to_the_bit() -> None:
    random = np.random.default_rng(3)
    base, other = ([[random.integers(0, 2, 20) for _ in range(3)] for _ in range(4)] for _ in range(2))
    one, two = contrast([base, other], [-1, 1]), compare_arms(base, other)
    assert (one.difference, one.over_seeds, one.p, one.verdict) == (
        two.difference, two.over_seeds, two.p, two.verdict,
    )  # fmt: skip
    with pytest.raises(ValueError, match="same training seeds"):
        contrast([base, other[:3]], [-1, 1])


def test_planted_main_effects_are_found_and_absent_ones_are_not() -> None:
    found = scored(simulate(np.random.default_rng(0), {"state": 0.2, "align": -0.12}, starts=80))
    assert found["state"].found.verdict == "better" and found["align"].found.verdict == "worse"
    assert found["recon"].found.verdict == "unresolved"
    assert found["state"].found.difference.value == pytest.approx(0.2, abs=0.04)
    assert found["align"].found.difference.value == pytest.approx(-0.12, abs=0.04)
    main = [one for one in found.values() if not one.exploratory]
    assert [one.adjusted_p for one in main] == holm([one.found.p for one in main])
    assert all(one.exploratory and one.adjusted_p is None for name, one in found.items() if " x " in name)


def test_a_verdict_that_holm_does_not_bear_out_says_so_wherever_it_is_told() -> None:
    """One of six gains has p .02: "better" alone, and .14, no claim, beside the five others."""
    gains = {"base": (0,) * 5, "a0": (6, 9, 15, 10, 1), **{f"a{n}": (n, -n, 0, -1, 1) for n in range(1, 6)}}
    arms = {arm: [f"training.gradients.clip_norm={1 + n}"] for n, arm in enumerate(gains)}
    results = [
        trained(arm, seed, *[[1] * (40 + gain) + [0] * (40 - gain)] * 2)
        for arm, of_seeds in gains.items()
        for seed, gain in enumerate(of_seeds)
    ]
    fixed = [f"{arm} - base" for arm in arms if arm != "base"]
    for comparisons in (fixed, []):
        study = make_study(arms=arms, baseline="base", seeds=5, comparisons=comparisons)
        scores = score_study(study, found(*results))
        contrasts = score_contrasts(study, scores)
        said = Findings(
            study=study, data="d", costs={}, found={}, missing=(), scores=scores, contrasts=contrasts
        )
        assert said.headline.endswith(": 0 better, 1 better before Holm, 0 worse, 5 unresolved.")
        assert "better before Holm, +" in said.notes[0].text and said.notes[0].mood == ""
        cells = (contrast_table if comparisons else difference_table)(said, "base").rows[0]
        assert ("better before Holm", "quiet") in [(cell.text, cell.mood) for cell in cells]
        chart = (_effects if comparisons else _forest)(said, "base")
        assert chart is not None and "before Holm" in chart._repr_svg_()
        if comparisons:  # and were it the only one
            assert replace(contrasts[0], adjusted_p=contrasts[0].found.p).verdict == "better"


def test_intervals_of_a_main_effect_cover_it_as_often_as_they_say() -> None:
    """300 studies of the design that is run: 8 arms, 5 seeds, 160 starts. The t-interval covers at 95 %, the
    bootstrap alone less often, which is why a verdict asks both."""
    random, hits = np.random.default_rng(1), {"t": 0, "bootstrap": 0, "false verdicts": 0}
    weights = [*factorial().contrasts["recon"].values()]
    for _ in range(300):
        arms = simulate(random, {"recon": 0.1}, starts=80)
        one = contrast([*arms.values()], weights, draws=200)
        assert one.over_seeds is not None
        hits["t"] += one.over_seeds.low <= 0.1 <= one.over_seeds.high
        hits["bootstrap"] += one.difference.interval.low <= 0.1 <= one.difference.interval.high
        null = contrast([*arms.values()], [*factorial().contrasts["align"].values()], draws=200)
        hits["false verdicts"] += null.verdict != "unresolved"
    assert 0.92 <= hits["t"] / 300 <= 0.98
    assert hits["bootstrap"] / 300 >= 0.8
    assert hits["false verdicts"] / 300 <= 0.05


def test_a_contrast_takes_the_seeds_that_all_its_arms_have_and_the_rest_waits() -> None:
    arms = simulate(np.random.default_rng(2), {}, seeds=3)
    arms["recon"] = arms["recon"][:2]
    found = scored(arms)
    assert {one.seeds for one in found.values()} == {(0, 1)}
    del arms["recon"]
    assert scored(arms) == {}


def test_listed_comparisons_are_judged_in_place_of_those_with_the_baseline() -> None:
    study = make_study(
        arms={"joint": [], "few": ["data.batch_size=2"], "many": ["data.batch_size=8"]},
        baseline="joint",
        seeds=3,
        comparisons=["joint - few", "joint - many"],
    )
    bits = {"joint": [1, 1, 1, 0], "few": [0, 0, 0, 0], "many": [1, 1, 0, 0]}
    results = [trained(arm, seed, b, b) for arm, b in bits.items() for seed in range(3)]
    scores = score_study(study, found(*results))
    made = score_contrasts(study, scores)
    assert [one.found.difference.value for one in made] == [0.75, 0.25]
    assert all(score.adjusted_p is None for score in scores)
    findings = Findings(study=study, data="d", costs={}, found={}, missing=[], scores=scores, contrasts=made)
    assert findings.headline.startswith("2 comparisons fixed beforehand at equal steps: 1 better")
    own = study.model_copy(update={"budget": BudgetConfig(arms={"few": "flops"})})
    assert " at equal steps (few: FLOPs): 1 better" in replace(findings, study=own).headline
    own = study.model_copy(update={"budget": BudgetConfig(arms={"few": 7})})
    assert " at equal steps (few: 7 steps): 1 better" in replace(findings, study=own).headline
    assert "joint - few: better, +75.0 points" in findings.notes[0].text and len(findings.notes) == 2
    table = contrast_table(findings, "base")
    assert [row[0].text for row in table.rows] == ["joint - few", "joint - many"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"comparisons": ["end_to_end - nobody"]}, "name no arm: nobody"),
        ({"comparisons": ["end_to_end-action_only"]}, "should match pattern"),
        ({"comparisons": ["end_to_end - end_to_end"]}, "held against itself"),
        ({"factors": {"align": ["end_to_end", "action_only"]}}, "1 factors need 2 arms"),
        ({"factors": {"a": ["end_to_end"], "b": ["end_to_end"]}}, "2 factors need 4 arms"),
        ({"budget": {"arms": {"nobody": "flops"}}}, "name no arm: nobody"),
        ({"budget": {"arms": {"end_to_end": 5}}}, "gives the baseline steps of its own. Set budget.steps"),
    ],
)
def test_a_design_that_is_none_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        make_study(**changes)


def test_an_arm_may_have_a_budget_of_another_kind_or_steps_of_its_own() -> None:
    study = make_study(
        arms={"joint": [], "alone": ["strategy.kind=action_only"], "longer": ["strategy.kind=action_only"]},
        baseline="joint",
        budget={"kind": "steps", "arms": {"longer": "flops"}},
    )
    costs = {
        "joint": StepCost(flops=30.0, samples=64, parameters=1),
        "alone": StepCost(flops=10.0, samples=32, parameters=1),
        "longer": StepCost(flops=10.0, samples=32, parameters=1),
    }
    assert affordable_steps(study.budget, 100, costs, "joint") == {"joint": 100, "alone": 100, "longer": 300}
    given = study.budget.model_copy(update={"arms": {"longer": 170}})
    assert affordable_steps(given, 100, costs, "joint") == {"joint": 100, "alone": 100, "longer": 170}
