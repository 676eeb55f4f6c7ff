"""Runs jobs in this process, or in several spawned ones that each use one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from tutti.distributed.cores import usable_cores
from tutti.suites.workers import Workers

MAX_WORKERS = 8
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables of a process that shall use one thread; its libraries read them at import."""
Job = TypeVar("Job")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Job], Result],
    jobs: list[Job],
    workers: int | Literal["auto"],
    take: Callable[[list[Job], int], Job] = lambda left, worker: left.pop(0),
) -> Iterator[Result]:
    """The result of each job as it ends; `take` chooses a worker's next job and takes it off the list.

    "auto" is one worker for each core that this process may use, at most 8 (each takes about 0.7 GB). One
    works in this process. Raises: as `Workers.finished`.
    """
    left = list(jobs)
    count = min(min(usable_cores(), MAX_WORKERS) if workers == "auto" else workers, len(left))
    if count <= 1:
        while left:
            yield function(take(left, 0))
        return
    with _variables(ONE_THREAD):
        pool = Workers(function, count)
    with pool:
        for _, result in pool.run(lambda worker: take(left, worker) if left else None):
            yield result


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables inside the block, which processes started there inherit."""
    before = {key: os.environ[key] for key in values if key in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for key in values:
            del os.environ[key]
        os.environ.update(before)
