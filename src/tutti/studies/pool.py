"""Runs the cells of a study in parallel, each in its own process, and shows how far they are.

A failed cell does not stop the others. What is done is read from a cell's records and rollouts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tutti.config.run_config import RunConfig
from tutti.distributed.cores import usable_cores
from tutti.report.formatting import duration
from tutti.runs.build import suite_of
from tutti.runs.terminal import console, print_line
from tutti.studies.cells import Cell
from tutti.suites.workers import ONE_THREAD

LOG = "output.log"
LAST_LINES = 12
POLL, GRACE = 0.5, 60.0
"""Seconds between polls of the processes, and seconds that an interrupted one may take to save."""
LINE_SECONDS = 60.0
"""Seconds between lines where the output is no terminal."""
ROLLOUT_STEPS = 2.0
"""A rollout counts as so many steps in the time left: 0.5 s and 0.22 s with the demo's model."""
TAIL = 16_384

Command = Callable[[Cell], list[str]]


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


class StudyProgress:
    """Totals and running cells: a live table on a terminal, else a line at each end and each minute."""

    def __init__(
        self, work: Mapping[Cell, Work], finished_before: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`work` of the cells to run; `finished_before` more have a result already."""
        self.work, self.whole = dict(work), finished_before + len(work)
        self.finished, self.failed = finished_before, 0
        self._clock = clock
        self._started: dict[Cell, tuple[float, float]] = {}  # when, and the units that were done before
        self._ahead = sum(one.units for one in work.values())  # of cells that have not ended
        self._gained = 0.0  # in this session, by cells that have ended
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
        self._started[cell] = self._clock(), self.work[cell].done_in(cell.folder).units

    def end(self, cell: Cell, *, failed: bool) -> None:
        """The process of a cell has ended."""
        (moment, before), units = self._started[cell], self.work[cell].units
        seconds = duration(self._clock() - moment)
        self._ahead -= units
        if failed:
            self.failed += 1
            print_line(f"{cell.name}: FAILED after {seconds}")
            return
        self.finished += 1
        self._gained += units - before
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
        parts = [f"{self.finished} of {self.whole} done"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{len(running)} running"] if running else []
        left = self.seconds_left(running)
        return ", ".join([*parts, *([f"{duration(left)} left"] if left else [])])

    def seconds_left(self, running: Mapping[Cell, Work]) -> float | None:
        """At the pace of this session; None before anything has moved."""
        elapsed, now = self._clock() - self._begin, sum(done.units for done in running.values())
        gained = self._gained + now - sum(self._started[cell][1] for cell in running)
        return (self._ahead - now) * elapsed / gained if gained > 0 and elapsed > 0 else None

    def _table(self, running: Mapping[Cell, Work]) -> Table:
        table = Table.grid(padding=(0, 2))
        for cell, now in running.items():
            (moment, before), work = self._started[cell], self.work[cell]
            gained, left = now.units - before, ""
            if gained > 0:
                left = f"{duration((work.units - now.units) * (self._clock() - moment) / gained)} left"
            bar = ProgressBar(total=work.units, completed=now.units, width=24)
            table.add_row(cell.name, work.text(now), bar, left)
        table.add_row(self.totals(running))
        return table


def _last_step(path: Path) -> int:
    """The step of the last complete line; 0 where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def own_command(cell: Cell) -> list[str]:
    """The command that runs a cell in its own process."""
    return [sys.executable, "-m", "tutti.studies.run_cell", str(cell.folder), "--attached"]


def number_of_jobs(jobs: int | Literal["auto"], cells: int) -> int:
    """ "auto" is one for each core that this process may use, never more than there are cells."""
    return max(1, min(usable_cores() if jobs == "auto" else jobs, cells))


def run_cells(
    cells: Sequence[Cell],
    jobs: int,
    progress: StudyProgress,
    *,
    command: Command = own_command,
    poll: float = POLL,
    grace: float = GRACE,
) -> list[str]:
    """Runs the cells in order, `jobs` at a time. Returns a message for each that failed, after all others
    were tried: which cell, how it ended, the end of its log.

    Ctrl-C interrupts the running ones, waits until they have saved, and is raised again; a second one kills
    them. Should this process die, theirs end with it.
    """
    waiting = deque(cells)
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    failures: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                progress.start(cell)
                with _defer_interrupt():  # a process that runs must be among those that are stopped
                    running[cell] = _start(cell, command(cell))
            for cell, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                running.pop(cell).communicate()  # closes its standard input
                failed = code != 0 or cell.result() is None
                progress.end(cell, failed=failed)
                failures += [_failure(cell, code)] if failed else []
            progress.show(list(running))
            if running:
                time.sleep(poll)
    finally:
        _stop(list(running.values()), grace)
    return failures


@contextmanager
def _defer_interrupt() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block. Python delivers it to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)  # None: set by C code
        if asked:
            signal.raise_signal(signal.SIGINT)


def _start(cell: Cell, command: list[str]) -> subprocess.Popen[Any]:
    """Starts a process in its own session: Ctrl-C reaches it only through `_stop`. It writes a log."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ONE_THREAD,
            start_new_session=True,
        )


def _stop(running: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    if not running:
        return
    several = f"{len(running)} running cells; each" if len(running) > 1 else "the running cell; it"
    print_line(f"stopping {several} saves where it is (Ctrl-C again kills)")
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    end = time.monotonic() + grace
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in running:
            process.wait(timeout=max(0.0, end - time.monotonic()))
    for process in running:
        process.kill()
        process.communicate()


def _failure(cell: Cell, code: int) -> str:
    how = f"killed by signal {-code}" if code < 0 else f"exit {code}"
    log, lines = cell.folder / LOG, list[str]()
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"{cell.name} ({how}); the end of {log}:", *lines[-LAST_LINES:]])
