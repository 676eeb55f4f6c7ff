"""The suite: its sentences, its control rate and sizes."""

from __future__ import annotations

import re

import pytest

from tutti.evaluation.config import EvaluationConfig
from tutti.recording.recorder import RecordConfig
from tutti.suites.metaworld.suite import METAWORLD_8 as SUITE
from tutti.suites.metaworld.suite import MetaWorldSuite
from tutti.types import UserError


def words(task: str, split: str) -> list[set[str]]:
    return [set(sentence.split()) for sentence in SUITE.instructions(task, split)]  # type: ignore[arg-type]


def test_the_suite_has_its_eight_tasks_at_20_hz_and_sizes_can_be_set() -> None:
    assert len(SUITE.tasks) == 8
    assert {"faucet-open", "faucet-close", "reach", "push", "pick-place"} <= set(SUITE.tasks)
    assert (SUITE.fps, SUITE.longest) == (20.0, 125) and "action repeat 4" in SUITE.fingerprint
    assert EvaluationConfig().seeds[-1] < RecordConfig().first_seed
    spec = MetaWorldSuite(name="mine", tasks=("reach",), views=("top",), image_size=96, action_repeat=2)
    assert spec.fps == 40.0 and SUITE.with_changes(action_repeat=2).fps == 40.0


@pytest.mark.parametrize("task", SUITE.tasks)
def test_every_task_has_enough_plain_sentences_and_no_word_is_new_in_those_held_out(task: str) -> None:
    train, held_out = SUITE.instructions(task, "train"), SUITE.instructions(task, "held_out")
    assert len(train) >= 8 and len(held_out) >= 4
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)+", sentence) for sentence in train + held_out)
    assert set().union(*words(task, "held_out")) <= set().union(*words(task, "train"))


def test_no_sentence_occurs_twice_and_an_unknown_task_has_none() -> None:
    everything = [
        s for t in SUITE.tasks for part in ("train", "held_out") for s in SUITE.instructions(t, part)
    ]
    assert len(set(everything)) == len(everything)
    with pytest.raises(UserError, match=r"'juggle'.*instructions\.toml"):
        SUITE.instructions("juggle")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_faucet_sentences_can_be_told_apart(split: str) -> None:
    opening, closing = {"open", "opens", "on", "run"}, {"close", "closes", "off", "stop"}
    assert all(one & opening and not one & closing for one in words("faucet-open", split))
    assert all(one & closing and not one & opening for one in words("faucet-close", split))
