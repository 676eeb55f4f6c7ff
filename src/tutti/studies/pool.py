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
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

from tutti.config.run_config import RunConfig
from tutti.distributed.cores import usable_cores
from tutti.report.formatting import duration
from tutti.runs.build import suite_of
from tutti.runs.terminal import Bar, print_line
from tutti.storage.reading import open_plain
from tutti.studies.cells import Cell
from tutti.suites.workers import ONE_THREAD
from tutti.types import UserError

LOG = "output.log"
LAST_LINES = 12
POLL, GRACE = 0.5, 60.0
"""Seconds between polls of the processes, and seconds that an interrupted one may take to save."""
ROLLOUT_STEPS = 2.0
"""A rollout counts as so many steps in the time left: 0.5 s and 0.22 s with the demo's model."""
TAIL = 16_384


@runtime_checkable
class Job(Protocol):
    """What runs in a process of its own: its folder, how it is called, and its result once it is finished."""

    @property
    def folder(self) -> Path: ...

    @property
    def name(self) -> str: ...

    def result(self) -> object | None: ...


J = TypeVar("J", bound=Job)
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
        if done.steps < self.steps or not self.rollouts:
            return f"training {done.steps}/{self.steps}"
        return f"evaluating {done.rollouts}/{self.rollouts}"


def _last_step(path: Path) -> int:
    """The step of the last complete line; 0 where there is none."""
    try:
        with open_plain(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read(TAIL).splitlines()
    except (OSError, UserError):
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def own_command(cell: Job, module: str = "tutti.studies.run_cell") -> list[str]:
    """The command that runs a cell in its own process, by this module."""
    return [sys.executable, "-m", module, str(cell.folder), "--attached"]


def number_of_jobs(jobs: int | Literal["auto"], cells: int) -> int:
    """ "auto" is one for each core that this process may use, never more than there are cells."""
    return max(1, min(usable_cores() if jobs == "auto" else jobs, cells))


def run_cells(
    work: Mapping[J, Work],
    jobs: int,
    bar: Bar,
    *,
    command: Callable[[J], list[str]] = own_command,
    poll: float = POLL,
    grace: float = GRACE,
) -> list[str]:
    """Runs the cells in order, `jobs` at a time. Returns a message for each that failed, after all others
    were tried: which cell, how it ended, the end of its log.

    `work` has all that each cell has to do. `bar` is moved by what is done since the start, and says how far
    each running cell is. Ctrl-C interrupts the running ones, waits until they have saved, and is raised
    again; a second one kills them. Should this process die, theirs end with it.
    """
    waiting, ended = deque(work), list[J]()
    running: dict[J, tuple[subprocess.Popen[bytes], float]] = {}
    failures: list[str] = []
    before = {cell: one.done_in(cell.folder).units for cell, one in work.items()}
    total = sum(one.units - before[cell] for cell, one in work.items())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                with _defer_interrupt():  # a process that runs must be among those that are stopped
                    running[cell] = _start(cell, command(cell)), time.monotonic()
            for cell, (process, started) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                process.communicate()  # closes its standard input
                del running[cell]
                ended.append(cell)
                failed = code != 0 or cell.result() is None
                failures += [_failure(cell, code)] if failed else []
                how = "FAILED after" if failed else "done in"
                print_line(f"{cell.name}: {how} {duration(time.monotonic() - started)}")
            now = {cell: work[cell].done_in(cell.folder) for cell in running}
            gained = sum(one.units - before[cell] for cell, one in now.items())
            gained += sum(work[cell].units - before[cell] for cell in ended)
            each = [f"{cell.name}: {work[cell].text(one)}" for cell, one in now.items()]
            bar(round(gained), round(total), "; ".join([f"{len(ended)} of {len(work)} cells ended", *each]))
            if running:
                time.sleep(poll)
    finally:
        _stop([process for process, _ in running.values()], grace)
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


def _start(cell: Job, command: list[str]) -> subprocess.Popen[Any]:
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


def _failure(cell: Job, code: int) -> str:
    how = f"killed by signal {-code}" if code < 0 else f"exit {code}"
    log, lines = cell.folder / LOG, list[str]()
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"{cell.name} ({how}); the end of {log}:", *lines[-LAST_LINES:]])
