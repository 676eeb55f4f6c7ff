"""A pool of spawned worker processes: reports errors in full, ends with its parent, stops cleanly.

`multiprocessing.Pool` hangs when a worker is killed; `ProcessPoolExecutor` cannot say which worker gets a
job, and here a worker that keeps its task saves the time to build another simulation.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any, Self

from tutti.errors import UserError


class WorkerError(RuntimeError):
    """A worker failed; the message holds its traceback."""


def spawn_context() -> SpawnContext:
    """The way to start every process that renders: `spawn`, never `fork`.

    A process forked while an OpenGL context is open inherits the driver's locks and hangs.
    """
    return multiprocessing.get_context("spawn")


class Workers:
    """`count` processes that each run `function(job)` for one job after another.

    `function` and the jobs are pickled: `function` must be importable by name. Use as a context manager:
    on leaving, workers are told to end; on an exception or an interrupt they are terminated.
    """

    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        context = spawn_context()
        self._pipes: list[Any] = []
        self._processes = []
        self._busy: set[int] = set()
        with _interrupts_ignored():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    @property
    def idle(self) -> tuple[int, ...]:
        """The numbers of the workers without a job."""
        return tuple(worker for worker in range(len(self._pipes)) if worker not in self._busy)

    def start(self, worker: int, job: Any) -> None:
        """Gives an idle worker a job."""
        assert worker not in self._busy
        self._busy.add(worker)
        # A worker that has died is reported by `finished`, which can name its exit code.
        with contextlib.suppress(BrokenPipeError):
            self._pipes[worker].send(job)

    def finished(self) -> Iterator[tuple[int, Any]]:
        """Waits until a job is done; gives (worker, result) for all that are.

        Raises:
            UserError: a worker raised one.
            WorkerError: a worker raised anything else, or died.
        """
        pipes: dict[Any, int] = {self._pipes[worker]: worker for worker in sorted(self._busy)}
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]
            try:
                kind, value = self._pipes[worker].recv()
            except (EOFError, ConnectionResetError):
                raise WorkerError(self._exit_message(worker)) from None
            if kind == "user_error":
                raise UserError(value)
            if kind == "error":
                raise WorkerError(f"A worker process failed:\n{value}")
            self._busy.discard(worker)
            yield worker, value

    def run(self, next_job: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        """Gives each idle worker `next_job(worker)` until that is None and all are done.

        Yields (worker, result) as jobs end. Raises: as `finished`.
        """
        while True:
            for worker in self.idle:
                if (job := next_job(worker)) is None:
                    break
                self.start(worker, job)
            if not self._busy:
                return
            yield from self.finished()

    def close(self, *, kill: bool = False) -> None:
        """Ends all workers: when they are done with their jobs, or now."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kill:
                process.terminate()
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(kill=kind is not None)

    def _exit_message(self, worker: int) -> str:
        process = self._processes[worker]
        process.join(timeout=5)
        cause = ""
        if process.exitcode == -signal.SIGKILL:
            cause = " It was killed, most often because memory ran out: use fewer workers."
        return f"Worker process {process.pid} died with exit code {process.exitcode}.{cause}"


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """What a worker does: jobs until the pipe is closed, which also happens when the parent is gone."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A closed pipe at any moment means that nobody waits for us.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = pipe.recv()
            pipe.send(_run(function, job))


def _run(function: Callable[[Any], Any], job: Any) -> tuple[str, Any]:
    try:
        return "result", function(job)
    except UserError as error:
        return "user_error", str(error)
    except Exception:
        return "error", traceback.format_exc()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Children inherit this, so Ctrl-C reaches the parent alone, which then ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
