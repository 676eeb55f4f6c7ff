"""The verdicts on wrong instruction and missing pictures."""

from __future__ import annotations

import numpy as np
import pytest

from tutti.evaluation.config import ControlsConfig
from tutti.evaluation.controls import verdict
from tutti.evaluation.rollouts import Condition, Rollout


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
    ("normal", "wrong", "noop", "outcome"),
    [
        (19, 0, 0, "falls to chance"),
        (19, 1, 0, "falls to chance"),
        (20, 8, 0, "falls"),
        (18, 18, 0, "does not fall"),
        (18, 16, 0, "does not fall"),
        (18, 20, 9, "does not fall"),
        (10, 12, 9, "unresolved"),
        (0, 0, 0, "unresolved"),
        (3, 0, 0, "unresolved"),
        (14, 7, 0, "unresolved"),
    ],
)
def test_outcome(normal: int, wrong: int, noop: int, outcome: str) -> None:
    played = rollouts("policy", normal) + rollouts("wrong_instruction", wrong) + rollouts("noop", noop)
    found = verdict("wrong_instruction", played)
    assert found is not None
    assert found.outcome == outcome
    assert f"{normal}/20" in found.sentence
    assert f"{wrong}/20" in found.sentence


def test_only_shared_starts_and_named_tasks_count() -> None:
    played = (
        rollouts("policy", 20)
        + rollouts("wrong_instruction", 0, 10)
        + rollouts("noop", 0, 10)
        + rollouts("policy", 20, task="reach")
        + rollouts("wrong_instruction", 10, 10, task="reach")
    )
    found = verdict("wrong_instruction", played, tasks=("faucet-open",))
    assert found is not None
    assert (found.normal, found.altered, found.chance) == ((10, 10), (0, 10), (0, 10))
    assert found.tasks == ("faucet-open",)
    both = verdict("wrong_instruction", played)
    assert both is not None
    assert both.altered == (10, 20)


def test_without_a_noop_it_never_says_chance() -> None:
    found = verdict("wrong_instruction", rollouts("policy", 20) + rollouts("wrong_instruction", 0))
    assert found is not None
    assert found.outcome == "falls"


def test_control_that_did_not_run_has_no_verdict() -> None:
    assert verdict("no_image", rollouts("policy", 20)) is None


def test_a_task_is_no_partner_of_itself() -> None:
    with pytest.raises(ValueError, match="not its own"):
        ControlsConfig(partners={"reach": "reach"})
