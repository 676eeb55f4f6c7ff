"""What recording and evaluation need of a simulator: protocols of one task and of a suite of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from tutti.types import UNNAMED, Dimensions, UserError

UNLIMITED = 1_000_000
"""`longest` of a suite that plays on for as long as it is asked to."""
Split = Literal["train", "held_out", "new_words"]
"""Which instructions of a task: those of the recordings, others that no training has seen, or others with
words that no training has seen, which few suites have."""


@runtime_checkable
class Environment(Protocol):
    """A simulated task, ready to be acted on. Everything after `reset(seed)` is a function of seed and
    actions.

    A class of your own that derives from this one needs `reset`, `step`, `render`, `state` and `success`; the
    rest has defaults. `success` latches: True from the first success to the next reset. Pictures are drawn by
    `render` alone, one for each view of the suite. `closest` is the smallest distance of object and goal
    since the reset, in metres or the simulator's own unit; None where there is none. `reached` names the
    goals that the robot has been at since then, the first one first, by the tasks that they belong to; None
    where a scene does not show the goals of several tasks. `privileged` is all that the simulator knows; it
    is hashed to count distinct starts and never shown to a policy.

    The rest is for recording: `random_start_action` is held before an episode begins; `perturb` adds noise of
    standard deviation `sigma` to the movement of an action. `render_physics` draws what `save_physics` saved,
    and ends the episode; by default the pictures themselves are what is saved, at each decision.
    """

    def reset(self, seed: int) -> object: ...
    def step(self, action: Float32[np.ndarray, " a"]) -> object: ...
    def render(self) -> UInt8[np.ndarray, "v h w 3"]: ...
    @property
    def state(self) -> Float32[np.ndarray, " s"]: ...
    @property
    def success(self) -> bool: ...

    @property
    def privileged(self) -> np.ndarray:
        return self.state

    @property
    def closest(self) -> float | None:
        return None

    @property
    def reached(self) -> tuple[str, ...] | None:
        return None

    def expert_action(self) -> Float32[np.ndarray, " a"]:
        raise UserError(f"{type(self).__name__}: this simulator has no expert.")

    def close(self) -> None:
        """Frees what it holds."""

    def random_start_action(self, random: np.random.Generator) -> Float32[np.ndarray, " a"]:
        return random.uniform(-1, 1, self.expert_action().shape).astype(np.float32)

    def perturb(
        self, action: Float32[np.ndarray, " a"], sigma: float, random: np.random.Generator
    ) -> Float32[np.ndarray, " a"]:
        return (action + sigma * random.standard_normal(action.shape)).astype(np.float32)

    def save_physics(self) -> np.ndarray:
        return self.render()

    def render_physics(self, saved: np.ndarray) -> UInt8[np.ndarray, "v h w 3"]:
        return saved


@runtime_checkable
class Suite(Protocol):
    """A named set of tasks with the cameras, picture size, control rate and expert that they are run with.

    It makes the environment of a task (`samples` smooths edges, for videos), and travels to worker processes,
    so it pickles. A class of your own that derives from this one, best a frozen dataclass, must give what has
    no default here. `fingerprint` names all that changes what happens in it (action repeat, views, picture
    size, versions); `longest` is the largest number of decisions that a rollout may have, `starts` the number
    of distinct starts of a task, None for any number, `one_a_process` says that a process can hold no second
    environment.

    `tiers` are groups of tasks whose means are averaged beside the mean of the tasks. `protocol` has the
    values of `evaluation.*` that published numbers of this suite were measured with. `partners` gives for a
    task the one whose text the control of the wrong instruction takes, and `same_scene` those tasks that only
    the text tells apart. `robot` goes into the data sets; `noise` are the standard deviations that recording
    adds to the expert's actions by default; `packages` those whose versions the recorded bytes depend on,
    `dimensions` the names and units of states and actions. `places` says where `privileged` has the places
    (x, y, z) of things, by name. With `absolute_actions` an action is a state to go to, told as the first
    numbers of `state`: the control that does nothing asks for the present one, else for a change of 0.
    """

    @property
    def name(self) -> str: ...
    @property
    def state_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def max_decisions(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def fingerprint(self) -> str: ...
    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> Environment: ...
    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]: ...

    @property
    def robot(self) -> str:
        return self.name

    @property
    def has_expert(self) -> bool:
        return True

    @property
    def dimensions(self) -> Dimensions:
        return UNNAMED

    @property
    def places(self) -> Mapping[str, slice]:
        return {}

    @property
    def absolute_actions(self) -> bool:
        return False

    @property
    def noise(self) -> tuple[float, ...]:
        return (0.0,)

    @property
    def packages(self) -> tuple[str, ...]:
        return ()

    @property
    def tiers(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    @property
    def protocol(self) -> Mapping[str, int]:
        return {}

    @property
    def partners(self) -> dict[str, str]:
        return {}

    @property
    def same_scene(self) -> tuple[str, ...]:
        return ()

    @property
    def one_a_process(self) -> bool:
        return False

    @property
    def action_repeat(self) -> int:
        return 1

    @property
    def longest(self) -> int:
        return UNLIMITED

    @property
    def starts(self) -> int | None:
        return None

    def with_changes(self, **values: Any) -> Self:
        return dataclasses.replace(self, **values)  # pyright: ignore[reportArgumentType]

    def check_rendering(self) -> None:
        """Raises: UserError if no picture can be drawn on this machine."""


def known_words(suite: Suite, split: Split) -> None:
    """Raises: UserError if `split` is new_words, of a suite that has no such sentences."""
    if split == "new_words":
        raise UserError(
            f"split new_words: {suite.name} has no sentences of words that the training lacks. "
            "Take train or held_out, or write your own into evaluation.sentences."
        )
