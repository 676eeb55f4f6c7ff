"""The simulated tasks: determinism to the last bit, and every trap of the simulator cured."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tutti.suites.metaworld.mujoco import load_metaworld, load_mujoco
from tutti.suites.metaworld.rendering import check_rendering
from tutti.suites.metaworld.task import MetaWorldTask, _make_environment, to_action
from tutti.suites.workers import spawn_context
from tutti.types import UserError

pytestmark = pytest.mark.simulation
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def egl() -> None:
    try:
        check_rendering()
    except UserError as error:
        pytest.skip(f"no EGL: {error}")


@pytest.fixture(scope="module")
def reach(egl: None) -> Iterator[MetaWorldTask]:
    with MetaWorldTask("reach", image_size=48) as simulation:
        yield simulation


@pytest.fixture(scope="module")
def window(egl: None) -> Iterator[MetaWorldTask]:
    with MetaWorldTask("window-close", image_size=48) as simulation:
        yield simulation


def fingerprint(simulation: MetaWorldTask, seed: int, decisions: int = 4) -> str:
    """A hash of every state, observation and picture of a short expert rollout."""
    digest = hashlib.sha256()
    now = simulation.reset(seed)
    for _ in range(decisions):
        digest.update(simulation.render().tobytes() + now.privileged.tobytes() + now.state.tobytes())
        now = simulation.step(simulation.expert_action())
    return digest.hexdigest()


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
        timeout=120,
    )


def test_a_seed_gives_the_same_bits_after_another_episode_and_in_a_fresh_simulation(
    window: MetaWorldTask,
) -> None:
    first = fingerprint(window, 7)
    other = fingerprint(window, 8)
    np.random.seed(1)
    with MetaWorldTask("window-close", image_size=48) as fresh:
        assert fingerprint(fresh, 7) == first
    assert fingerprint(window, 7) == first
    assert other != first


def test_a_seed_gives_the_same_bits_in_another_process_which_is_silent(reach: MetaWorldTask) -> None:
    script = """
import hashlib
from tutti.suites.metaworld.task import MetaWorldTask
simulation, digest = MetaWorldTask("reach", image_size=48), hashlib.sha256()
now = simulation.reset(7)
for _ in range(4):
    digest.update(simulation.render().tobytes() + now.privileged.tobytes() + now.state.tobytes())
    now = simulation.step(simulation.expert_action())
print(digest.hexdigest())
"""
    # Nothing is closed: what is still open at the end of Python must not print anything.
    result = run_python(script)
    assert result.stderr == ""
    assert result.stdout.strip() == fingerprint(reach, 7)


def test_different_seeds_give_different_goals(reach: MetaWorldTask) -> None:
    goals = {tuple(reach.reset(seed).privileged[-3:]) for seed in range(5)}
    assert len(goals) == 5


@pytest.mark.parametrize("task", ["window-close", "drawer-open"])
def test_the_first_frame_and_observation_are_not_stale(egl: None, task: str) -> None:
    mujoco = load_mujoco()
    with MetaWorldTask(task, image_size=48) as simulation:
        first = simulation.reset(3)
        env, picture = simulation._env, simulation.render()
        geoms, sites = env.data.geom_xpos.copy(), env.data.site_xpos.copy()
        mujoco.mj_forward(env.model, env.data)
        assert np.array_equal(env.data.geom_xpos, geoms)
        assert np.array_equal(env.data.site_xpos, sites)
        assert np.array_equal(simulation.render(), picture)
        now = env._get_curr_obs_combined_no_goal().astype(np.float32)
        assert np.array_equal(first.privileged[:18], now)
        assert np.array_equal(first.privileged[18:36], now)


def test_without_the_cure_the_first_frame_would_be_stale() -> None:
    env = _make_environment(load_metaworld()[0]["window-close-v3"])
    env.seed(3)
    env.reset()
    before = env.data.geom_xpos.copy()
    load_mujoco().mj_forward(env.model, env.data)
    assert np.abs(env.data.geom_xpos - before).max() > 0.01


def test_expert_actions_are_clipped_float32_and_make_no_warning(reach: MetaWorldTask) -> None:
    reach.reset(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action = reach.expert_action()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = reach._expert.get_action(reach._observation)
    assert np.abs(raw).max() > 1.0
    assert action.dtype == np.float32
    assert np.array_equal(action, np.clip(raw, -1, 1).astype(np.float32))


def test_executed_actions_are_clipped(reach: MetaWorldTask) -> None:
    reach.reset(0)
    clipped = reach.step(np.array([1, -1, 1, -1])).privileged
    reach.reset(0)
    assert np.array_equal(reach.step(np.array([24.0, -7, 3, -2])).privileged, clipped)


def test_success_ends_the_decision_and_stays_when_the_robot_moves_away(reach: MetaWorldTask) -> None:
    reach.reset(0)
    while not reach.success:
        reach.step(reach.expert_action())
    assert reach.num_steps <= 100
    for _ in range(12):
        now = reach.step(np.array([0, -1, 1, 0]))
    lost = reach._env.evaluate_state(reach._observation, np.zeros(4, dtype=np.float32))[1]["success"]
    assert not lost
    assert now.success


def test_a_decision_repeats_its_action(egl: None) -> None:
    slow, fast = MetaWorldTask("reach", action_repeat=4), MetaWorldTask("reach", action_repeat=1)
    action = np.array([0.5, 0.2, -0.3, 1.0])
    slow.reset(5)
    fast.reset(5)
    for _ in range(4):
        fast.step(action)
    assert np.array_equal(slow.step(action).privileged, fast.privileged)
    assert slow.num_steps == fast.num_steps == 4


def test_the_episode_ends_at_500_steps_with_a_clear_error() -> None:
    simulation = MetaWorldTask("drawer-open", action_repeat=300)
    with pytest.raises(ValueError, match="call reset"):
        simulation.step(np.zeros(4))
    simulation.reset(0)
    simulation.step(np.zeros(4))
    assert simulation.step(np.zeros(4)).num_steps == 500
    with pytest.raises(ValueError, match="limit 500"):
        simulation.step(np.zeros(4))


@pytest.mark.parametrize("action", [np.full(4, np.nan), np.zeros(3), np.array([0, np.inf, 0, 0])])
def test_an_impossible_action_is_refused(action: np.ndarray) -> None:
    with pytest.raises(ValueError, match="4 finite numbers"):
        to_action(action)


def test_drawing_does_not_change_the_physics(window: MetaWorldTask) -> None:
    def roll(draw: bool) -> np.ndarray:
        window.reset(11)
        rows = []
        for _ in range(6):
            if draw:
                window.render()
            rows.append(window.step(window.expert_action()).privileged)
        return np.stack(rows)

    assert np.array_equal(roll(draw=True), roll(draw=False))


@pytest.mark.parametrize("task", ["pick-place", "faucet-open", "drawer-close", "window-close"])
def test_pictures_of_saved_physics_are_the_live_ones(egl: None, task: str) -> None:
    with MetaWorldTask(task, image_size=48) as simulation:
        simulation.reset(21)
        live, saved = [], []
        for _ in range(8):
            live.append(simulation.render())
            saved.append(simulation.save_physics())
            simulation.step(simulation.expert_action())
        drawn = [simulation.render_physics(physics) for physics in saved]
        assert np.array_equal(np.stack(live), np.stack(drawn))
        assert len({picture.tobytes() for picture in live}) == 8
        with pytest.raises(ValueError, match="call reset"):
            simulation.step(np.zeros(4))


@pytest.mark.parametrize(("task", "channel"), [("reach", 0), ("push", 1), ("pick-place", 2)])
def test_the_goal_dot_is_visible_in_every_view_in_its_colour(egl: None, task: str, channel: int) -> None:
    with MetaWorldTask(task, image_size=64) as simulation:
        simulation.reset(10_000)
        model = simulation._env.model
        with_dot = simulation.render().astype(int)
        simulation.close()
        goal = model.site("goal").id
        model.site_rgba[goal, 3] = 0.0
        without = simulation.render().astype(int)
    changed = np.abs(with_dot - without).sum(axis=-1) > 30
    for view in range(2):
        assert changed[view].sum() >= 3
        dot = with_dot[view][changed[view]].mean(axis=0)
        assert dot.argmax() == channel


def test_two_renderers_in_one_process_do_not_disturb_each_other(egl: None) -> None:
    first, second = MetaWorldTask("reach", image_size=32), MetaWorldTask("drawer-open", image_size=48)
    first.reset(0)
    second.reset(0)
    pictures = first.render(), second.render()
    assert np.array_equal(first.render(), pictures[0])
    first.close()
    assert np.array_equal(second.render(), pictures[1])
    assert np.array_equal(first.render(), pictures[0])
    del first
    assert np.array_equal(second.render(), pictures[1])
    second.close()


def test_processes_are_spawned_never_forked() -> None:
    assert spawn_context().get_start_method() == "spawn"


def test_unknown_tasks_and_views_are_named(egl: None) -> None:
    with pytest.raises(UserError, match=r"'fly' is not a task.*drawer-open"):
        MetaWorldTask("fly")
    simulation = MetaWorldTask("reach", views=("behind",))
    simulation.reset(0)
    with pytest.raises(UserError, match=r"'behind' is not a camera view.*right"):
        simulation.render()


NO_EGL = """
from tutti.suites.metaworld.rendering import check_rendering
from tutti.types import UserError
{prelude}
try:
    check_rendering()
except UserError as error:
    print(error)
"""
NO_LIBRARY = """
import ctypes.util
from OpenGL.platform import ctypesloader
load = ctypesloader.loadLibrary
def without_egl(kind, name, mode=0):
    if "EGL" in name:
        raise OSError("libEGL.so.1: cannot open shared object file")
    return load(kind, name, mode)
ctypesloader.loadLibrary = without_egl
"""


@pytest.mark.parametrize(
    ("prelude", "variables"),
    [("", {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere"}), (NO_LIBRARY, {})],
    ids=["no driver", "no libEGL"],
)
def test_without_egl_the_error_names_the_packages(prelude: str, variables: dict[str, str]) -> None:
    result = run_python(NO_EGL.format(prelude=prelude), **variables)
    assert result.stderr == ""
    assert "libegl1 libgl1-mesa-dri" in result.stdout
    assert "MUJOCO_GL=egl" in result.stdout
