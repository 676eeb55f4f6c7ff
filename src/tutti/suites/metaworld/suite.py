"""Meta-World as a suite: its tasks, cameras, picture size, control rate, and what its controls need."""

from __future__ import annotations

import functools
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.suites.environment import Split
from tutti.suites.metaworld.rendering import FIXED_VIEWS, VIEWS, Drawing, check_rendering
from tutti.suites.metaworld.task import ACTION_DIM, CONTROL_RATE, STATE_DIM, STEP_LIMIT, MetaWorldTask
from tutti.suites.metaworld.tasks import LOOK_ALIKES, MT10, MT50, SAME_SCENE, TIERS
from tutti.suites.metaworld.three_goals import COLOURS
from tutti.types import Dimensions

SENTENCES = Path(__file__).with_name("instructions.toml")


class MetaWorldSuite(FrozenConfig):
    """Everything that recording and evaluation must agree on; makes the environment of each task.

    `image_size` is the edge of the square pictures in pixels. One decision lasts `action_repeat`
    simulation steps of 1/80 s; an episode ends at success or after `max_decisions`. `rules`: how an episode
    begins. "tutti" computes the first frame and observation anew; "lerobot" and "starvla" leave them stale;
    "starvla" begins with one step of the zero action. `drawing`: "full" is as gymnasium draws, with shadows
    and reflections; "shaded" looks like it at 96 px, for an eighth of the time; "fast" has neither. Where it
    is not given, rules "tutti" draw fast and the others full.
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
    has_expert: ClassVar[bool] = True
    absolute_actions: ClassVar[bool] = False
    starts: ClassVar[None] = None
    same_scene: ClassVar[tuple[str, ...]] = SAME_SCENE
    one_a_process: ClassVar[bool] = False

    name: str
    tasks: tuple[str, ...] = Field(min_length=1)
    views: tuple[str, ...] = Field(default=("right", "left"), min_length=1)
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    action_repeat: Annotated[int, Field(ge=1)] = 4
    max_decisions: Annotated[int, Field(ge=1)] = 100
    rules: Literal["tutti", "lerobot", "starvla"] = "tutti"
    drawing: Drawing | None = None

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
        known = (*VIEWS, *FIXED_VIEWS)
        for name in self.views:
            if name not in known:
                raise UserError(f"views: {name!r} is not a camera view. Known: {', '.join(known)}.")
        if set(FIXED_VIEWS) <= set(self.views):
            raise UserError(f"views: {' and '.join(FIXED_VIEWS)} are one camera at two places. Name one.")
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
        rules = [f"rules of {self.rules}"] * (self.rules != "tutti")
        rules += [f"drawn {self.drawing}"] * (self.drawing is not None)
        return ", ".join((*versions, f"views {views}", f"{size} px", f"action repeat {repeat}", *rules))

    @property
    def tiers(self) -> dict[str, tuple[str, ...]]:
        """The four tiers of MT50; empty where not all of its tasks are in the suite."""
        return TIERS if set(MT50) <= set(self.tasks) else {}

    @property
    def protocol(self) -> dict[str, int]:
        """Of MT10 and MT50: what published numbers were measured with."""
        first = 4042 if self.rules == "starvla" else 1000
        limit = self.max_decisions
        standard = {"episodes": 10, "first_seed": first, "max_decisions": limit}
        return standard if self.tasks in (MT10, MT50) else {}

    @property
    def partners(self) -> dict[str, str]:
        """Of each task the first of its look-alikes that the suite has, or else the last."""
        return {
            task: next((one for one in others if one in self.tasks), others[-1])
            for task, others in LOOK_ALIKES.items()
        }

    @property
    def longest(self) -> int:
        """Decisions in the simulator's longest episode."""
        return STEP_LIMIT // self.action_repeat

    def with_changes(self, **values: Any) -> Self:
        """The suite with these values, checked; at another `action_repeat` as long in time."""
        if repeat := values.get("action_repeat"):
            values = {"max_decisions": self.max_decisions * self.action_repeat // repeat} | values
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
        usual: Drawing = "fast" if self.rules == "tutti" else "full"
        rules, drawing, repeat = self.rules, self.drawing or usual, self.action_repeat
        return MetaWorldTask(
            task, self.views, size, action_repeat=repeat, samples=samples, rules=rules, drawing=drawing
        )

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

_LEROBOT: dict[str, Any] = {
    "views": ("corner2_moved",),
    "image_size": 480,
    "action_repeat": 1,
    "max_decisions": 500,
    "rules": "lerobot",
}
_STARVLA = _LEROBOT | {
    "views": ("corner2_cropped",),
    "image_size": 224,
    "max_decisions": 400,
    "rules": "starvla",
}
_FAST: dict[str, Any] = {
    "views": ("corner2_moved",),
    "image_size": 96,
    "action_repeat": 2,  # at 4 the experts of bin-picking, hammer and handle-pull-side fail too often
    "max_decisions": 250,
}
_HELD: dict[str, Any] = _LEROBOT | {"action_repeat": 2, "max_decisions": 250}
_SHADED: dict[str, Any] = _FAST | {"image_size": 128, "drawing": "shaded"}
METAWORLD = (
    METAWORLD_8,
    THREE_GOALS,
    *(
        MetaWorldSuite(name=f"metaworld-{name}{suffix}", tasks=tasks, **values)
        for name, tasks in (("mt10", MT10), ("mt50", MT50))
        for suffix, values in (
            *(("", _LEROBOT), ("-held", _HELD), ("-starvla", _STARVLA)),
            *(("-fast", _FAST), ("-shaded", _SHADED)),
        )
    ),
)
"""`metaworld-mt50` is MT50 in LeRobot's protocol; `-held` the same for a policy that decides at 40 Hz and
holds an action for two steps. `-fast` has its view and starts at 40 Hz, drawn fast at 96 px; `-shaded` draws
what looks like LeRobot's pictures at that size. `-starvla` is starVLA's protocol. All limits are 500
simulation steps, but for starVLA's 400."""
