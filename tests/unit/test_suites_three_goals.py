"""The scene with three goals: one picture for all tasks, a colour for each, nobody there by chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fixtures.line_world import GOALS as PLACES
from fixtures.line_world import LineWorld, LineWorlds, Policies
from fixtures.rendering import require_rendering
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.results import EvaluationResult, first_goal
from tutti.evaluation.closed_loop.rollouts import Rollout
from tutti.evaluation.config import ControlsConfig, EvaluationConfig
from tutti.suites.metaworld.task import MetaWorldTask
from tutti.suites.metaworld.three_goals import APART, CLEAR, COLOURS, HIGH, LOW, draw_goals
from tutti.suites.registry import find_suite

SUITE = find_suite("three-goals")
Worlds = dict[str, MetaWorldTask]


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    require_rendering()
    built = {task: MetaWorldTask(task) for task in COLOURS}
    yield built
    for one in built.values():
        one.close()


def goals(world: MetaWorldTask) -> np.ndarray:
    return np.stack([*world._env.places.values()])


def test_goals_are_apart_from_each_other_and_from_the_way_to_each() -> None:
    hand, random = np.array([0.0, 0.6, 0.2]), np.random.default_rng(0)
    for _ in range(50):
        three = draw_goals(random, hand)
        assert (three >= LOW).all() and (three <= HIGH).all()
        for number, goal in enumerate(three):
            rest = np.delete(three, number, axis=0)
            assert np.linalg.norm(rest - goal, axis=1).min() >= APART
            way = hand + np.linspace(0, 1, 200)[:, None] * (goal - hand)
            assert np.linalg.norm(rest[:, None] - way, axis=2).min() >= CLEAR - 1e-9


@pytest.mark.simulation
def test_a_seed_gives_one_scene_for_all_three_tasks_and_different_seeds_different_ones(
    worlds: Worlds,
) -> None:
    pictures = {task: world.reset(7).render() for task, world in worlds.items()}
    red, green, blue = (goals(world) for world in worlds.values())
    assert np.array_equal(red, green) and np.array_equal(red, blue)
    assert len({picture.tobytes() for picture in pictures.values()}) == 1
    told = {task: world.privileged[-3:] for task, world in worlds.items()}
    assert np.allclose(np.stack([*told.values()]), red)
    other = worlds["reach-red"].reset(8).render()
    assert not np.array_equal(other, pictures["reach-red"])
    assert np.array_equal(worlds["reach-red"].reset(7).render(), pictures["reach-red"])


@pytest.mark.simulation
def test_the_expert_reaches_the_told_goal_and_no_other_from_every_start(worlds: Worlds) -> None:
    for task, world in worlds.items():
        for seed in range(1000, 1020):
            world.reset(seed)
            assert world.reached == () and not world.success
            for _ in range(60):
                if not world.success:
                    world.step(world.expert_action())
            assert world.success and world.reached == (task,)


@pytest.mark.simulation
def test_another_goal_is_noted_and_is_no_success(worlds: Worlds) -> None:
    blue, red = worlds["reach-blue"].reset(3), worlds["reach-red"].reset(3)
    while not blue.success:
        action = blue.expert_action()
        blue.step(action)
        red.step(action)
    assert red.reached == ("reach-blue",) and not red.success
    for _ in range(60):
        if not red.success:
            red.step(red.expert_action())
    assert red.success and red.reached == ("reach-blue", "reach-red")
    assert red.reset(3).reached == ()


@pytest.mark.simulation
def test_every_colour_is_seen_in_its_own_hue_at_64_px_from_every_start(worlds: Worlds) -> None:
    world = worlds["reach-red"]
    for seed in range(5000, 5020):
        picture = world.reset(seed).render().astype(int)
        for channel in range(3):
            others = np.delete(picture, channel, axis=-1).max(axis=-1)
            assert (picture[..., channel] - others > 90).sum() >= 20


def test_the_sentences_of_the_colours_differ_in_the_colour_alone_and_held_out_words_are_known() -> None:
    for split in ("train", "held_out"):
        sentences = [
            [text.replace(task.removeprefix("reach-"), "?") for text in SUITE.instructions(task, split)]  # type: ignore[arg-type]
            for task in COLOURS
        ]
        assert sentences[0] == sentences[1] == sentences[2]
    train, held = (SUITE.instructions("reach-red", split) for split in ("train", "held_out"))  # type: ignore[arg-type]
    assert len(train) >= 8 and len(held) >= 4 and not {*train} & {*held}
    assert set(" ".join(held).split()) <= set(" ".join(train).split())


class TwoGoals(LineWorld):
    """Left and right are goals of one scene."""

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._reached: tuple[str, ...] = ()

    def step(self, action: np.ndarray) -> None:
        super().step(action)
        for name in ("left", "right"):
            if name not in self._reached and abs(self.x - PLACES[name]) < 0.2:
                self._reached += (name,)

    @property
    def reached(self) -> tuple[str, ...]:
        return self._reached


class TwoGoalWorlds(LineWorlds):
    def make(self, task: str) -> LineWorld:
        return TwoGoals(task)


def test_an_evaluation_counts_which_goal_was_reached_first_and_says_so(tmp_path: Path) -> None:
    controls = ControlsConfig(expert=0, noop=3, no_image=0, wrong_instruction=4)
    config = EvaluationConfig(
        suite="metaworld-8",
        tasks=("left", "right"),
        episodes=6,
        workers=1,
        max_decisions=20,
        controls=controls,
    )
    found = evaluate(Policies(), config, TwoGoalWorlds(), folder=tmp_path)
    assert found.policy.goals == {"told": 12}
    assert found.scores["wrong_instruction"].goals == {"told": 8}
    assert found.scores["noop"].goals == {"none": 8}
    assert (
        "Told another goal's sentence, of 8 rollouts reached first: 8 the goal that the sentence names."
        in (" ".join(found.notes()))
    )
    again = evaluate(Policies(), config, TwoGoalWorlds(), folder=tmp_path)
    assert again.resumed == len(again.rollouts) and again.scores == found.scores
    assert EvaluationResult.from_dict(found.to_dict()).scores == found.scores
    plain = evaluate(Policies(), config, LineWorlds())
    assert plain.policy.goals == {} and "reached first" not in " ".join(plain.notes())
    one: Rollout = found.rollouts[0]
    assert first_goal(replace(one, told="right", reached=("left",))) == "own"
    assert first_goal(replace(one, told="left", reached=("here",))) == "another"
