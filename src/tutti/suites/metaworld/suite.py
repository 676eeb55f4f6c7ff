"""Suites: which tasks belong together, and the cameras, picture size and control rate they are run with."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tutti.suites.metaworld.instructions import Split, instructions
from tutti.suites.metaworld.rendering import find_views
from tutti.suites.metaworld.task import CONTROL_RATE, STEP_LIMIT, MetaWorldTask
from tutti.types import UserError

DEMONSTRATION_SEED = 10_000
EVALUATION_SEED = 1_000
"""First seeds of demonstrations and of evaluation: far apart, so no start is in both."""


class SuiteSpec(BaseModel):
    """Everything that recording and judging must agree on.

    `image_size` is the edge of the square pictures in pixels. One decision lasts `action_repeat`
    simulation steps of 1/80 s; an episode ends at success or after `max_decisions`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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

    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]:
        """The sentences of one task."""
        return instructions(task, split)

    def make(self, task: str) -> MetaWorldTask:
        """The simulation of one task, with this suite's views, picture size and control rate."""
        return MetaWorldTask(task, self.views, self.image_size, action_repeat=self.action_repeat)


SUITES: dict[str, SuiteSpec] = {
    "metaworld-8": SuiteSpec(
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
}


def find_suite(name: str) -> SuiteSpec:
    """The suite of this name.

    Raises:
        UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(f"suite: {name!r} is not a suite. Known: {', '.join(SUITES)}.")
    return SUITES[name]
