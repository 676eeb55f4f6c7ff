"""Closed loop: what is scored, that scheduling does not matter, that nothing finished is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fixtures.line_world import BrokenPolicy, DeafPolicy, FragilePolicy, LineWorld, LineWorlds, Policies
from tutti.evaluation.closed_loop import evaluate as closed_loop
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.results import EvaluationResult
from tutti.evaluation.closed_loop.rollouts import Rollout, RolloutBlock, RolloutSpec, RolloutWorker
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.evaluation.config import ControlsConfig, EvaluationConfig
from tutti.types import UserError

CONTROLS = ControlsConfig(
    expert=3,
    noop=3,
    no_image=3,
    wrong_instruction=6,
    wrong_instruction_tasks=("left", "right"),
    partners={"left": "right", "right": "left"},
)
CONFIG = EvaluationConfig(episodes=6, actions_per_query=2, max_decisions=12, workers=1, controls=CONTROLS)


def lines(result: EvaluationResult) -> list[str]:
    return [rollout.to_json() for rollout in result.rollouts]


def test_scores_of_policy_and_controls() -> None:
    result = evaluate(Policies(), CONFIG, LineWorlds())
    assert result.policy.counts == {"left": [6, 6], "right": [6, 6], "here": [6, 6]}
    assert {name: score.counts for name, score in result.controls.items()} == {
        "wrong_instruction": {"left": [0, 6], "right": [0, 6]},
        "no_image": {"left": [0, 3], "right": [0, 3], "here": [3, 3]},
        "noop": {"left": [0, 6], "right": [0, 6], "here": [3, 3]},
        "expert": {"left": [3, 3], "right": [3, 3], "here": [3, 3]},
    }
    assert result.policy.mean == 1.0
    assert result.policy.tasks[0].interval.percent() == "61-100 %"
    assert result.protocol.chunk == 3
    assert result.protocol.executed == 2
    assert result.protocol.distinct_starts == 18


def test_starts_are_the_same_under_every_condition() -> None:
    result = evaluate(Policies(), CONFIG, LineWorlds())
    starts: dict[tuple[str, int], set[str]] = {}
    for rollout in result.rollouts:
        starts.setdefault((rollout.task, rollout.seed), set()).add(rollout.start)
    assert all(len(hashes) == 1 for hashes in starts.values())


def test_two_workers_give_the_bytes_of_one(tmp_path: Path) -> None:
    alone = evaluate(Policies(), CONFIG, LineWorlds())
    log = tmp_path / "built"
    together = evaluate(
        Policies(), CONFIG.model_copy(update={"workers": 2}), LineWorlds(log=log), folder=tmp_path
    )
    assert lines(together) == lines(alone)
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 2, "two processes played"


def test_interrupted_evaluation_continues_with_the_same_result(tmp_path: Path) -> None:
    whole = evaluate(Policies(), CONFIG, LineWorlds())
    with pytest.raises(UserError, match="power"):
        evaluate(Policies(kind=FragilePolicy), CONFIG, LineWorlds(), folder=tmp_path)
    saved = list(tmp_path.rglob("*.json"))
    assert saved, "what had finished is on disk"
    (tmp_path / "policy" / "left" / ".partial-1000.json").write_text("{")
    calls: list[tuple[int, int]] = []
    continued = evaluate(
        Policies(),
        CONFIG,
        LineWorlds(),
        folder=tmp_path,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert continued.resumed == len(saved)
    assert lines(continued) == lines(whole)
    assert calls[0] == (len(saved), len(whole.rollouts))
    assert calls[-1] == (len(whole.rollouts), len(whole.rollouts))
    again = evaluate(Policies(kind=BrokenPolicy), CONFIG, LineWorlds(), folder=tmp_path)
    assert again.resumed == len(whole.rollouts), "nothing is played twice"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"task": "left"}'])
def test_damaged_record_is_played_again(tmp_path: Path, damage: str) -> None:
    whole = evaluate(Policies(), CONFIG, LineWorlds(), folder=tmp_path)
    (tmp_path / "policy" / "left" / "1002.json").write_text(damage)
    again = evaluate(Policies(), CONFIG, LineWorlds(), folder=tmp_path)
    assert again.resumed == len(whole.rollouts) - 1
    assert lines(again) == lines(whole)


def test_other_weights_replace_their_records_but_not_the_experts(tmp_path: Path) -> None:
    evaluate(Policies(), CONFIG, LineWorlds(), folder=tmp_path)
    other = evaluate(
        Policies(kind=DeafPolicy, fingerprint="weights 2"), CONFIG, LineWorlds(), folder=tmp_path
    )
    assert other.policy.counts["left"] == [0, 6]
    assert other.resumed == sum(r.condition in ("expert", "noop") for r in other.rollouts)


def test_seeds_of_demonstrations_are_refused() -> None:
    config = CONFIG.model_copy(update={"first_seed": 9998})
    with pytest.raises(UserError, match=r"seeds 9998 to 10003.*10000 to 10099.*10100"):
        evaluate(Policies(), config, LineWorlds(), trained=TrainingStarts(seeds=(range(10000, 10100),)))
    evaluate(Policies(), CONFIG, LineWorlds(), trained=TrainingStarts(seeds=(range(10000, 10100),)))


def test_impossible_limit_and_unknown_partner_are_refused() -> None:
    with pytest.raises(UserError, match="at most 50"):
        evaluate(Policies(), CONFIG.model_copy(update={"max_decisions": 51}), LineWorlds())
    controls = CONTROLS.model_copy(update={"wrong_instruction_tasks": "all"})
    with pytest.raises(UserError, match="partners has no entry for 'here'"):
        evaluate(Policies(), CONFIG.model_copy(update={"controls": controls}), LineWorlds())


@pytest.mark.parametrize("workers", [1, 2])
def test_non_finite_actions_name_the_start(workers: int) -> None:
    with pytest.raises(UserError, match=r"non-finite action on left, seed 100\d, control step 0"):
        config = CONFIG.model_copy(update={"workers": workers, "tasks": ("left",)})
        evaluate(Policies(kind=BrokenPolicy), config, LineWorlds())


def test_saved_actions_replay_the_rollout(tmp_path: Path) -> None:
    result = evaluate(Policies(), CONFIG, LineWorlds(), folder=tmp_path)
    for rollout in result.rollouts:
        world = LineWorld(rollout.task)
        world.reset(rollout.seed)
        for action in Rollout.from_json(rollout.to_json()).actions:
            assert not world.success
            world.step(action)
        assert world.success == rollout.success
        assert rollout.actions.dtype == np.float32


def test_pictures_are_drawn_only_for_a_policy_that_looks() -> None:
    world = LineWorld("left")

    class Same(LineWorlds):
        def make(self, task: str) -> LineWorld:
            return world

    spec = RolloutSpec(
        policy=Policies(), environments=Same(), actions_per_query=2, max_decisions=12, folder=None
    )
    for condition, looks in (("noop", False), ("expert", False), ("no_image", False), ("policy", True)):
        world.pictures = 0
        (rollout,) = RolloutWorker(spec)(
            RolloutBlock(task="left", condition=condition, starts=((1000, "move left"),))
        )
        assert world.pictures == (rollout.queries if looks else 0)


def test_texts_do_not_depend_on_how_many_rollouts_are_played() -> None:
    few = evaluate(Policies(), CONFIG.model_copy(update={"episodes": 2}), LineWorlds())
    many = evaluate(Policies(), CONFIG, LineWorlds())
    texts = {(r.condition, r.task, r.seed): r.instruction for r in many.rollouts}
    assert all(texts[r.condition, r.task, r.seed] == r.instruction for r in few.rollouts)
    assert len({r.instruction for r in many.rollouts if r.task == "left" and r.condition == "policy"}) == 3


def test_one_worker_restores_the_threads() -> None:
    import torch

    torch.set_num_threads(2)
    try:
        evaluate(Policies(), CONFIG.model_copy(update={"episodes": 1}), LineWorlds())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_workers_keep_their_task_and_take_a_free_one_first() -> None:
    left = [RolloutBlock(task=task, condition="policy", starts=()) for task in ("a", "a", "b", "b")]
    last = {0: "a"}
    assert closed_loop._next(last, left, 1).task == "b"
    assert closed_loop._next(last, left, 0).task == "a"
    assert [block.task for block in left] == ["a", "b"]


def test_notes_say_what_was_done() -> None:
    result = evaluate(Policies(), CONFIG, LineWorlds())
    text = " ".join(result.notes())
    for part in (
        "seeds 1000-1005",
        "18 distinct starts",
        "3 actions predicted",
        "2 executed",
        "falls; not told apart from chance",
    ):
        assert part in text
    read = EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert read == replace(result, rollouts=())
    with pytest.raises(ValueError, match="successes"):
        EvaluationResult.from_dict(result.to_dict() | {"scores": {"policy": {"tasks": [{"task": "left"}]}}})
