"""A study of the smallest real run, on a data set of noise: for the tests of `tutti compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.pipeline import VIEW
from tutti.runs.build import ROBOT
from tutti.studies.cells import Cell
from tutti.studies.config import StudyConfig
from tutti.studies.run_cell import Trained
from tutti.suites.metaworld.suite import find_suite
from tutti.suites.metaworld.task import ACTION_DIM, STATE_DIM

TASKS = ("reach", "push")
MODEL: dict[str, Any] = {
    "vision": {"stem": {"channels": [8, 16, 16]}, "width": 16},
    "language": {"width": 16},
    "fusion": {"width": 32, "depth": 1},
    "action": {"hidden": 32},
}


def write_data(folder: Path, per_task: int = 4, length: int = 12) -> Path:
    """Episodes of noise with the views, the rate and the sentences of the simulator's tasks."""
    suite, random = find_suite("metaworld-8"), np.random.default_rng(0)

    def episode(task: str, number: int) -> EpisodeRecord:
        sentences = suite.instructions(task)
        return EpisodeRecord(
            images={
                VIEW + view: random.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8)
                for view in suite.views
            },
            states=random.normal(size=(length, STATE_DIM)).astype(np.float32),
            actions=random.normal(size=(length, ACTION_DIM)).astype(np.float32),
            instruction=sentences[number % len(sentences)],
        )

    episodes = [episode(task, number) for task in TASKS for number in range(per_task)]
    views = tuple(VIEW + view for view in suite.views)
    return write_lerobot(folder, episodes, fps=suite.fps, views=views, robot_type=ROBOT)


def base(data: Path | None = None) -> dict[str, Any]:
    """The keys of a small run; `data` is its data set."""
    values: dict[str, Any] = {
        "data": {"batch_size": 4, "image_size": 16, "horizon": 5},
        "model": MODEL,
        "objective": {"recon": {"offset": 4}, "state": {"offsets": [1, 3]}},
        "training": {"steps": 20, "schedule": {"kind": "wsd", "warmup": 2}},
        "evaluation": {"tasks": list(TASKS), "episodes": 4},
    }
    if data is not None:
        values["data"]["sources"] = [{"path": str(data)}]
    return values


def make_study(data: Path | None = None, **changes: Any) -> StudyConfig:
    """Two arms, one seed, and whatever `changes` says."""
    values: dict[str, Any] = {
        "name": "tiny",
        "base": base(data),
        "arms": {"end_to_end": [], "action_only": ["strategy.kind=action_only"]},
        "baseline": "end_to_end",
        "seeds": 1,
    }
    return StudyConfig.model_validate(values | changes)


def cell(arm: str, seed: int = 0, level: Any = "base", folder: Path | None = None) -> Cell:
    """A cell whose folder is named after it."""
    home = (folder or Path("cells")) / f"{arm}-{level}-{seed}"
    return Cell(arm=arm, level=level, seed=seed, steps=20, folder=home, identity="i")


def trained(arm: str, seed: int, *bits: list[int], level: Any = "base", **changes: Any) -> Trained:
    """A result with these successes of the tasks, one list each."""
    values: dict[str, Any] = {
        "arm": arm,
        "level": level,
        "seed": seed,
        "steps": 20,
        "samples": 80,
        "seconds": 10.0,
        "parameters": 1000,
        "milliseconds": 2.0,
        "held_out": {"action": 0.5},
        "open_loop": 0.25,
        "successes": dict(zip(TASKS, bits, strict=False)),
        "starts": {task: list(range(len(own))) for task, own in zip(TASKS, bits, strict=False)},
        "protocol": {"suite": "metaworld-8"},
        "commit": "c0",
        "versions": {"python": "3.11"},
        "machine": {"cores": 2},
        "identity": "i",
    }
    return Trained(**(values | changes))


def found(*results: Trained) -> dict[Cell, Trained]:
    """Results by their cells."""
    return {cell(one.arm, one.seed, one.level): one for one in results}
