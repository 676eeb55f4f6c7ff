"""Progress of a study: how far each running cell is, the totals, and the time left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tutti.config.run_config import RunConfig
from tutti.report.formatting import duration
from tutti.runs.build import suite_of
from tutti.runs.terminal import console, print_line
from tutti.studies.cells import Cell

LINE_SECONDS = 60.0
"""Seconds between lines where the output is no terminal."""
ROLLOUT_STEPS = 2.0
"""A rollout counts as so many steps in the time left: 0.5 s and 0.22 s with the demo's model."""
TAIL = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Training steps and rollouts of a cell: all of them, or those that are done."""

    steps: int
    rollouts: int

    @property
    def units(self) -> float:
        """Both together, in steps."""
        return self.steps + ROLLOUT_STEPS * self.rollouts

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The work of a whole cell."""
        settings = config.evaluation
        tasks = suite_of(config).tasks if settings.tasks == "suite" else settings.tasks
        return cls(steps=config.training.steps, rollouts=len(tasks) * settings.episodes)

    def done_in(self, folder: Path) -> Work:
        """What is done of this work in the folder of the cell, by its records and rollouts."""
        rollouts = sum(1 for _ in (folder / "evaluation" / "policy").glob("*/*.json"))
        steps = self.steps if rollouts else min(_last_step(folder / "records.jsonl"), self.steps)
        return Work(steps=steps, rollouts=min(rollouts, self.rollouts))

    def text(self, done: Work) -> str:
        """As "training 640/1300" or "evaluating 12/80"."""
        if done.steps < self.steps:
            return f"training {done.steps}/{self.steps}"
        return f"evaluating {done.rollouts}/{self.rollouts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Started:
    """When a cell was started in this session, and the units that were done before."""

    moment: float
    units: float


class StudyProgress:
    """Totals and running cells: a live table on a terminal, else a line at each end and each minute."""

    def __init__(
        self, work: Mapping[Cell, Work], finished_before: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`work` of the cells to run; `finished_before` more have a result already."""
        self.work, self.finished_before = dict(work), finished_before
        self.finished = self.failed = 0
        self._clock = clock
        self._started: dict[Cell, _Started] = {}
        self._ended: set[Cell] = set()
        self._ended_units = 0.0  # done in this session by cells that have ended
        self._begin = self._last_line = clock()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, cell: Cell) -> None:
        """The process of a cell was started."""
        done = self.work[cell].done_in(cell.folder)
        self._started[cell] = _Started(moment=self._clock(), units=done.units)

    def end(self, cell: Cell, failure: str = "") -> None:
        """The process of a cell has ended; it has a result unless `failure` is given."""
        started = self._started[cell]
        seconds = duration(self._clock() - started.moment)
        self._ended.add(cell)
        if failure:
            self.failed += 1
            print_line(f"{cell.name}: FAILED after {seconds}")
            return
        self.finished += 1
        self._ended_units += self.work[cell].units - started.units
        print_line(f"{cell.name}: done in {seconds} ({self.totals({})})")

    def show(self, running: Sequence[Cell]) -> None:
        """Shows how far the running cells are."""
        done = {cell: self.work[cell].done_in(cell.folder) for cell in running}
        if self._live is not None:
            self._live.update(self._table(done), refresh=True)
        elif running and self._clock() - self._last_line >= LINE_SECONDS:
            self._last_line = self._clock()
            each = "; ".join(f"{cell.name}: {self.work[cell].text(now)}" for cell, now in done.items())
            print_line(f"{self.totals(done)}. {each}")

    def totals(self, running: Mapping[Cell, Work]) -> str:
        """As "12 of 30 done, 1 failed, 2 running, 1 h 12 min left"; `running` has what each has done."""
        parts = [f"{self.finished_before + self.finished} of {self.finished_before + len(self.work)} done"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{len(running)} running"] if running else []
        left = self.seconds_left(running)
        return ", ".join([*parts, *([f"{duration(left)} left"] if left else [])])

    def seconds_left(self, running: Mapping[Cell, Work]) -> float | None:
        """At the pace of this session; None before anything has moved."""
        elapsed = self._clock() - self._begin
        done = self._ended_units + sum(now.units - self._started[cell].units for cell, now in running.items())
        ahead = sum(work.units for cell, work in self.work.items() if cell not in self._ended)
        ahead -= sum(now.units for now in running.values())
        return ahead * elapsed / done if done > 0 and elapsed > 0 else None

    def _table(self, running: Mapping[Cell, Work]) -> Table:
        table = Table.grid(padding=(0, 2))
        for cell, now in running.items():
            started, work = self._started[cell], self.work[cell]
            done = now.units - started.units
            left = (work.units - now.units) * (self._clock() - started.moment) / done if done > 0 else None
            bar = ProgressBar(total=work.units, completed=now.units, width=24)
            table.add_row(
                cell.name, work.text(now), bar, f"{duration(left)} left" if left is not None else ""
            )
        table.add_row(self.totals(running))
        return table


def _last_step(path: Path) -> int:
    """The step of the last complete line; 0 where there is none."""
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
