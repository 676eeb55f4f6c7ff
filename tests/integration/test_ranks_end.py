"""How processes of a training end: with hardly a thread of their messages left, or told what they hang in."""

from __future__ import annotations

import multiprocessing
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from fixtures.ranks import HOST, PATIENCE, on_ranks
from fixtures.ranks_training import train
from tutti.distributed.ranks import current_ranks
from tutti.distributed.world import process_group

TASKS = Path("/proc/self/task")
THREAD = "pt_gloo_runloop"
"""Name of the threads of a gloo process group, two for each group."""


def threads() -> int:
    return sum((task / "comm").read_text().strip() == THREAD for task in TASKS.iterdir())


def rank_of_its_own(rank: int, port: int, run: str, kind: str, found: Any) -> None:
    """As torchrun starts it: the process group is the training's own."""
    torch.set_num_threads(1)
    meeting = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": HOST, "MASTER_PORT": port}
    meeting["TORCHELASTIC_USE_AGENT_STORE"] = True
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
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=rank_of_its_own, args=(rank, store.port, str(tmp_path), kind, found))
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


def reads_a_torn_file(folder: str) -> str:
    """Rank 1 spins for ever in C++, outside of Python's lock; the store's time-out does not end it."""
    if current_ranks().first:
        return "answered"
    path = Path(folder, "store")
    store = dist.FileStore(str(path), 2)
    store.set_timeout(timedelta(seconds=0.1))
    store.set("key", "value")
    os.truncate(path, 3)
    store.get("another key")
    raise AssertionError("FileStore has a time-out now")


@pytest.mark.skipif(not TASKS.exists(), reason="what a process does is in /proc")
def test_of_a_rank_that_does_not_answer_the_error_says_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(2, os.getpid)  # started, so that the patience below is for the job alone
    monkeypatch.setattr("fixtures.ranks.PATIENCE", 3.0)
    with pytest.raises(AssertionError) as caught:
        on_ranks(2, reads_a_torn_file, str(tmp_path))
    said = str(caught.value)
    assert said.startswith("only ranks [0] of 2 answered\nrank 1: ") and "rank 0:" not in said
    assert "in reads_a_torn_file" in said  # the stack of Python
    assert "FileStore" in said.partition("its stacks:")[2].partition("libtorch_cpu.so")[2]  # and of C++
    now = re.search(r"CPU seconds, (\S+) of them within the last 0.50 s", said)
    assert now is not None and float(now[1]) > 0.0
