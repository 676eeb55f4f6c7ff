"""The doctor's parts by hand: recordings with known faults, the tests of the text, judging shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import squares_data as world
from tutti.debug.gradient_checks import GradientShares, judge_shares
from tutti.debug.text_dependence import PENALTY, check_text, left_out_smoother, retrieval, text_kernel
from tutti.findings import Finding
from tutti.runs.build import build_data
from tutti.runs.data_check import check_training_data


def findings(folder: Path, change: Callable[[int, Any], Any], count: int = 12) -> list[tuple[bool, str]]:
    """(is it a problem, its text) of a data set whose episodes were changed."""
    made = [change(number, one) for number, one in enumerate(world.episodes(count))]
    world.write(folder / "set", made)
    config = world.config(folder / "set")
    found = check_training_data(config, build_data(config, folder))
    return [(r.is_problem, r.text.removeprefix(f"{folder / 'set'}: ")) for r in found]


def test_good_recording_has_no_finding(tmp_path: Path) -> None:
    assert findings(tmp_path, lambda _, one: one) == []


def test_black_camera_is_a_problem(tmp_path: Path) -> None:
    def cover(_: int, one: Any) -> Any:
        return replace(one, images={**one.images, world.VIEWS[0]: np.zeros_like(one.images[world.VIEWS[0]])})

    ((problem, text),) = findings(tmp_path, cover)
    assert problem and "front is one colour in 100 % of the frames" in text


def test_camera_that_is_covered_now_and_then_is_a_hint(tmp_path: Path) -> None:
    def cover(number: int, one: Any) -> Any:
        return one if number else replace(one, images={v: np.zeros_like(f) for v, f in one.images.items()})

    found = findings(tmp_path, cover)
    assert [problem for problem, _ in found] == [False, False]
    assert all("is one colour in 8.3 %" in text for _, text in found)


def test_frozen_camera_is_a_problem(tmp_path: Path) -> None:
    first = world.episodes(1)[0].images[world.VIEWS[1]][:1]

    def freeze(_: int, one: Any) -> Any:
        return replace(one, images={**one.images, world.VIEWS[1]: first.repeat(world.LENGTH, axis=0)})

    ((problem, text),) = findings(tmp_path, freeze)
    assert problem and "mirror shows the same picture" in text


def test_dimensions_that_never_move_are_noted_and_all_of_them_a_problem(tmp_path: Path) -> None:
    def still(_: int, one: Any) -> Any:
        actions = one.actions.copy()
        actions[:, 1] = 0.3
        return replace(one, actions=actions, states=np.ones_like(one.states))

    assert findings(tmp_path, still) == [
        (True, "the state never moves in any dimension. Is data.sources.state the right feature?"),
        (False, "dimension 1 of the action never moves."),
    ]


def test_clipped_commands_are_noted(tmp_path: Path) -> None:
    def clip(_: int, one: Any) -> Any:
        actions = one.actions.copy()
        actions[:, 0] = np.clip(actions[:, 0], -0.01, 0.01)
        return replace(one, actions=actions)

    ((problem, text),) = findings(tmp_path, clip)
    assert not problem and "in dimension 0: they are clipped" in text


def test_copies_across_the_split_are_a_problem(tmp_path: Path) -> None:
    made = world.episodes(2)
    (problem, text), (noted, copies) = findings(tmp_path, lambda number, _: made[number % 2])
    assert (noted, "7 episodes are an exact copy of another" in copies) == (False, True), copies
    assert problem and "held-out episodes are an exact copy of a training one" in text


def test_text_kernel_ignores_words_that_every_text_has() -> None:
    kernel = text_kernel(["push the red block", "push the blue block", "push the red ball"])
    assert np.allclose(np.diag(kernel), 1)
    assert kernel[0, 1] == kernel[0, 2] > 0, "one word in common with each that not all have"
    assert kernel[1, 2] == 0, "only words that all have"


def test_left_out_predictions_are_those_of_refitting() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 2)), random.normal(size=(12, 3))
    kernel = np.exp(-np.square(x[:, None] - x[None]).sum(-1))
    left = []
    for one in range(12):
        rest = np.setdiff1d(np.arange(12), one)
        inside = kernel[np.ix_(rest, rest)] + PENALTY * np.eye(11)
        left.append(kernel[one, rest] @ np.linalg.solve(inside, y[rest]))
    assert np.allclose(left_out_smoother(kernel) @ y, left)


def test_retrieval_counts_the_texts_that_the_own_one_beats() -> None:
    """Of three texts the first episode's own beats both, the second's one, the third's none."""
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert retrieval(scores, np.eye(3), np.arange(3)) == pytest.approx(3 / 6)


def test_one_instruction_and_few_episodes_cannot_be_asked(tmp_path: Path) -> None:
    for name, count, text in (("one", 20, world.TEXTS[0]), ("few", 6, None)):
        made = [replace(one, instruction=text or one.instruction) for one in world.episodes(count)]
        world.write(tmp_path / name, made)
        found, (finding,) = check_text(build_data(world.config(tmp_path / name), tmp_path))
        assert found is None and not finding.is_problem


def measured(when: str, lambdas: dict[str, float], **shares: dict[str, float]) -> GradientShares:
    """Shares by part; a term that is not named in a part has none there."""
    measures = {
        f"{kind}/{term}/{part}": by_term.get(term, 0.0)
        for part, by_term in shares.items()
        for term in lambdas
        for kind in ("norm", "share", "update_share")
    }
    return GradientShares(when=when, measures=measures, lambdas=lambdas)


def judged(end: GradientShares, start: GradientShares | None = None, **weights: float) -> list[Finding]:
    """What is said at these weights of the config, where the beginning was sound."""
    changes = {term: {"weight": weight} for term, weight in weights.items()}
    config = world.config(Path("nowhere"), objective=changes)
    sound = measured("at initialisation", {"action": 1.0}, vision={"action": 1.0})
    return judge_shares(config, start or sound, end)


def test_term_that_dominates_at_its_last_weight_is_a_problem_with_a_better_weight() -> None:
    """Share .96 at weight 12, the rest .04: 12 x .25 x .04 / .96 = 0.125 makes it a fifth."""
    vision = {"action": 0.04, "recon": 0.96}
    end = measured("after 9 updates", {"action": 1.0, "recon": 12.0}, vision=vision)
    (finding,) = judged(end, recon=12.0)
    assert finding.is_problem and (finding.term, finding.part) == ("recon", "vision")
    assert finding.sentence.startswith("After 9 updates: recon makes 96 % of the update of the vision")
    assert "Its weight (12) is likely too high: `objective.recon.weight=0.13`" in finding.cure
    assert "half of the run" not in finding.text, "there was no run"


def test_large_share_is_a_hint_and_a_fair_one_nothing() -> None:
    for share, expected in ((0.95, [True]), (0.8, [False]), (0.5, [])):
        vision = {"action": 1 - share, "recon": share}
        end = measured("after 9 updates", {"action": 1.0, "recon": 1.0}, vision=vision)
        assert [finding.is_problem for finding in judged(end)] == expected


def test_part_that_the_action_does_not_move_is_no_competition() -> None:
    language = {"action": 0.0, "align": 1.0}
    assert judged(measured("after 9 updates", {"action": 1.0, "align": 1.0}, language=language)) == []


def test_large_share_at_the_start_alone_says_where_the_weight_goes() -> None:
    vision = {"action": 0.05, "align": 0.95}
    start = measured("at initialisation", {"action": 1.0, "align": 0.1}, vision=vision)
    end = measured("after 9 updates", {"action": 1.0}, vision={"action": 1.0})
    (finding,) = judged(end, start)
    assert not finding.is_problem
    assert finding.sentence.startswith("At initialisation: align makes 95 % of the update")
    assert "Its weight goes from 0.1 to 0" in finding.cure
    (finding,) = judged(end, start, align=0.1)
    assert finding.cure.startswith("Later it does not. Its weight stays 0.1: nothing to do")


def test_two_loud_terms_at_the_start_do_not_hide_each_other() -> None:
    """The demo's state term is as loud as recon at 100 times its weight: neither has most of it."""
    lambdas = {"action": 1.0, "align": 0.1, "recon": 10.0, "state": 5.0}
    vision = {"action": 0.002, "align": 0.007, "recon": 0.496, "state": 0.495}
    end = measured("after 9 updates", {"action": 1.0}, vision={"action": 1.0})
    found = judged(end, measured("at initialisation", lambdas, vision=vision))
    assert [finding.term for finding in found] == ["recon", "state"]
    assert "action 0.20 %" in found[0].sentence
    heard = vision | {"action": 0.1}
    assert judged(end, measured("at initialisation", lambdas, vision=heard)) == []
