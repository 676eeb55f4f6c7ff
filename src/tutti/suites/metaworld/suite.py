"""Meta-World as a suite: its tasks, cameras, picture size, control rate, and what its controls need."""

from __future__ import annotations

import functools
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.suites.environment import Split
from tutti.suites.metaworld.rendering import VIEWS, check_rendering
from tutti.suites.metaworld.task import ACTION_DIM, CONTROL_RATE, STATE_DIM, STEP_LIMIT, MetaWorldTask
from tutti.suites.metaworld.three_goals import COLOURS
from tutti.types import Dimensions

SENTENCES = Path(__file__).with_name("instructions.toml")


class MetaWorldSuite(FrozenConfig):
    """Everything that recording and evaluation must agree on; makes the environment of each task.

    `image_size` is the edge of the square pictures in pixels. One decision lasts `action_repeat`
    simulation steps of 1/80 s; an episode ends at success or after `max_decisions`.
    """

    robot: ClassVar[str] = "sawyer"
    state_dim: ClassVar[int] = STATE_DIM
    action_dim: ClassVar[int] = ACTION_DIM
    dimensions: ClassVar[Dimensions] = Dimensions(
        state_names=("hand_x", "hand_y", "hand_z", "gripper_opening"),
        state_units=("m", "m", "m", ""),
        action_names=("hand_dx", "hand_dy", "hand_dz", "gripper_close"),
        action_units=("cm/step", "cm/step", "cm/step", ""),
    )
    places: ClassVar[dict[str, slice]] = {"object": slice(4, 7), "goal": slice(36, 39)}
    noise: ClassVar[tuple[float, ...]] = (0.0, 0.1, 0.15, 0.2)
    packages: ClassVar[tuple[str, ...]] = ("metaworld", "mujoco")
    # Another task's text over the same start. The faucet pair shares its scene: the same tap, up to 5 cm off
    # the middle to be opened and up to 10 to be closed (at one seed 4 to 6 % of the first pixels differ).
    # Within 5 only the text tells the two apart; in the other pairs the scene gives the task away.
    partners: ClassVar[dict[str, str]] = {
        "faucet-open": "faucet-close",
        "faucet-close": "faucet-open",
        "reach": "push",
        "push": "pick-place",
        "pick-place": "push",
        "drawer-open": "drawer-close",
        "drawer-close": "drawer-open",
        "window-close": "drawer-close",
        "reach-red": "reach-green",
        "reach-green": "reach-blue",
        "reach-blue": "reach-red",
    }
    same_scene: ClassVar[tuple[str, ...]] = ("faucet-open", "faucet-close", *COLOURS)

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
        for name in self.views:
            if name not in VIEWS:
                raise UserError(f"views: {name!r} is not a camera view. Known: {', '.join(VIEWS)}.")
        for task in self.tasks:
            self.instructions(task)
        return self

    @property
    def fps(self) -> float:
        """Decisions a second: 80 / action_repeat."""
        return CONTROL_RATE / self.action_repeat

    @property
    def fingerprint(self) -> str:
        """The views, picture size and action repeat, and the versions of simulator and physics."""
        versions = [f"{name} {_version(name)}" for name in self.packages]
        views, size, repeat = ", ".join(self.views), self.image_size, self.action_repeat
        return ", ".join((*versions, f"views {views}", f"{size} px", f"action repeat {repeat}"))

    @property
    def longest(self) -> int:
        """Decisions in the simulator's longest episode."""
        return STEP_LIMIT // self.action_repeat

    def with_changes(self, **values: Any) -> Self:
        """The suite with other values of these fields, checked."""
        return type(self)(**self.model_dump() | values)

    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]:
        """The sentences of a task: at least 8 to train on, at least 4 held out. None occurs twice anywhere.

        Meta-World has no language; the sentences in instructions.toml are ours. A held-out sentence is new as
        a whole, but every word of it occurs in the training sentences of the same task: a model trained from
        scratch cannot know a word that it has never read.

        Raises:
            UserError: there are no sentences for this task.
        """
        sentences = _sentences()[split]
        if task not in sentences:
            raise UserError(
                f"tasks: there are no instructions for {task!r}. Known: {', '.join(sentences)}. "
                f"Add its sentences to {SENTENCES.name} of tutti.suites.metaworld."
            )
        return tuple(sentences[task])

    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> MetaWorldTask:
        """The simulation of one task, with this suite's views, picture size and control rate.

        For videos: `samples` smooths edges, and pictures above 128 px show all triangles.
        """
        size = image_size or self.image_size
        return MetaWorldTask(task, self.views, size, action_repeat=self.action_repeat, samples=samples)

    def check_rendering(self) -> None:
        """Raises: UserError if no picture can be drawn on this machine."""
        check_rendering()


_version = functools.cache(metadata.version)


@functools.cache
def _sentences() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads(SENTENCES.read_text(encoding="utf-8"))


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

THREE_GOALS = MetaWorldSuite(name="three-goals", tasks=tuple(COLOURS))
"""One scene with a red, a green and a blue goal: only the sentence says which of them to reach."""
