"""Closed loop: what is scored, that scheduling does not matter, that nothing finished is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.line_world import BrokenPolicy, DeafPolicy, FragilePolicy, LineWorld, LineWorlds, Policies
from tutti.evaluation.closed_loop import evaluate as closed_loop
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.results import EvaluationProtocol, EvaluationResult, blind_note
from tutti.evaluation.closed_loop.rollouts import (
    Condition,
    PlannedRollout,
    Rollout,
    RolloutSpec,
    RolloutWorker,
)
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


ROLLOUT = Rollout(
    task="here",
    condition="policy",
    seed=0,
    instruction="stay",
    success=True,
    decisions=1,
    queries=1,
    chunk=1,
    start="0",
    identity="0",
    actions=np.zeros((1, 1), np.float32),
)
PROTOCOL = EvaluationProtocol(
    suite="line",
    split="held_out",
    seed_first=0,
    seed_last=9,
    chunk=1,
    executed=1,
    max_decisions=1,
    distinct_starts=1,
    environment="line world 1",
)


def lines(result: EvaluationResult) -> list[str]:
    return [rollout.to_json() for rollout in result.rollouts]


@pytest.fixture(scope="module")
def whole() -> EvaluationResult:
    """An evaluation that nothing interrupts, by one worker."""
    return evaluate(Policies(), CONFIG, LineWorlds())


def test_scores_of_policy_and_controls(whole: EvaluationResult) -> None:
    assert whole.policy.counts == {"left": [6, 6], "right": [6, 6], "here": [6, 6]}
    assert {name: score.counts for name, score in whole.controls.items()} == {
        "wrong_instruction": {"left": [0, 6], "right": [0, 6]},
        "no_image": {"left": [0, 3], "right": [0, 3], "here": [3, 3]},
        "noop": {"left": [0, 6], "right": [0, 6], "here": [3, 3]},
        "expert": {"left": [3, 3], "right": [3, 3], "here": [3, 3]},
    }
    assert whole.policy.mean == 1.0
    assert whole.policy.tasks[0].interval.percent() == "61-100 %"
    protocol = whole.protocol
    assert (protocol.chunk, protocol.executed, protocol.distinct_starts) == (3, 2, 18)
    text = " ".join(whole.notes())
    for part in ("seeds 1000-1005", "18 distinct starts", "3 actions predicted", "2 executed"):
        assert part in text
    assert "falls; not told apart from chance" in text


class Place(LineWorld):
    """An action is the place to go to; `closest` is the way gone."""

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self.way = 0.0

    def step(self, action: np.ndarray) -> None:
        self.way += abs(float(action[0]) - self.x)
        self.x = float(action[0])

    @property
    def closest(self) -> float:
        return self.way


@dataclass(frozen=True)
class PlaceWorlds(LineWorlds):
    absolute_actions: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def make(self, task: str) -> Place:
        return Place(task)


def test_who_does_nothing_stays_where_actions_are_places_too() -> None:
    config = CONFIG.model_copy(update={"controls": CONTROLS.model_copy(update={"expert": 0})})
    for suite, stays in ((PlaceWorlds(), True), (PlaceWorlds(absolute_actions=False), False)):
        played = [one for one in evaluate(Policies(), config, suite).rollouts if one.condition == "noop"]
        ways = [one.closest or 0.0 for one in played if one.task != "here"]  # which is solved at the start
        assert len(ways) == 12 and all((way < 1e-6) is stays for way in ways)  # but for float32's rounding


def test_a_task_is_solved_without_pictures_where_its_interval_is_above_half_of_the_policys_rate() -> None:
    def blind(own: float, k: int, n: int) -> tuple[str, ...]:
        played = [replace(ROLLOUT, seed=seed, success=seed < 20 * own) for seed in range(20)]
        played += [replace(ROLLOUT, condition="no_image", seed=seed, success=seed < k) for seed in range(n)]
        result = EvaluationResult.of(played, PROTOCOL, resumed=0, seconds=0.0)
        assert bool(blind_note(result.solved_without_pictures)) == any(
            "little about" in n for n in result.notes()
        )
        return result.solved_without_pictures

    sees = ((1.0, 3, 3), (1.0, 8, 10), (1.0, 14, 20), (0.2, 4, 20))
    solves = ((1.0, 4, 4), (1.0, 9, 10), (1.0, 15, 20), (0.2, 10, 20), (0.85, 8, 10))
    assert [blind(*one) for one in sees] == [()] * len(sees)
    assert [blind(*one) for one in solves] == [("here",)] * len(solves)
    policy_alone = EvaluationResult.of([ROLLOUT], PROTOCOL, resumed=0, seconds=0.0)
    assert policy_alone.solved_without_pictures == ()


def test_result_is_read_back_without_its_rollouts(whole: EvaluationResult) -> None:
    values = json.loads(json.dumps(whole.to_dict()))
    assert EvaluationResult.from_dict(values) == replace(whole, rollouts=())
    with pytest.raises(ValueError, match="successes"):
        EvaluationResult.from_dict(values | {"scores": {"policy": {"tasks": [{"task": "left"}]}}})


def test_starts_are_the_same_under_every_condition_and_saved_actions_replay(whole: EvaluationResult) -> None:
    starts: dict[tuple[str, int], str] = {}
    for rollout in whole.rollouts:
        assert starts.setdefault((rollout.task, rollout.seed), rollout.start) == rollout.start
        world = LineWorld(rollout.task)
        world.reset(rollout.seed)
        for action in Rollout.from_json(rollout.to_json()).actions:
            assert not world.success
            world.step(action)
        assert world.success == rollout.success
        assert rollout.actions.dtype == np.float32


def test_two_workers_give_the_bytes_of_one(whole: EvaluationResult, tmp_path: Path) -> None:
    log = tmp_path / "built"
    together = evaluate(
        Policies(), CONFIG.model_copy(update={"workers": 2}), LineWorlds(log=log), folder=tmp_path
    )
    assert lines(together) == lines(whole)
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 2, "two processes played"


def test_interrupted_evaluation_continues_with_the_same_result(
    whole: EvaluationResult, tmp_path: Path
) -> None:
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


def test_damaged_records_are_played_again(tmp_path: Path, whole: EvaluationResult) -> None:
    evaluate(Policies(), CONFIG, LineWorlds(), folder=tmp_path)
    damage = ("", "{", "[]", '{"task": "left"}')
    for seed, text in enumerate(damage, start=1001):
        (tmp_path / "policy" / "left" / f"{seed}.json").write_text(text)
    again = evaluate(Policies(), CONFIG, LineWorlds(), folder=tmp_path)
    assert again.resumed == len(whole.rollouts) - len(damage)
    assert lines(again) == lines(whole)
    other = evaluate(
        Policies(kind=DeafPolicy, fingerprint="weights 2"), CONFIG, LineWorlds(), folder=tmp_path
    )
    assert other.policy.counts["left"] == [0, 6], "other weights replace their records, but not the expert's"
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
    with pytest.raises(UserError, match="partners has no other task for 'here'"):
        evaluate(Policies(), CONFIG.model_copy(update={"controls": controls}), LineWorlds())

    class Selfish(LineWorlds):
        @property
        def partners(self) -> dict[str, str]:
            return {"left": "left", "right": "left"}

    controls = CONTROLS.model_copy(update={"partners": "suite"})
    with pytest.raises(UserError, match="partners has no other task for 'left'"):
        evaluate(Policies(), CONFIG.model_copy(update={"controls": controls}), Selfish())


@pytest.mark.parametrize("workers", [1, 2])
def test_non_finite_actions_name_the_start(workers: int) -> None:
    with pytest.raises(UserError, match=r"non-finite action on left, seed 100\d, control step 0"):
        config = CONFIG.model_copy(update={"workers": workers, "tasks": ("left",)})
        evaluate(Policies(kind=BrokenPolicy), config, LineWorlds())


def test_pictures_are_drawn_only_for_a_policy_that_looks() -> None:
    world = LineWorld("left")

    class Same(LineWorlds):
        def make(self, task: str) -> LineWorld:
            return world

    spec = RolloutSpec(
        policy=Policies(), environments=Same(), actions_per_query=2, max_decisions=12, folder=None
    )
    looking: dict[Condition, bool] = {"noop": False, "expert": False, "no_image": False, "policy": True}
    for condition, looks in looking.items():
        world.pictures = 0
        one = PlannedRollout(condition, "left", 1000, "move left")
        rollout = RolloutWorker(spec)([one])[one]
        assert world.pictures == (rollout.queries if looks else 0)


def test_texts_do_not_depend_on_how_many_rollouts_are_played(whole: EvaluationResult) -> None:
    torch.set_num_threads(2)
    try:
        few = evaluate(Policies(), CONFIG.model_copy(update={"episodes": 2}), LineWorlds())
        assert torch.get_num_threads() == 2, "one worker restores the threads"
    finally:
        torch.set_num_threads(1)
    texts = {(r.condition, r.task, r.seed): r.instruction for r in whole.rollouts}
    assert all(texts[r.condition, r.task, r.seed] == r.instruction for r in few.rollouts)
    assert len({r.instruction for r in whole.rollouts if r.task == "left" and r.condition == "policy"}) == 3


def test_workers_keep_their_task_and_take_a_free_one_first() -> None:
    left = [[PlannedRollout("policy", task, 0, "")] for task in ("a", "a", "b", "b")]
    last = {0: "a"}
    assert closed_loop._next(last, left, 1)[0].task == "b"
    assert closed_loop._next(last, left, 0)[0].task == "a"
    assert [block[0].task for block in left] == ["a", "b"]


def test_other_wordings_are_played_from_the_same_starts_and_changed_ones_again(
    whole: EvaluationResult, tmp_path: Path
) -> None:
    def play(sentences: object, **changes: object) -> EvaluationResult:
        values = CONFIG.model_dump() | {"sentences": sentences} | changes
        return evaluate(Policies(), EvaluationConfig.model_validate(values), LineWorlds(), folder=tmp_path)

    first = play({"left": ["left!", "leftwards"], "right": ["the other one"]})
    assert first.policy == whole.policy
    assert first.controls["other_wording"].counts == {"left": [6, 6], "right": [6, 6]}
    told = [(r.seed, r.instruction) for r in first.rollouts if r.condition == "other_wording"][:2]
    assert told == [(1000, "left!"), (1001, "leftwards")]
    changed = play({"left": ["left!", "rightwards"], "right": ["the other one"]})
    assert changed.controls["other_wording"].counts["left"] == [3, 6], "only sentences that changed"
    assert changed.resumed == len(first.rollouts) - 3
    trained = play("train")
    assert {r.instruction for r in trained.rollouts if r.condition == "other_wording"} >= {"please go left"}
    for wrong, says in (
        ({"up": ["go up"]}, "'up' is no task of line"),
        ("held_out", "compared with itself"),
        ({"left": []}, "at least 1"),
    ):
        with pytest.raises((UserError, ValueError), match=says):
            play(wrong)
