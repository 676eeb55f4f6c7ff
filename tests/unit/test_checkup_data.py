"""The doctor's parts by hand: recordings with known faults, the tests of the text, judging shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import squares_data as world
from tutti.debug import activation_checks as activity
from tutti.debug import gradient_checks as gradients
from tutti.debug.activation_checks import Activity
from tutti.debug.data_checks import check_recordings
from tutti.debug.gradient_checks import ShareTable
from tutti.debug.text_test import _left_out_r2, check_text, independence_p, text_kernel
from tutti.runs.build import build_data


def remarks(folder: Path, change: Callable[[int, Any], Any], count: int = 12) -> list[tuple[bool, str]]:
    """(problem, text) of a data set whose episodes were changed."""
    made = [change(number, one) for number, one in enumerate(world.episodes(count))]
    world.write(folder / "set", made)
    data = build_data(world.config(folder / "set"), folder)
    return [(r.problem, r.text.removeprefix(f"{folder / 'set'}: ")) for r in check_recordings(data)]


def test_good_recording_has_no_remark(tmp_path: Path) -> None:
    assert remarks(tmp_path, lambda _, one: one) == []


def test_black_camera_is_a_problem(tmp_path: Path) -> None:
    def cover(_: int, one: Any) -> Any:
        return replace(one, images={**one.images, world.VIEWS[0]: np.zeros_like(one.images[world.VIEWS[0]])})

    ((problem, text),) = remarks(tmp_path, cover)
    assert problem and "front is one colour in 100 % of the frames" in text


def test_camera_that_is_covered_now_and_then_is_a_note(tmp_path: Path) -> None:
    def cover(number: int, one: Any) -> Any:
        return one if number else replace(one, images={v: np.zeros_like(f) for v, f in one.images.items()})

    found = remarks(tmp_path, cover)
    assert [problem for problem, _ in found] == [False, False]
    assert all("is one colour in 8.3 %" in text for _, text in found)


def test_frozen_camera_is_a_problem(tmp_path: Path) -> None:
    first = world.episodes(1)[0].images[world.VIEWS[1]][:1]

    def freeze(_: int, one: Any) -> Any:
        return replace(one, images={**one.images, world.VIEWS[1]: first.repeat(world.LENGTH, axis=0)})

    ((problem, text),) = remarks(tmp_path, freeze)
    assert problem and "mirror shows the same picture" in text


def test_dimensions_that_never_move_are_noted_and_all_of_them_a_problem(tmp_path: Path) -> None:
    def still(_: int, one: Any) -> Any:
        actions = one.actions.copy()
        actions[:, 1] = 0.3
        return replace(one, actions=actions, states=np.ones_like(one.states))

    assert remarks(tmp_path, still) == [
        (True, "the state never moves in any dimension: is it the right key?"),
        (False, "dimension 1 of the action never moves."),
    ]


def test_clipped_commands_are_noted(tmp_path: Path) -> None:
    def clip(_: int, one: Any) -> Any:
        actions = one.actions.copy()
        actions[:, 0] = np.clip(actions[:, 0], -0.01, 0.01)
        return replace(one, actions=actions)

    ((problem, text),) = remarks(tmp_path, clip)
    assert not problem and "in dimension 0: they are clipped" in text


def test_copies_across_the_split_are_a_problem(tmp_path: Path) -> None:
    made = world.episodes(2)
    (noted, copies), (problem, text) = remarks(tmp_path, lambda number, _: made[number % 2])
    assert (noted, copies.endswith("training episodes are exact copies of others.")) == (False, True)
    assert problem and "held-out episodes are exact copies of training ones" in text


def test_text_kernel_ignores_words_that_every_text_has() -> None:
    kernel = text_kernel(["push the red block", "push the blue block", "push the red ball"])
    assert np.allclose(np.diag(kernel), 1)
    assert kernel[0, 1] == kernel[0, 2] > 0, "one word in common with each that not all have"
    assert kernel[1, 2] == 0, "only words that all have"


def test_left_out_residuals_are_those_of_refitting() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 2)), random.normal(size=(12, 3))
    kernel = np.exp(-np.square(x[:, None] - x[None]).sum(-1))
    blocks = [np.array([0, 3]), np.array([1, 2, 4]), np.array([5, 6]), np.arange(7, 12)]
    left = 0.0
    for block in blocks:
        rest = np.setdiff1d(np.arange(12), block)
        inside = kernel[np.ix_(rest, rest)] + 0.3 * np.eye(len(rest))
        left += np.square(y[block] - kernel[np.ix_(block, rest)] @ np.linalg.solve(inside, y[rest])).sum()
    assert _left_out_r2(kernel, y, blocks, 0.3) == pytest.approx(1 - left / np.square(y).sum())


def test_independence_test_sees_a_tie_and_nothing_where_there_is_none() -> None:
    random = np.random.default_rng(0)
    label = np.arange(40) % 2
    tied = label[:, None] + 0.3 * random.normal(size=(40, 1))
    free = random.normal(size=(40, 1))
    same = (label[:, None] == label[None]).astype(float)
    p = [independence_p(np.exp(-np.square(x - x.T)), same, random, 199) for x in (tied, free)]
    assert p[0] == pytest.approx(1 / 200)
    assert p[1] > 0.05


def test_one_instruction_and_few_episodes_cannot_be_asked(tmp_path: Path) -> None:
    for name, count, text in (("one", 20, world.TEXTS[0]), ("few", 6, None)):
        made = [replace(one, instruction=text or one.instruction) for one in world.episodes(count)]
        world.write(tmp_path / name, made)
        found, (remark,) = check_text(build_data(world.config(tmp_path / name), tmp_path))
        assert found is None and not remark.problem


def table(title: str, lambdas: dict[str, float], **shares: dict[str, float]) -> ShareTable:
    return ShareTable(title=f"Gradient shares {title}, weights", shares=shares, lambdas=lambdas)


def judged(end: ShareTable, start: ShareTable | None = None) -> list[tuple[bool, str]]:
    config = world.config(Path("nowhere"))
    calm = table("at initialisation", {"action": 1.0}, vision={"action": 1.0})
    return [(r.problem, r.text) for r in gradients.judge(config, start or calm, end)]


def test_weight_that_is_advised_halves_the_share() -> None:
    """Share .96 at weight 12: 12 x .04 / .96 = 0.5 makes it even."""
    end = table("after 9 updates", {"action": 1.0, "recon": 12.0}, vision={"action": 0.04, "recon": 0.96})
    ((problem, text),) = judged(end)
    assert problem
    assert "'recon' supplies 96 % of the vision gradient (after 9 updates) at the weight 12" in text
    assert "the action term 4.0 %" in text and "at 0.5 it would supply half" in text


def test_large_share_is_a_note_and_a_fair_one_nothing() -> None:
    for share, expected in ((0.8, [False]), (0.6, [])):
        end = table(
            "after 9 updates",
            {"action": 1.0, "recon": 1.0},
            vision={"action": 1 - share, "recon": share},
        )
        assert [problem for problem, _ in judged(end)] == expected


def test_part_that_the_action_does_not_move_is_no_competition() -> None:
    end = table("after 9 updates", {"action": 1.0, "align": 1.0}, language={"action": 0.0, "align": 1.0})
    assert judged(end) == []


def test_large_share_at_the_start_alone_says_where_the_weight_goes() -> None:
    start = table("at initialisation", {"action": 1.0, "align": 0.1}, vision={"action": 0.1, "align": 0.9})
    end = table("after 9 updates", {"action": 1.0}, vision={"action": 1.0})
    ((problem, text),) = judged(end, start)
    assert not problem
    assert text.startswith("at initialisation 'align' supplies 90 % of the vision gradient")
    assert text.endswith("at its weight 0.1, which falls to 0.")


def test_two_loud_terms_at_the_start_do_not_hide_each_other() -> None:
    """The demo's state term is as loud as recon at 100 times its weight: neither has 70 %."""
    lambdas = {"action": 1.0, "align": 0.1, "recon": 10.0, "state": 5.0}
    vision = {"action": 0.002, "align": 0.007, "recon": 0.496, "state": 0.495}
    end = table("after 9 updates", {"action": 1.0}, vision={"action": 1.0})
    texts = [text for _, text in judged(end, table("at initialisation", lambdas, vision=vision))]
    assert [text.split("'")[1] for text in texts] == ["recon", "state"]
    assert texts[0].endswith("at its weight 10; the action term has 0.2 %.")
    heard = vision | {"action": 0.05}
    assert judged(end, table("at initialisation", lambdas, vision=heard)) == []


def test_dead_and_flat_features_are_problems() -> None:
    rows = [
        Activity(features="vision", dead=0.6, rank=8.0),
        Activity(features="readout", dead=0.0, rank=1.2),
        Activity(features="language", dead=0.0, rank=None),
        Activity(features="fused vision", dead=0.4, rank=2.0),
    ]
    found = activity.judge("now", rows)
    assert [remark.text.split(",")[1].split(" differ")[0] for remark in found] == [
        " 60 % of the vision units do not change from one sample to another: its weights or biases may have "
        "died (all zero",
        " the readout features",
    ]
