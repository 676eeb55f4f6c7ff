"""Runs the cells of a study in parallel, each in its own process; a failed one does not stop the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tutti.distributed.cores import usable_cores
from tutti.runs.terminal import print_line
from tutti.studies.cells import Cell
from tutti.studies.status import StudyProgress

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
LOG = "output.log"
LAST_LINES = 12
POLL, GRACE = 0.5, 60.0
"""Seconds between polls of the processes, and seconds that an interrupted one may take to save."""

Command = Callable[[Cell], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A cell that ended without a result, and the end of its log."""

    cell: Cell
    code: int
    log_end: str

    @property
    def text(self) -> str:
        """A message: which cell, how it ended, the end of its log."""
        how = f"killed by signal {-self.code}" if self.code < 0 else f"exit {self.code}"
        return f"{self.cell.name} ({how}); the end of {self.cell.folder / LOG}:\n{self.log_end}"


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
) -> list[Failure]:
    """Runs the cells in order, `jobs` at a time. Returns those that failed, after all others were tried.

    Ctrl-C interrupts the running ones, waits until they have saved, and is raised again; a second one kills
    them. Should this process die, theirs end with it.
    """
    waiting = deque(cells)
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    failures: list[Failure] = []
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
                del running[cell]
                _close(process)
                failure = None if code == 0 and cell.result() else _failure(cell, code)
                progress.end(cell, failure.text if failure else "")
                failures += [failure] if failure else []
            progress.show(list(running))
            if running:
                time.sleep(poll)
    finally:
        _stop(running, grace)
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


def _stop(running: dict[Cell, subprocess.Popen[bytes]], grace: float) -> None:
    if not running:
        return
    several = (
        f"{len(running)} running cells; each saves" if len(running) > 1 else "the running cell; it saves"
    )
    print_line(f"stopping {several} where it is (Ctrl-C again kills)")
    for process in running.values():
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    end = time.monotonic() + grace
    try:
        for process in running.values():
            process.wait(timeout=max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    for process in running.values():
        process.kill()
        process.wait()
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _failure(cell: Cell, code: int) -> Failure:
    try:
        lines = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return Failure(cell=cell, code=code, log_end="\n".join(lines[-LAST_LINES:]))
