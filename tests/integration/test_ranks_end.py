"""What a training on several processes leaves behind when it has ended: hardly a thread of its messages."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.ranks import PATIENCE
from fixtures.ranks_training import train
from tutti.distributed.world import process_group

TASKS = Path("/proc/self/task")
THREAD = "pt_gloo_runloop"
"""Name of the threads of a gloo process group, two for each group."""


def threads() -> int:
    return sum((task / "comm").read_text().strip() == THREAD for task in TASKS.iterdir())


def rank_of_its_own(rank: int, port: int, run: str, kind: str, found: Any) -> None:
    """As torchrun starts it: the process group is the training's own."""
    torch.set_num_threads(1)
    meeting = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in meeting.items()})
    with process_group(2, torch.device("cpu"), 60.0):
        train(run, {"steps": 3, "parallel": {"kind": kind}})
        inside = threads()
    found.put((inside, threads()))


@pytest.mark.skipif(not TASKS.exists(), reason="counts the threads in /proc")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_threads_of_the_groups_end_with_the_training(kind: str, tmp_path: Path) -> None:
    """One that lets go of a tensor while Python shuts down aborts the process."""
    context = multiprocessing.get_context("forkserver")
    found: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=rank_of_its_own, args=(rank, port, str(tmp_path), kind, found))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    counts = [found.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join(timeout=30.0)
        assert process.exitcode == 0
    for inside, after in counts:
        assert inside >= 6
        assert after <= 2  # the first group, by which DTensor remembers the mesh; it is long idle
