"""How far a running cell is, read from what it leaves in its folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutti.config.run_config import RunConfig
from tutti.suites.registry import find_suite

TAIL = 16_384
ROLLOUT_STEPS = 2.0
"""A rollout counts as so many steps in the time that is left: 0.5 s and 0.22 s with the demo's model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The steps and rollouts of a cell."""

    steps: int
    rollouts: int

    @property
    def units(self) -> float:
        """The whole, in steps."""
        return self.steps + ROLLOUT_STEPS * self.rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Steps and rollouts done."""

    step: int
    rollouts: int
    work: Work

    @property
    def stage(self) -> Literal["training", "evaluating"]:
        """What it does now."""
        return "training" if self.step < self.work.steps else "evaluating"

    @property
    def units(self) -> float:
        """What is done, in steps."""
        return self.step + ROLLOUT_STEPS * self.rollouts

    @property
    def text(self) -> str:
        """As "training 640/1300"."""
        if self.stage == "training":
            return f"training {self.step}/{self.work.steps}"
        return f"evaluating {self.rollouts}/{self.work.rollouts}"


def work_of(config: RunConfig) -> Work:
    """What the cell of this config has to do."""
    settings = config.evaluation
    tasks = settings.tasks
    if tasks == "suite":
        own = settings.suite == config.record.suite
        tasks = (config.record.spec if own else find_suite(settings.suite)).tasks
    return Work(steps=config.training.steps, rollouts=len(tasks) * settings.episodes)


def standing(folder: Path, work: Work) -> Standing:
    """How far the run in `folder` is; a folder that does not exist yet stands at 0."""
    played = sum(1 for _ in (folder / "evaluation" / "policy").glob("*/*.json"))
    return Standing(
        step=work.steps if played else min(_last_step(folder / "records.jsonl"), work.steps),
        rollouts=min(played, work.rollouts),
        work=work,
    )


def _last_step(path: Path) -> int:
    """The step of the last whole line; 0 where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
