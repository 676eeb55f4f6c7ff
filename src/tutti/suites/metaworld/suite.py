"""Meta-World as a suite: its tasks, cameras, picture size, control rate, and what its controls need."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.suites.environment import Split
from tutti.suites.metaworld.instructions import instructions
from tutti.suites.metaworld.rendering import check_rendering, find_views
from tutti.suites.metaworld.task import ACTION_DIM, CONTROL_RATE, STATE_DIM, STEP_LIMIT, MetaWorldTask

# Another task's text over the same start. The faucet pair shares its scene (0.3 % of the first pixels
# differ), so only the text tells the two apart; in the other pairs the scene gives the task away.
PARTNERS = {
    "faucet-open": "faucet-close",
    "faucet-close": "faucet-open",
    "reach": "push",
    "push": "pick-place",
    "pick-place": "push",
    "drawer-open": "drawer-close",
    "drawer-close": "drawer-open",
    "window-close": "drawer-close",
}


class MetaWorldSuite(FrozenConfig):
    """Everything that recording and evaluation must agree on; makes the environment of each task.

    `image_size` is the edge of the square pictures in pixels. One decision lasts `action_repeat`
    simulation steps of 1/80 s; an episode ends at success or after `max_decisions`.
    """

    robot: ClassVar[str] = "sawyer"
    state_dim: ClassVar[int] = STATE_DIM
    noise: ClassVar[tuple[float, ...]] = (0.0, 0.1, 0.15, 0.2)
    packages: ClassVar[tuple[str, ...]] = ("metaworld", "mujoco")

    name: str
    tasks: tuple[str, ...] = Field(min_length=1)
    views: tuple[str, ...] = Field(default=("right", "left"), min_length=1)
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    action_repeat: Annotated[int, Field(ge=1)] = 4
    max_decisions: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.action_repeat * self.max_decisions > STEP_LIMIT:
            raise UserError(
                f"max_decisions {self.max_decisions} x action_repeat {self.action_repeat} = "
                f"{self.max_decisions * self.action_repeat} simulation steps, but an episode has at most "
                f"{STEP_LIMIT}: max_decisions may be at most {STEP_LIMIT // self.action_repeat}."
            )
        for name, values in (("tasks", self.tasks), ("views", self.views)):
            if len(set(values)) != len(values):
                raise UserError(f"{name}: {list(values)} names something twice.")
        find_views(self.views)
        for task in self.tasks:
            instructions(task)
        return self

    @property
    def fps(self) -> float:
        """Decisions a second: 80 / action_repeat."""
        return CONTROL_RATE / self.action_repeat

    @property
    def fingerprint(self) -> str:
        """The views, picture size and action repeat, and the versions of simulator and physics."""
        views, size, repeat = ", ".join(self.views), self.image_size, self.action_repeat
        return ", ".join((*_versions(), f"views {views}", f"{size} px", f"action repeat {repeat}"))

    @property
    def longest(self) -> int:
        return STEP_LIMIT // self.action_repeat

    @property
    def action_dim(self) -> int:
        return ACTION_DIM

    @property
    def partners(self) -> dict[str, str]:
        return PARTNERS

    @property
    def same_scene(self) -> tuple[str, ...]:
        return ("faucet-open", "faucet-close")

    def with_changes(self, **values: Any) -> Self:
        """The suite with other values of these fields, checked."""
        return type(self)(**self.model_dump() | values)

    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]:
        """The sentences of one task."""
        return instructions(task, split)

    def __call__(self, task: str) -> MetaWorldTask:
        return self.make(task)

    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> MetaWorldTask:
        """The simulation of one task, with this suite's views, picture size and control rate.

        For videos: `samples` smooths edges, and pictures above 128 px show all triangles.
        """
        size = image_size or self.image_size
        return MetaWorldTask(task, self.views, size, action_repeat=self.action_repeat, samples=samples)

    def check_rendering(self) -> None:
        """Raises: UserError if no picture can be drawn on this machine."""
        check_rendering()


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {metadata.version(name)}" for name in MetaWorldSuite.packages)


METAWORLD_8 = MetaWorldSuite(
    name="metaworld-8",
    tasks=(
        "reach",
        "push",
        "pick-place",
        "faucet-open",
        "faucet-close",
        "drawer-open",
        "drawer-close",
        "window-close",
    ),
)
