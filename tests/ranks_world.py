"""Several processes that make up one training on gloo, for the tests: forked from a server that has torch."""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tutti.distributed.ranks import sharing
from tutti.distributed.world import joined, world

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "ranks_training", "pytest"])
"""torch._dynamo is what the first optimizer of a process would import, in seconds."""

PATIENCE = 110.0
"""Seconds for all ranks to answer: several times what the slowest test takes beside other work."""


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """What `function(*arguments)` gives on each of `count` ranks, which share batches.

    An error of a rank is raised here, with its traceback. Ranks that do not answer are started once more, and
    that is said: four processes of gloo on two cores were once seen to spin for ever outside of Python.
    """
    found = _answers(count, timeout, function, arguments)
    if len(found) < count and all(good for good, _ in found.values()):
        warnings.warn(f"only ranks {sorted(found)} of {count} answered; started once more", stacklevel=2)
        found = _answers(count, timeout, function, arguments)
    for rank in sorted(found):
        good, value = found[rank]
        if not good:
            raise AssertionError(f"rank {rank}: {value}")
    assert len(found) == count, f"only ranks {sorted(found)} of {count} answered within {PATIENCE} s"
    return [torch.load(io.BytesIO(found[rank][1]), weights_only=False) for rank in range(count)]


def _answers(
    count: int, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> dict[int, tuple[bool, Any]]:
    """What came within PATIENCE from ranks that are started and ended here."""
    found: dict[int, tuple[bool, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        results: Any = _context.Queue()
        store = str(Path(folder) / "store")
        processes = [
            _context.Process(target=_rank, args=(rank, count, store, results, timeout, function, arguments))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + PATIENCE
        try:
            while len(found) < count:
                rank, answer = results.get(timeout=max(0.01, end - time.monotonic()))
                found[rank] = answer
        except queue.Empty:
            pass
        finally:
            for process in processes:
                process.join(timeout=10.0 if len(found) == count else 0.1)
                if process.is_alive():
                    process.kill()
    return found


def _rank(rank: int, count: int, store: str, *given: Any) -> None:
    results, timeout, function, arguments = given
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        with joined(count, torch.device("cpu"), timeout), sharing(world().ranks):
            value = function(*arguments)
        buffer = io.BytesIO()  # plain bytes: tensors would be shared by a process that has ended
        torch.save(value, buffer)
        results.put((rank, (True, buffer.getvalue())))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
    results.close()
    results.join_thread()
    os._exit(0)  # whatever another rank does, this one ends
