"""The suite: its sentences, its control rate and sizes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tutti.config.run_config import load_config
from tutti.evaluation.config import EvaluationConfig
from tutti.recording.recorder import RecordConfig
from tutti.runs.build import suite_of
from tutti.suites.gym import PUSHT, GymSuite
from tutti.suites.metaworld.suite import METAWORLD_8 as SUITE
from tutti.suites.metaworld.suite import MetaWorldSuite
from tutti.suites.metaworld.tasks import LOOK_ALIKES, MT50, SAME_SCENE, TIERS
from tutti.suites.metaworld.three_goals import COLOURS
from tutti.suites.registry import SUITES, find_suite
from tutti.types import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def words(task: str, split: str) -> list[set[str]]:
    return [set(sentence.split()) for sentence in SUITE.instructions(task, split)]  # type: ignore[arg-type]


def test_the_suite_has_its_eight_tasks_at_20_hz_and_sizes_can_be_set() -> None:
    assert len(SUITE.tasks) == 8
    assert {"faucet-open", "faucet-close", "reach", "push", "pick-place"} <= set(SUITE.tasks)
    assert (SUITE.fps, SUITE.longest) == (20.0, 125) and "action repeat 4" in SUITE.fingerprint
    assert EvaluationConfig().seeds[-1] < RecordConfig().first_seed
    spec = MetaWorldSuite(name="mine", tasks=("reach",), views=("top",), image_size=96, action_repeat=2)
    assert spec.fps == 40.0 and SUITE.with_changes(action_repeat=2).fps == 40.0


def test_every_task_has_enough_plain_sentences_and_no_word_is_new_in_those_held_out() -> None:
    for task in (*MT50, *COLOURS):
        train, held_out = SUITE.instructions(task, "train"), SUITE.instructions(task, "held_out")
        assert len(train) >= 8 and len(held_out) >= 4, task
        assert all(re.fullmatch(r"[a-z]+( [a-z]+)+", sentence) for sentence in train + held_out), task
        assert set().union(*words(task, "held_out")) <= set().union(*words(task, "train")), task


def test_every_sentence_of_new_words_has_a_word_that_no_training_sentence_has() -> None:
    known = set[str]().union(*(one for task in SUITE.tasks for one in words(task, "train")))
    texts = [text for task in SUITE.tasks for text in SUITE.instructions(task, "new_words")]
    assert len(texts) == len(set(texts)) == 48
    assert all(not one <= known for task in SUITE.tasks for one in words(task, "new_words"))
    for suite, task in ((MetaWorldSuite(name="one", tasks=("door-open",)), "door-open"), (PUSHT, "pusht")):
        with pytest.raises(UserError, match=r"instructions|new_words"):
            suite.instructions(task, "new_words")


def test_no_sentence_occurs_twice_and_an_unknown_task_has_none() -> None:
    everything = [
        s for t in (*MT50, *COLOURS) for part in ("train", "held_out") for s in SUITE.instructions(t, part)
    ]
    assert len(set(everything)) == len(everything)
    with pytest.raises(UserError, match=r"'juggle'.*instructions\.toml"):
        SUITE.instructions("juggle")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_faucet_sentences_can_be_told_apart(split: str) -> None:
    opening, closing = {"open", "opens", "on", "run"}, {"close", "closes", "off", "stop"}
    assert all(one & opening and not one & closing for one in words("faucet-open", split))
    assert all(one & closing and not one & opening for one in words("faucet-close", split))


def test_the_suites_are_kept_apart_by_name_and_fingerprint() -> None:
    """Recordings and scores of metaworld-8 hold for as long as its fingerprint is the same."""
    assert (
        SUITE.fingerprint == ("metaworld 3.1.1, mujoco 3.3.0, views right, left, 64 px, action repeat 4")
        and dict(SUITE.protocol) == dict(SUITE.tiers) == {}
    )
    mt50 = {name: suite for name, suite in SUITES.items() if name.startswith("metaworld-mt50")}
    endings = ("", "-held", "-starvla", "-fast", "-shaded")
    assert list(mt50) == [f"metaworld-mt50{ending}" for ending in endings]
    assert len({suite.fingerprint for suite in mt50.values()}) == len(endings)
    assert [len(tier) for tier in mt50["metaworld-mt50"].tiers.values()] == [28, 11, 6, 5]
    assert len(MT50) == len(set(MT50)) == 50 and SUITES["metaworld-mt10"].tiers == {}
    assert {one.fps * one.max_decisions for one in mt50.values()} == {80 * 500, 80 * 400, 40 * 250}
    found = EvaluationConfig(max_decisions="suite").departures(mt50["metaworld-mt50-starvla"])
    assert found == ("episodes 20, not 10", "first_seed 1000, not 4042")


def test_a_gym_suite_shows_its_own_picture_under_the_policys_name_and_has_no_other_view() -> None:
    assert PUSHT.with_changes(views=("image",)).view_keys == {"image": "pixels"}, "not what render() draws"
    assert PUSHT.with_changes(views=("top",), image_size=96) == PUSHT
    assert GymSuite(name="fetch").with_changes(views=("front",)).view_keys == {}
    two = replace(PUSHT, views=("top", "side"), view_keys={"top": "pixels", "side": "a/b"})
    assert two.with_changes(views=("side",)).view_keys == two.view_keys
    for suite, views in ((PUSHT, ("top", "wrist")), (two, ("wrist",))):
        with pytest.raises(UserError, match=r"'wrist' is no view of pusht\. Known: top"):
            suite.with_changes(views=views)


def test_every_task_has_a_wrong_instruction_of_its_own_suite_where_there_is_one() -> None:
    assert set(LOOK_ALIKES) == {*MT50, *COLOURS} and all(t not in LOOK_ALIKES[t] for t in LOOK_ALIKES)
    for name in ("metaworld-8", "metaworld-mt10", "metaworld-mt50", "three-goals"):
        partners = SUITES[name].partners
        assert all(partners[task] in SUITES[name].tasks for task in SUITES[name].tasks), name
    assert SUITE.partners["window-close"] == "drawer-close" and set(SAME_SCENE) <= set(LOOK_ALIKES)
    assert SUITES["metaworld-mt50"].partners["window-close"] == "window-open"
    assert set(TIERS) == {"easy", "medium", "hard", "very hard"}


def test_a_demonstrations_limit_is_none_of_the_judge_and_another_rate_keeps_the_time() -> None:
    fast = [f"{part}.suite=metaworld-mt10-fast" for part in ("record", "evaluation")]
    config = load_config(
        CONFIGS / "demo.yaml", [*fast, "record.episodes_per_task=9", "record.max_decisions=200"]
    )
    assert (config.record.spec.max_decisions, suite_of(config).max_decisions) == (200, 250)
    assert suite_of(config).protocol == find_suite("metaworld-mt10-fast").protocol
    fast += ["record.episodes_per_task=9", "record.max_decisions=100", "record.action_repeat=4"]
    slow = load_config(CONFIGS / "demo.yaml", fast)
    assert (suite_of(slow).max_decisions, suite_of(slow).fps) == (125, 20.0)
