"""The suite: its sentences, its control rate, and the expert and no-op controls."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from fixtures.metaworld_replay import replay
from tutti.evaluation.config import EvaluationConfig
from tutti.recording.recorder import RecordConfig
from tutti.suites.metaworld.instructions import instructions
from tutti.suites.metaworld.rendering import check_rendering
from tutti.suites.metaworld.suite import METAWORLD_8 as SUITE
from tutti.suites.metaworld.suite import MetaWorldSuite
from tutti.suites.metaworld.task import MetaWorldTask
from tutti.types import UserError

SEED = 1_000


def words(sentence: str) -> set[str]:
    return set(sentence.split())


def test_the_suite_has_its_eight_tasks_at_20_hz() -> None:
    assert len(SUITE.tasks) == 8
    assert {"faucet-open", "faucet-close", "reach", "push", "pick-place"} <= set(SUITE.tasks)
    assert SUITE.fps == 20.0
    assert EvaluationConfig().seeds[-1] < RecordConfig().first_seed


@pytest.mark.parametrize("task", SUITE.tasks)
def test_every_task_has_enough_plain_sentences(task: str) -> None:
    train, held_out = instructions(task, "train"), instructions(task, "held_out")
    assert len(train) >= 8
    assert len(held_out) >= 4
    for sentence in train + held_out:
        assert re.fullmatch(r"[a-z]+( [a-z]+)+", sentence)


def test_no_sentence_occurs_twice() -> None:
    everything = [
        sentence
        for task in SUITE.tasks
        for split in ("train", "held_out")
        for sentence in instructions(task, split)
    ]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("task", SUITE.tasks)
def test_held_out_sentences_use_only_words_that_were_read_in_training(task: str) -> None:
    known = set().union(*map(words, instructions(task, "train")))
    for sentence in instructions(task, "held_out"):
        assert words(sentence) <= known


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_faucet_sentences_can_be_told_apart(split: str) -> None:
    opening = {"open", "opens", "on", "run"}
    closing = {"close", "closes", "off", "stop"}
    for sentence in instructions("faucet-open", split):
        assert words(sentence) & opening and not words(sentence) & closing
    for sentence in instructions("faucet-close", split):
        assert words(sentence) & closing and not words(sentence) & opening


def test_an_unknown_task_has_no_sentences() -> None:
    with pytest.raises(UserError, match=r"'juggle'.*instructions\.toml"):
        instructions("juggle")


def test_sizes_can_be_set() -> None:
    spec = MetaWorldSuite(name="mine", tasks=("reach",), views=("top",), image_size=96, action_repeat=2)
    assert spec.fps == 40.0
    simulation = spec.make("reach")
    assert (simulation.views, simulation.image_size, simulation.action_repeat) == (("top",), 96, 2)


@pytest.mark.simulation
@pytest.mark.parametrize("task", ["reach", "faucet-open", "drawer-close"])
def test_the_expert_solves_and_standing_still_does_not(task: str) -> None:
    with MetaWorldTask(task) as simulation:

        def decisions(policy: Callable[[], np.ndarray], limit: int) -> int:
            simulation.reset(SEED)
            taken = 0
            while not simulation.success and taken < limit:
                simulation.step(policy())
                taken += 1
            return taken

        needed = decisions(simulation.expert_action, 100)
        assert simulation.success and needed < 60
        assert decisions(simulation.expert_action, 100) == needed
        assert decisions(lambda: np.zeros(4), 10) == 10 and not simulation.success


@pytest.mark.simulation
def test_a_replay_shows_what_was_seen_live() -> None:
    try:
        check_rendering()
    except UserError as error:
        pytest.skip(f"no EGL: {error}")
    seen, actions = [], []
    with MetaWorldTask("drawer-close", ("right",), 160, samples=4) as simulation:
        simulation.reset(SEED)
        for _ in range(4):
            seen.append(simulation.render())
            actions.append(simulation.expert_action())
            simulation.step(actions[-1])
    frames = replay("drawer-close", SEED, actions, image_size=160)
    assert frames.shape == (5, 1, 160, 160, 3)
    assert np.array_equal(frames[:4], np.stack(seen))
