"""Runs jobs in spawned worker processes: reports errors in full, ends with its parent, stops cleanly.

`multiprocessing.Pool` hangs when a worker is killed; `ProcessPoolExecutor` cannot say which worker gets a
job, and here a worker that keeps its task saves the time to build another simulation.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from tutti.errors import UserError

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables of a worker, which shall use one thread; its libraries read them at import."""
Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerError(RuntimeError):
    """A worker failed; the message holds its traceback."""


def run_jobs(
    function: Callable[[Job], Result], count: int, next_job: Callable[[int], Job | None]
) -> Generator[tuple[int, Result], None, None]:
    """Gives each idle one of `count` workers the job `next_job(worker)` until that is None and all are done.

    Yields (worker, function(job)) as jobs end; a count of 0 runs them in this process, as worker 0.
    `function` and the jobs are pickled: `function` must be importable by name. Workers are told to end when
    all is done, and terminated on an exception or an interrupt, or if the iterator is closed before.

    Raises:
        UserError: a worker raised one.
        WorkerError: a worker raised anything else, or died.
    """
    if count == 0:
        while (job := next_job(0)) is not None:
            yield 0, function(job)
        return
    with _started(function, count) as processes:
        pipes = list(processes)
        busy: set[int] = set()
        while True:
            for worker in sorted(set(range(count)) - busy):
                if (job := next_job(worker)) is None:
                    continue
                busy.add(worker)
                # A worker that has died is reported below, where its exit code can be named.
                with contextlib.suppress(BrokenPipeError):
                    pipes[worker].send(job)
            if not busy:
                return
            for pipe in wait([pipes[worker] for worker in sorted(busy)]):
                worker = pipes.index(pipe)
                try:
                    kind, value = pipes[worker].recv()
                except (EOFError, ConnectionResetError):
                    raise WorkerError(_exit_message(processes[pipes[worker]])) from None
                if kind == "user_error":
                    raise UserError(value)
                if kind == "error":
                    raise WorkerError(f"A worker process failed:\n{value}")
                busy.discard(worker)
                yield worker, value


@contextlib.contextmanager
def _started(function: Callable[[Any], Any], count: int) -> Iterator[dict[Any, SpawnProcess]]:
    """Processes by our ends of their pipes.

    They are spawned, never forked: a process forked while an OpenGL context is open inherits the driver's
    locks and hangs.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, SpawnProcess] = {}
    try:
        with _inherited():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
        yield processes
    except BaseException:
        for process in processes.values():
            process.terminate()
        raise
    finally:
        for pipe in processes:
            pipe.close()
        for process in processes.values():
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
                process.join()


def _exit_message(process: SpawnProcess) -> str:
    process.join(timeout=5)
    killed = process.exitcode == -signal.SIGKILL
    cause = " It was killed, most often because memory ran out: use fewer workers." if killed else ""
    return f"Worker process {process.pid} died with exit code {process.exitcode}.{cause}"


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """What a worker does: jobs until the pipe is closed, which also happens when the parent is gone."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A closed pipe at any moment means that nobody waits for us.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = pipe.recv()
            try:
                answer = ("result", function(job))
            except UserError as error:
                answer = ("user_error", str(error))
            except Exception:
                answer = ("error", traceback.format_exc())
            pipe.send(answer)


@contextlib.contextmanager
def _inherited() -> Iterator[None]:
    """What processes that start inside the block inherit: `ONE_THREAD`, and that Ctrl-C is not for them.

    It reaches the parent alone, which then ends them.
    """
    before = {key: os.environ[key] for key in ONE_THREAD if key in os.environ}
    os.environ.update(ONE_THREAD)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        for key in ONE_THREAD:
            del os.environ[key]
        os.environ.update(before)
