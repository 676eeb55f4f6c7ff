"""Any gymnasium environment as a suite: PushT and ALOHA by their own packages, and yours by a few words."""

from __future__ import annotations

# pyright: reportIncompatibleMethodOverride=false
# A field of a frozen dataclass is what the protocol calls a property.
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from tutti.errors import UserError
from tutti.suites.environment import Environment, Split, Suite, known_words

TERMINATED = "terminated"
"""The `success` of an environment that ends when it is solved."""


@dataclass(frozen=True)
class GymSuite(Suite):
    """Tasks that are gymnasium environments with one action space (a Box) and one form of observation.

    `environments` has the id of each task, "package:Name-v0" where importing the package registers it;
    `arguments` go to `gymnasium.make`. `state_keys` are the places in the observation whose numbers are the
    state, "" for all of it, "a/b" for b inside of a. `view_keys` has the place of each view's picture; a view
    without one is what `render()` gives, made with render_mode="rgb_array". `success` is a key of `info`, or
    "terminated". `distance`, if there is one, is the key of `info` whose smallest value is `closest`.
    `sentences[task]` are the instructions, `held_out` likewise; without these the former stand for both.
    `absolute_actions`: an action is a state to go to, as the first numbers of the state tell it.
    `published` is the suite's `protocol`.

    Start i is that of `reset(seed=i)`. Actions are clipped to the space. Gymnasium knows no expert and no
    saved physics: to record, derive from `GymEnvironment` and give `expert_action`.
    """

    name: str = ""
    robot: str = ""
    state_dim: int = 0
    action_dim: int = 0
    environments: Mapping[str, str] = field(default_factory=dict)
    sentences: Mapping[str, Sequence[str]] = field(default_factory=dict)
    held_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fps: float = 10.0
    max_decisions: int = 100
    views: tuple[str, ...] = ("camera",)
    image_size: int = 96
    arguments: Mapping[str, Any] = field(default_factory=dict)
    state_keys: Sequence[str] = ("",)
    view_keys: Mapping[str, str] = field(default_factory=dict)
    success: str = "is_success"
    distance: str = ""
    has_expert: bool = False
    absolute_actions: bool = False
    one_a_process: bool = False
    packages: tuple[str, ...] = ("gymnasium",)
    published: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("views", "state_keys", "packages"):  # lists, where a config names them
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if missing := [task for task in self.environments if task not in self.sentences]:
            raise UserError(f"suite {self.name}: sentences has none for {', '.join(missing)}.")

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint))

    def with_changes(self, **values: Any) -> Self:
        """Where there is one view, before and after, it only takes another name: its picture stays.

        Raises: UserError for any other view that the suite does not have.
        """
        views = tuple(values.get("views", self.views))
        if new := [view for view in views if view not in (*self.views, *self.view_keys)]:
            if len(views) > 1 or len(self.views) > 1:
                known = ", ".join(self.views)
                raise UserError(f"views: {new[0]!r} is no view of {self.name}. Known: {known}.")
            renamed = dict(zip(self.views, new, strict=True))
            values["view_keys"] = {renamed[v]: key for v, key in self.view_keys.items() if v in renamed}
        return replace(self, **values)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.environments)

    @property
    def protocol(self) -> Mapping[str, int]:
        """`published`."""
        return self.published

    @property
    def fingerprint(self) -> str:
        """The environments with their arguments, the views, where state, pictures, success and distance are
        found, and the versions of the packages."""
        made = [f"{name} {_version(name)}" for name in self.packages]
        made += [f"{task} {name}" for task, name in self.environments.items()]
        made += [f"{key} {value}" for key, value in (*self.arguments.items(), *self.view_keys.items())]
        made += [f"{self.fps:g} Hz", f"state {'; '.join(self.state_keys)}", f"success {self.success}"]
        made += [f"distance {self.distance}"] * bool(self.distance)
        made += ["absolute actions"] * self.absolute_actions
        return ", ".join((*made, f"views {', '.join(self.views)}", f"{self.image_size} px"))

    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> Environment:
        """Raises: UserError if there is no such task, or its package is missing."""
        return GymEnvironment(self, task, image_size or self.image_size)

    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]:
        """Raises: UserError if there is no such task, or sentences of new words are asked for."""
        if task not in self.environments:
            raise UserError(f"tasks: {task!r} is not a task of {self.name}. Known: {', '.join(self.tasks)}.")
        known_words(self, split)
        return tuple((self.held_out if split == "held_out" else {}).get(task) or self.sentences[task])


class GymEnvironment(Environment):
    """One gymnasium environment. When it has ended without success it stays as it is."""

    def __init__(self, suite: GymSuite, task: str, image_size: int) -> None:
        """Raises: UserError if its package is missing, or gymnasium cannot make it."""
        self.suite, self.image_size = suite, image_size
        try:
            gymnasium = importlib.import_module("gymnasium")
            self.env: Any = gymnasium.make(
                suite.environments[task], render_mode="rgb_array", **suite.arguments
            )
        except ImportError as error:
            packages = " ".join(suite.packages)
            raise UserError(f"suite {suite.name}: {error}. Install it: pip install {packages}.") from error
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"suite {suite.name}, {suite.environments[task]}: {said}") from error
        self.observation: Any = None
        self._success = self._over = False
        self._closest: float | None = None

    def reset(self, seed: int) -> None:
        """Starts the episode that `seed` draws."""
        self.observation, _ = self.env.reset(seed=seed)
        self._success = self._over = False
        self._closest = None

    def step(self, action: Float32[np.ndarray, " a"]) -> None:
        """One decision, clipped to the action space."""
        if self._over:
            return
        space = self.env.action_space
        clipped = np.clip(action, space.low, space.high).astype(space.dtype)
        self.observation, _, terminated, truncated, info = self.env.step(clipped)
        self._success |= bool(self.solved(bool(terminated), info))
        self._over = bool(terminated or truncated)
        if (distance := info.get(self.suite.distance)) is not None:
            self._closest = min(float(distance), float("inf") if self._closest is None else self._closest)

    def solved(self, terminated: bool, info: Mapping[str, Any]) -> bool:
        """Whether a step has solved the task, by what gymnasium says of it."""
        return terminated if self.suite.success == TERMINATED else bool(info.get(self.suite.success, False))

    @property
    def state(self) -> Float32[np.ndarray, " s"]:
        """The numbers at `state_keys`, one after the other; zeros before the first reset."""
        if self.observation is None:
            return np.zeros(self.suite.state_dim, np.float32)
        parts = [np.ravel(_at(self.observation, key)) for key in self.suite.state_keys]
        return np.concatenate([*parts, np.zeros(0)]).astype(np.float32)

    @property
    def privileged(self) -> Float32[np.ndarray, " p"]:
        """All numbers of the observation, the pictures' among them."""
        return np.concatenate([np.ravel(part).astype(np.float32) for part in _leaves(self.observation)])

    @property
    def success(self) -> bool:
        """Has it been solved since the last reset?"""
        return self._success

    @property
    def closest(self) -> float | None:
        """The smallest value of `distance`."""
        return self._closest

    def render(self) -> UInt8[np.ndarray, "v h w 3"]:
        """The views, resized to squares."""
        keys = self.suite.view_keys
        found = (_at(self.observation, keys[v]) if v in keys else self.env.render() for v in self.suite.views)
        size = (self.image_size, self.image_size)
        drawn = (Image.fromarray(np.asarray(picture)) for picture in found)
        return np.stack([np.asarray(one.resize(size, Image.Resampling.BILINEAR)) for one in drawn])

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()


def _at(observation: Any, key: str) -> Any:
    for part in filter(None, key.split("/")):
        if not isinstance(observation, Mapping) or part not in observation:
            there = ", ".join(observation) if isinstance(observation, Mapping) else type(observation).__name__
            raise UserError(f"suite: the observation has no {key!r}; there is {there}.")
        observation = observation[part]
    return observation


def _leaves(observation: Any) -> list[Any]:
    if isinstance(observation, Mapping):
        return [leaf for key in sorted(observation) for leaf in _leaves(observation[key])]
    return [observation]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


PUSHT = GymSuite(
    name="pusht",
    robot="pusher",
    state_dim=2,
    action_dim=2,
    environments={"pusht": "gym_pusht:gym_pusht/PushT-v0"},
    sentences={"pusht": ("push the gray block onto the green shape", "move the block to the green target")},
    held_out={"pusht": ("move the gray block to the green shape",)},
    fps=10.0,
    max_decisions=300,
    views=("top",),
    absolute_actions=True,
    arguments={"obs_type": "pixels_agent_pos"},
    state_keys=("agent_pos",),
    view_keys={"top": "pixels"},
    packages=("gym-pusht", "gymnasium", "pymunk"),
    published={"episodes": 50, "max_decisions": 300},
)
"""One task without words. An action is the place to go to, in pixels; success is a coverage above 0.95."""

ALOHA = tuple(
    GymSuite(
        name=f"aloha-{name}",
        robot="aloha",
        state_dim=14,
        action_dim=14,
        environments={name: f"gym_aloha:gym_aloha/Aloha{kind}-v0"},
        sentences={name: sentences},
        fps=50.0,
        max_decisions=300,
        views=("top",),
        image_size=224,
        absolute_actions=True,
        arguments={"obs_type": "pixels_agent_pos"},
        state_keys=("agent_pos",),
        view_keys={"top": "pixels/top"},
        one_a_process=True,
        packages=("gym-aloha", "gymnasium", "mujoco", "dm-control"),
        published={"episodes": 50, "max_decisions": 300},
    )
    for name, kind, sentences in (
        ("transfer-cube", "TransferCube", ("pick up the cube with the right arm and give it to the left",)),
        ("insertion", "Insertion", ("insert the peg into the socket",)),
    )
)
"""One task a suite: the package keeps its start in a global variable, so a process holds one of them."""
