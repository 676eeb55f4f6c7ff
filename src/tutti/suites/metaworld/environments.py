"""What the judge needs of a simulator, and Meta-World fitted to it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from tutti.suites.metaworld.instructions import Split
from tutti.suites.metaworld.suite import SuiteSpec
from tutti.suites.metaworld.task import ACTION_DIM, STEP_LIMIT, MetaWorldTask
from tutti.types import DataSpec, UserError


@runtime_checkable
class Environment(Protocol):
    """A simulated task, ready to be acted on. Everything after `reset(seed)` is a function of seed and
    actions.

    `success` latches: True from the first success to the next reset. `privileged` is all that the simulator
    knows; it is hashed to count distinct starts and never shown to a policy. Pictures are drawn by `render`
    alone.
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
    def expert_action(self) -> Float32[np.ndarray, " a"]: ...
    def close(self) -> None: ...


@runtime_checkable
class EnvironmentFactory(Protocol):
    """Makes the environment of a task; travels to worker processes, so it pickles.

    `fingerprint` names all that changes what happens in it (action repeat, views, picture size, versions);
    `longest` is the largest number of decisions that a rollout may have; `tasks` is the suite's default set.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def longest(self) -> int: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    def __call__(self, task: str) -> Environment: ...
    def instructions(self, task: str, split: Split) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class MetaWorldEnvironments:
    """The tasks of a Meta-World suite."""

    suite: SuiteSpec

    @property
    def fingerprint(self) -> str:
        """The suite's views, picture size and action repeat, and the versions of simulator and physics."""
        suite = self.suite
        views = ", ".join(suite.views)
        return ", ".join(
            (*_versions(), f"views {views}", f"{suite.image_size} px", f"action repeat {suite.action_repeat}")
        )

    @property
    def action_dim(self) -> int:
        return ACTION_DIM

    @property
    def longest(self) -> int:
        return STEP_LIMIT // self.suite.action_repeat

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.suite.tasks

    def __call__(self, task: str) -> MetaWorldTask:
        return self.suite.make(task)

    def instructions(self, task: str, split: Split) -> tuple[str, ...]:
        return self.suite.instructions(task, split)


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {metadata.version(name)}" for name in ("metaworld", "mujoco"))


CURE = "For data of another robot: evaluation.suite=none measures the open-loop error alone."


def fit_suite(suite: SuiteSpec, spec: DataSpec, image_size: int | None = None) -> SuiteSpec:
    """The suite with the views that a policy was trained on, in its order, at `image_size` (that of the
    recording).

    `spec.views` may carry a data set's prefix, as "observation.images.right".

    Raises UserError: the policy was trained at another rate than the suite acts at, on other sizes, or on a
    view that the simulator does not have.
    """
    if abs(spec.fps - suite.fps) > 1e-6:
        raise UserError(
            f"The policy was trained at {spec.fps:g} actions a second, {suite.name} takes {suite.fps:g}. "
            "Record the data with the suite's action repeat, or evaluate on a suite of the data's rate. "
            f"{CURE}"
        )
    if spec.action_dim != ACTION_DIM:
        raise UserError(
            f"The policy gives {spec.action_dim} action values, but {suite.name} takes {ACTION_DIM}. {CURE}"
        )
    views = tuple(view.rsplit(".", 1)[-1] for view in spec.views)
    given = suite.model_dump() | {"views": views, "image_size": image_size or suite.image_size}
    return SuiteSpec.model_validate(given)
