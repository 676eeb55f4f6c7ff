"""One Meta-World task as an environment: seeded starts, decisions, states, pictures, scripted expert.

What Meta-World 3.1.1 gets wrong or leaves open is cured here: `reset(seed=)` ignores its seed; the first
frame and observation after a reset are stale; experts return actions up to 24 where 1 is the limit;
`terminated` is never True and success may be lost again; step 501 raises.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from tutti.errors import UserError
from tutti.suites.metaworld.rendering import Drawing, FastRenderer, load_metaworld, load_mujoco, move_cameras
from tutti.suites.metaworld.three_goals import COLOURS, RADIUS, three_goals

CONTROL_RATE = 80  # Simulation steps a second, each 5 x 0.0025 s.
STEP_LIMIT = 500
STATE_DIM = 4
ACTION_DIM = 4
PRIVILEGED_DIM = 39


def to_action(action: np.ndarray) -> Float32[np.ndarray, " 4"]:
    """An action as the simulator takes it: 4 finite float32, clipped to [-1, 1].

    Raises:
        ValueError: it is not of shape (4,), or not finite.
    """
    values = np.asarray(action, dtype=np.float32)
    if values.shape != (ACTION_DIM,) or not np.isfinite(values).all():
        raise ValueError(
            f"An action must be {ACTION_DIM} finite numbers (dx, dy, dz, gripper), got {action!r}."
        )
    return np.clip(values, -1.0, 1.0)


class MetaWorldTask:
    """A task of Meta-World with a renderer that is opened when the first picture is asked for.

    The action is (dx, dy, dz, gripper) in [-1, 1]: 1 moves the hand's target by 1 cm a simulation step;
    gripper 1 closes. One decision repeats it for `action_repeat` steps, so decisions come at
    80 / action_repeat Hz. The same seed gives the same states and pictures, to the last bit, in any
    process of one machine, whatever was run before.
    """

    def __init__(
        self,
        task: str,
        views: tuple[str, ...] = ("right", "left"),
        image_size: int = 64,
        *,
        action_repeat: int = 4,
        samples: int = 0,
        rules: str = "tutti",
        drawing: Drawing = "fast",
    ) -> None:
        """Builds the physics of `task` ("reach", "drawer-open": Meta-World's name without "-v3"; or a task of
        the scene with three goals). `rules` and `drawing` as in `MetaWorldSuite`.

        Raises:
            UserError: the task is unknown, or the simulator is missing.
        """
        environment, expert = three_goals() if task in COLOURS else _of_metaworld(task)
        self.task = task
        self.views = views
        self.image_size = image_size
        self.action_repeat = action_repeat
        self.rules = rules
        self.drawing: Drawing = drawing
        self._samples = samples
        self._mujoco = load_mujoco()
        self._env = _make_environment(environment)
        move_cameras(self._env.model, views)
        self._expert = expert()
        if task in COLOURS:
            self._env.told = task
        self._renderer: FastRenderer | None = None
        self._observation = np.zeros(PRIVILEGED_DIM)
        self._num_steps = STEP_LIMIT  # Nothing can be done before the first reset.
        self._success = False
        self._reached: tuple[str, ...] = ()
        self._closest: float | None = None

    def reset(self, seed: int) -> Self:
        """Starts the episode that `seed` draws."""
        env = self._env
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env.seed(seed)
            observation, _ = env.reset()
        if self.rules == "tutti":
            observation = self._observe_anew()
        self._observation = observation
        self._num_steps = 0
        self._success = False
        self._reached = ()
        self._closest = None
        if self.rules == "starvla":
            self._observation = env.step(np.zeros(ACTION_DIM, np.float32))[0]
            self._num_steps = 1
        return self

    def _observe_anew(self) -> Float64[np.ndarray, " 39"]:
        """Bodies have been moved since the positions were last computed: computes them, and takes the first
        observation anew, with itself as the previous one."""
        env = self._env
        self._mujoco.mj_forward(env.model, env.data)
        current = env._get_curr_obs_combined_no_goal()
        env._prev_obs = current
        observation = env._get_obs()
        observation[:18] = observation[18:36] = current
        env._prev_obs = current
        return observation

    def step(self, action: np.ndarray) -> Self:
        """One decision: `action`, clipped, for `action_repeat` simulation steps.

        Ends early at the first success and at step 500. After a success the simulation may be stepped on;
        `success` stays True.

        Raises:
            ValueError: the action is not 4 finite numbers, or the episode is at its limit or not begun.
        """
        if self._num_steps >= STEP_LIMIT:
            raise ValueError(
                f"The episode is over or not begun (limit {STEP_LIMIT} steps): call reset(seed)."
            )
        clipped = to_action(action)
        for _ in range(self.action_repeat):
            self._observation, _, _, _, info = self._env.step(clipped)
            self._num_steps += 1
            self._note_goals()
            distance = float(info["obj_to_target"])
            self._closest = distance if self._closest is None else min(self._closest, distance)
            first = bool(info["success"]) and not self._success
            self._success |= first
            if first or self._num_steps >= STEP_LIMIT:
                break
        return self

    @property
    def state(self) -> Float32[np.ndarray, " 4"]:
        """What the robot may know: hand x, y, z in metres, and the gripper's opening in [0, 1]."""
        return self._observation[:STATE_DIM].astype(np.float32)

    @property
    def privileged(self) -> Float32[np.ndarray, " 39"]:
        """Everything: hand, opening and object poses now and one simulation step ago, and the goal."""
        return self._observation.astype(np.float32)

    @property
    def success(self) -> bool:
        """Has the task been solved since the last reset?"""
        return self._success

    @property
    def closest(self) -> float | None:
        """The smallest distance of object and goal in a simulation step since the reset, in metres, as
        Meta-World measures it for the task; None before the first step."""
        return self._closest

    @property
    def reached(self) -> tuple[str, ...] | None:
        """The goals that the hand has been at since the last reset, by their tasks, the first one first.

        None where a scene does not show the goals of several tasks.
        """
        return self._reached if self.task in COLOURS else None

    def _note_goals(self) -> None:
        for name, place in self._env.places.items() if self.task in COLOURS else ():
            near = float(np.linalg.norm(self._env.tcp_center - place)) <= RADIUS
            self._reached += (name,) * (near and name not in self._reached)

    def expert_action(self) -> Float32[np.ndarray, " 4"]:
        """What the scripted expert, which sees `privileged`, does now; clipped to [-1, 1]."""
        with warnings.catch_warnings():
            # It warns of its own large moves.
            warnings.simplefilter("ignore")
            return to_action(self._expert.get_action(self._observation))

    def random_start_action(self, random: np.random.Generator) -> Float32[np.ndarray, " 4"]:
        """A random direction, mostly sideways and up, with the hand open."""
        return to_action(random.uniform((-1.0, -1.0, -0.3, -1.0), (1.0, 1.0, 1.0, -1.0)))

    def perturb(
        self, action: Float32[np.ndarray, " 4"], sigma: float, random: np.random.Generator
    ) -> Float32[np.ndarray, " 4"]:
        """The action with Gaussian noise on x, y and z, clipped."""
        noisy = action.copy()
        noisy[:3] += (sigma * random.standard_normal(3)).astype(np.float32)
        return to_action(noisy)

    def render(self) -> UInt8[np.ndarray, "v h w 3"]:
        """The views as they are now.

        Raises:
            UserError: no OpenGL context can be opened.
        """
        if self._renderer is None:
            self._renderer = FastRenderer(
                self._env.model, self.views, self.image_size, self._samples, drawing=self.drawing
            )
        return self._renderer.render(self._env.data)

    def save_physics(self) -> Float64[np.ndarray, " p"]:
        """The full physical state, to be drawn later with `render_physics`."""
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        saved = np.empty(self._mujoco.mj_stateSize(self._env.model, kind))
        self._mujoco.mj_getState(self._env.model, self._env.data, saved, kind)
        return saved

    def render_physics(self, saved: Float64[np.ndarray, " p"]) -> UInt8[np.ndarray, "v h w 3"]:
        """The pictures that `render` would have given when `saved` was taken, in this same episode. Only the
        first one after a reset by LeRobot's rules, which is stale there, has all places computed here.

        Ends the episode: the next call must be `reset` or another `render_physics`.
        """
        self._num_steps = STEP_LIMIT
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        self._mujoco.mj_setState(self._env.model, self._env.data, saved, kind)
        self._mujoco.mj_forward(self._env.model, self._env.data)
        return self.render()

    def close(self) -> None:
        """Closes the renderer; physics stays usable."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _of_metaworld(task: str) -> tuple[type, type]:
    """Meta-World's own environment class and expert of a task."""
    environments, experts = load_metaworld()
    name = f"{task}-v3"
    if name not in environments:
        known = ", ".join((*(key.removesuffix("-v3") for key in environments), *COLOURS))
        raise UserError(f"tasks: {task!r} is not a task of Meta-World. Known: {known}.")
    return environments[name], experts[name]


def _make_environment(kind: type) -> Any:
    """Meta-World's class itself, set up as its benchmarks do, but with starts drawn from `seed`.

    It offers no public way: these private attributes are why pyproject.toml pins metaworld.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env: Any = kind()
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = True
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    return env
