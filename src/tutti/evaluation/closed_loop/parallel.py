"""Runs jobs in this process, or in several spawned ones that each use one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from tutti.distributed.cores import usable_cores
from tutti.suites.workers import Job, Result, run_jobs

MAX_WORKERS = 8


def in_parallel(
    function: Callable[[Job], Result],
    jobs: list[Job],
    workers: int | Literal["auto"],
    take: Callable[[list[Job], int], Job] = lambda left, worker: left.pop(0),
) -> Iterator[Result]:
    """The result of each job as it ends; `take` chooses a worker's next job and takes it off the list.

    "auto" is one worker for each core that this process may use, at most 8 (each takes about 0.7 GB). One
    works in this process. Raises: as `run_jobs`.
    """
    left = list(jobs)
    count = min(min(usable_cores(), MAX_WORKERS) if workers == "auto" else workers, len(left))
    spawned = count if count > 1 else 0
    for _, result in run_jobs(function, spawned, lambda worker: take(left, worker) if left else None):
        yield result
