"""The verdicts on wrong instruction and missing pictures."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tutti.evaluation.closed_loop.controls import verdict
from tutti.evaluation.closed_loop.rollouts import Condition, Rollout
from tutti.evaluation.config import ControlsConfig


def rollouts(
    condition: Condition, successes: int, count: int = 20, task: str = "faucet-open"
) -> list[Rollout]:
    return [
        Rollout(
            task=task,
            condition=condition,
            seed=1000 + i,
            instruction="",
            success=i < successes,
            decisions=1,
            queries=1,
            chunk=1,
            start=str(i),
            identity="",
            actions=np.zeros((1, 4), np.float32),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("told", "worded", "count", "outcome", "says"),
    [
        (18, 6, 20, "falls", r"18/20 .* to 6/20 .*-\d\d to -\d\d points"),
        (36, 36, 40, "does not fall", "more than 10 points"),
        (18, 18, 20, "not resolved", r"\(n = 20\)"),
        (0, 0, 400, "not resolved", "not ruled out"),
    ],
)
def test_of_other_wordings_the_fall_is_asked(
    told: int, worded: int, count: int, outcome: str, says: str
) -> None:
    found = verdict(
        "other_wording", [*rollouts("policy", told, count), *rollouts("other_wording", worded, count)]
    )
    assert found is not None and found.outcome == outcome and found.chance is None
    assert re.search(says, found.sentence), found.sentence


@pytest.mark.parametrize(
    ("normal", "wrong", "noop", "count", "outcome"),
    [
        # Ten or twenty failures of both do not show that both fail alike; forty do.
        (19, 0, 0, 20, "falls; not told apart from chance"),
        (10, 3, 0, 10, "falls; not told apart from chance"),
        (20, 4, 0, 20, "falls; not told apart from chance"),
        (39, 0, 0, 40, "falls to chance"),
        (80, 3, 0, 80, "falls to chance"),
        (80, 4, 0, 80, "falls; not told apart from chance"),
        (40, 12, 14, 40, "falls to chance"),
        # Six more successes than the no-op, and no fewer: p = .031.
        (20, 6, 0, 20, "falls, but stays above chance"),
        (40, 8, 0, 40, "falls, but stays above chance"),
        (400, 20, 12, 400, "falls, but stays above chance"),
        (18, 18, 0, 20, "not resolved"),
        (36, 36, 0, 40, "does not fall"),
        (36, 38, 0, 40, "does not fall"),
        (10, 30, 0, 40, "does not fall"),
        (36, 33, 0, 40, "not resolved"),
        (18, 16, 0, 20, "not resolved"),
        (14, 9, 0, 20, "not resolved"),
        # A score that is itself not above chance cannot fall.
        (40, 40, 38, 40, "not resolved"),
        (40, 40, 40, 40, "not resolved"),
        (0, 0, 0, 20, "not resolved"),
        (3, 0, 0, 20, "not resolved"),
    ],
)
def test_outcome(normal: int, wrong: int, noop: int, count: int, outcome: str) -> None:
    """The successes are those of the first starts, so the fewer are among the more."""
    played = [
        *rollouts("policy", normal, count),
        *rollouts("wrong_instruction", wrong, count),
        *rollouts("noop", noop, count),
    ]
    found = verdict("wrong_instruction", played)
    assert found is not None
    assert found.outcome == outcome, found.sentence
    assert f"{normal}/{count}" in found.sentence
    assert f"{wrong}/{count}" in found.sentence
    said = outcome if outcome != "does not fall" else "does not fall by more than 10 points"
    assert said in found.sentence
    assert ("falls to chance" in found.sentence) == (outcome == "falls to chance")


def test_nothing_is_called_equal_because_no_difference_was_found() -> None:
    """Of all outcomes of up to 30 starts: chance, or no fall, is said only where the interval says so."""
    for count in (5, 10, 20, 30):
        for wrong in range(count + 1):
            for normal, noop in ((count, 0), (count, count // 3), (count - count // 4, 0)):
                played = rollouts("policy", normal, count) + rollouts("no_image", wrong, count)
                found = verdict("no_image", played + rollouts("noop", noop, count))
                assert found is not None and found.above_chance is not None and found.chance_p is not None
                if found.outcome == "falls to chance":
                    assert found.above_chance.high < 0.1 and found.p < 0.05
                    assert wrong <= noop or found.chance_p >= 0.05
                if found.outcome == "does not fall":
                    assert found.fall.low > -0.1
                if wrong > noop and found.chance_p < 0.05 and found.p < 0.05 and wrong < normal:
                    assert found.outcome == "falls, but stays above chance"


def test_pairs_decide_and_not_the_counts() -> None:
    """Equal counts on opposite starts are no equality: seven won and seven lost against the no-op."""
    played = rollouts("policy", 40, 40) + rollouts("no_image", 7, 40)
    turned = [replace(r, success=not r.success) for r in rollouts("noop", 33, 40)]
    found = verdict("no_image", played + turned)
    assert found is not None and found.above_chance is not None
    assert found.chance == (7, 40) and found.altered == (7, 40)
    assert found.outcome == "falls; not told apart from chance"
    assert found.above_chance.high == pytest.approx(1.96 * (16 / 42 / 42) ** 0.5, abs=1e-4)


def test_only_shared_starts_count_and_those_of_the_tasks_are_pooled() -> None:
    played = rollouts("policy", 20) + rollouts("wrong_instruction", 0, 10) + rollouts("noop", 0, 10)
    found = verdict("wrong_instruction", played)
    assert found is not None
    assert (found.normal, found.altered, found.chance) == ((10, 10), (0, 10), (0, 10))
    assert found.tasks == ("faucet-open",) and "success on faucet-open goes" in found.sentence
    played += rollouts("policy", 20, task="reach") + rollouts("wrong_instruction", 10, 10, task="reach")
    both = verdict("wrong_instruction", played)
    assert both is not None
    assert both.altered == (10, 20) and "success on faucet-open and reach goes" in both.sentence


def test_without_a_noop_on_the_same_starts_it_never_says_chance() -> None:
    played = rollouts("policy", 20)
    assert verdict("no_image", played) is None, "a control that did not run has no verdict"
    played += rollouts("wrong_instruction", 12)
    found = verdict("wrong_instruction", rollouts("policy", 20) + rollouts("wrong_instruction", 0))
    assert found is not None and found.outcome == "falls"
    assert (found.chance, found.chance_p, found.above_chance) == (None, None, None)
    # The no-op ran on the first ten of the twenty starts, and the control is held against it on these.
    found = verdict("wrong_instruction", played + rollouts("noop", 0, 10))
    assert found is not None and (found.chance, found.altered) == ((0, 10), (12, 20))
    assert found.chance_p == pytest.approx(2 * 0.5**10)


def test_a_task_is_no_partner_of_itself() -> None:
    with pytest.raises(ValueError, match="not its own"):
        ControlsConfig(partners={"reach": "reach"})
