"""What recording and evaluation need of a simulator: protocols of one task and of a suite of tasks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from tutti.types import UNNAMED, Dimensions

Split = Literal["train", "held_out"]
"""Which instructions of a task: those of the recordings, or others that no training has seen."""


@runtime_checkable
class Environment(Protocol):
    """A simulated task, ready to be acted on. Everything after `reset(seed)` is a function of seed and
    actions.

    `success` latches: True from the first success to the next reset. `reached` names the goals that the robot
    has been at since then, the first one first, by the tasks that they belong to; None where a scene does not
    show the goals of several tasks. `privileged` is all that the simulator
    knows; it is hashed to count distinct starts and never shown to a policy. Pictures are drawn by `render`
    alone.

    The second half is what recording needs: `random_start_action` is held before an episode begins; `perturb`
    adds noise of standard deviation `sigma` to the movement of an action. `render_physics` draws what
    `save_physics` saved, and ends the episode.
    """

    def reset(self, seed: int) -> object: ...
    def step(self, action: Float32[np.ndarray, " a"]) -> object: ...
    def render(self) -> UInt8[np.ndarray, "v h w 3"]: ...
    @property
    def state(self) -> Float32[np.ndarray, " s"]: ...
    @property
    def privileged(self) -> np.ndarray: ...
    @property
    def success(self) -> bool: ...
    @property
    def reached(self) -> tuple[str, ...] | None: ...
    def expert_action(self) -> Float32[np.ndarray, " a"]: ...
    def close(self) -> None: ...

    def random_start_action(self, random: np.random.Generator) -> Float32[np.ndarray, " a"]: ...
    def perturb(
        self, action: Float32[np.ndarray, " a"], sigma: float, random: np.random.Generator
    ) -> Float32[np.ndarray, " a"]: ...
    def save_physics(self) -> np.ndarray: ...
    def render_physics(self, saved: np.ndarray) -> UInt8[np.ndarray, "v h w 3"]: ...


@runtime_checkable
class Suite(Protocol):
    """A named set of tasks with the cameras, picture size, control rate and expert that they are run with.

    It makes the environment of a task (`samples` smooths edges, for videos), and travels to worker processes,
    so it pickles. `fingerprint` names all that changes what happens in it (action repeat, views, picture
    size, versions); `longest` is the largest number of decisions that a rollout may have. `partners` gives
    for a task the one whose text the control of the wrong instruction takes, and `same_scene` those tasks
    that only the text tells apart. `robot` goes into the data sets; `noise` are the standard deviations that
    recording adds to the expert's actions by default; `packages` those whose versions the recorded bytes
    depend on, `dimensions` the names and units of states and actions. `places` says where
    `privileged` has the places (x, y, z) of things, by name.
    """

    robot: ClassVar[str]
    state_dim: ClassVar[int]
    action_dim: ClassVar[int]
    dimensions: ClassVar[Dimensions] = UNNAMED
    places: ClassVar[dict[str, slice]] = {}
    noise: ClassVar[tuple[float, ...]]
    packages: ClassVar[tuple[str, ...]]
    partners: ClassVar[dict[str, str]]
    same_scene: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def action_repeat(self) -> int: ...
    @property
    def max_decisions(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def longest(self) -> int: ...
    def with_changes(self, **values: Any) -> Self: ...
    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> Environment: ...
    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]: ...
    def check_rendering(self) -> None: ...
