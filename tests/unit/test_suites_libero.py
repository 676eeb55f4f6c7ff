"""LIBERO: sentences, protocols and geometry without the package; starts, expert and pictures with it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tutti.evaluation.config import EvaluationConfig
from tutti.suites.environment import Suite
from tutti.suites.libero import suite as libero_suite
from tutti.suites.libero.expert import Expert, narrowest
from tutti.suites.libero.suite import LIBERO, LiberoSuite
from tutti.suites.libero.task import axis_angle
from tutti.suites.registry import SUITES
from tutti.types import UserError

SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


def test_suites_say_what_they_are_without_the_package() -> None:
    assert {suite.name for suite in LIBERO} <= SUITES.keys()
    limits = {suite.name: suite.max_decisions for suite in LIBERO}
    assert (limits["libero-spatial"], limits["libero-spatial-openpi"], limits["libero-10"]) == (280, 220, 520)
    for suite in LIBERO:
        assert isinstance(suite, Suite) and len(suite.tasks) == 10 and suite.starts is None
        texts = [suite.instructions(task, split) for task in suite.tasks for split in ("train", "held_out")]
        flat = [*chain(*texts)]
        assert len(flat) == len({*flat}) == 30
        assert suite.has_expert is (suite.benchmark in ("libero_object", "libero_spatial"))
    goal = SUITES["libero-goal"]
    assert goal.same_scene == goal.tasks and SUITES["libero-object"].same_scene == ()
    alone = goal.with_changes(tasks=goal.tasks[:1])
    assert alone.partners == {} and alone.same_scene == (), "no other text to be told"
    openpi = cast(Suite, next(one for one in LIBERO if one.name == "libero-10-openpi"))
    settings = EvaluationConfig(first_seed=0, episodes=50, max_decisions="suite", actions_per_query=5)
    assert settings.departures(openpi) == ()
    assert settings.model_copy(update={"first_seed": 50}).departures(openpi) == ("first_seed 50, not 0",)
    with pytest.raises(UserError, match="'front' is not a camera view"):
        LiberoSuite(views=("front",))
    with pytest.raises(UserError, match="Did you mean"):
        goal.make("put_the_bowl_on_the_stov")


def test_rotations_and_the_narrowest_side() -> None:
    """Rotations by less than a full turn; a box turned by 30 degrees is narrowest across its short side."""
    random = np.random.default_rng(0)
    for _ in range(20):
        axis = random.normal(size=3)
        axis, angle = axis / np.linalg.norm(axis), random.uniform(0.1, 2 * np.pi - 0.1)
        found = axis_angle(np.array([*(axis * np.sin(angle / 2)), np.cos(angle / 2)]))
        np.testing.assert_allclose(found, axis * angle, atol=1e-9)
    assert axis_angle(np.array([0.0, 0.0, 0.0, 1.0 + 1e-9])).tolist() == [0.0, 0.0, 0.0]
    box, turn = random.uniform((-2, -0.5), (2, 0.5), (400, 2)), np.radians(30)
    turned = box @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    assert np.degrees(narrowest(turned)) == pytest.approx(120, abs=3)


def test_a_variant_is_told_what_its_own_file_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package takes every sentence from a file's name, which LIBERO-PRO's variants keep."""
    told = {
        "libero_object": "Pick the alphabet soup and place it in the basket",
        "libero_object_swap": "Pick the alphabet soup  and place it in the basket",
        "libero_object_lan": "grab alphabet soup\n and put it into basket",
        "libero_object_task": "Pick the cream cheese and place it in the basket",
        "libero_study_table": "Prepare a meal",
    }
    for name, sentence in told.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{SOUP}.bddl").write_text(f"(define\n  (:language {sentence})\n  (:goal (And)))")
    words, file = SOUP.replace("_", " "), f"{SOUP}.bddl"
    known: dict[str, Any] = {
        name: lambda name=name: SimpleNamespace(
            tasks=[SimpleNamespace(name=SOUP, language=words, problem_folder=name, bddl_file=file)]
        )
        for name in (*told, "libero_object_env")
    }
    known["libero_100"] = lambda: SimpleNamespace(tasks=[])
    monkeypatch.setattr(libero_suite, "load_libero", lambda: (known, None, lambda _: str(tmp_path)))
    libero_suite._sentences.cache_clear()
    expected = {"swap": words, "lan": "grab alphabet soup and put it into basket"}
    for name, sentence in {**expected, "task": told["libero_object_task"]}.items():
        suite = LiberoSuite(name=name, benchmark=f"libero_object_{name}")
        assert suite.instructions(SOUP) == suite.instructions(SOUP, "held_out") == (sentence,)
    assert LiberoSuite(benchmark="libero_study_table").instructions(SOUP) == ("Prepare a meal",)
    for name in ("libero_object_env", "libero_100"):
        with pytest.raises(
            UserError, match=rf"names '{name}', but holds no files of its tasks\. It has those of"
        ):
            LiberoSuite(benchmark=name)
    with pytest.raises(UserError, match="is none of LIBERO's"):
        LiberoSuite(benchmark="libero_objekt")
    libero_suite._sentences.cache_clear()


def test_the_expert_refuses_what_it_cannot_do() -> None:
    goal = {"goal_state": [["turnon", "flat_stove_1"]]}
    problem = SimpleNamespace(parsed_problem=goal, objects_dict={"plate_1": None})
    with pytest.raises(UserError, match=r"asks for \[\['turnon', 'flat_stove_1'\]\]"):
        Expert().action(SimpleNamespace(env=problem), {})


def test_starts_pictures_and_an_episode_of_the_expert() -> None:
    pytest.importorskip("libero")
    task = SUITES["libero-object-fast"].make(SOUP)
    task.reset(0)
    first, seen = task.privileged, task.render()
    assert seen.shape == (2, 128, 128, 3) and seen[0].std() > 20 and (seen[0] != seen[1]).mean() > 0.5
    steps = 0
    while not task.success and steps < 280:
        task.step(task.expert_action())
        steps += 1
    assert task.success and task.closest is not None and task.closest < 0.15
    task.reset(0)
    np.testing.assert_array_equal(task.privileged, first, "nothing is left of the last episode")
    np.testing.assert_array_equal(task.render(), seen)
    task.step(np.array([0, 0, 0, 0, 0, 0, -1], np.float32))
    assert not task.success
    saved = task.save_physics()
    drawn = task.render()
    for _ in range(3):
        task.step(np.array([1, 1, 0, 0, 0, 0, 1], np.float32))
    assert np.abs(task.render().astype(int) - drawn).max() > 50
    np.testing.assert_array_equal(task.render_physics(saved), drawn)
    task.reset(10_000)
    assert not np.array_equal(task.privileged, first), "not one of the official starts"
    task.close()
