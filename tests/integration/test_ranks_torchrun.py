"""`tutti train` under torchrun: one command, two processes; one of them killed, the same bytes at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recorded

from fixtures.ranks import on_ranks
from fixtures.run_equality import records
from tutti import pipeline
from tutti.config.run_config import load_config
from tutti.storage.checkpoint import checkpoints, load
from tutti.training.records import read_records

ROOT = Path(__file__).resolve().parents[2]

SMOKE = ROOT / "configs" / "smoke.yaml"
SETTINGS = [
    *("training.steps=12", "training.checkpoints={every: 4, keep: 4}", "training.validation.every=6"),
    *(
        "training.log_every=1",
        "training.threads=1",
        "training.device=cpu",
        "data.augmentation={kind: colour}",
    ),
]
MARK = "TUTTI_TEST_RUN"


def train(run: str, overrides: list[str]) -> None:
    pipeline.train(load_config(SMOKE, overrides), Path(run))


def start(run: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """The same under torchrun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", str(port), "-m", "--", "tutti", "train", str(SMOKE), *overrides]
    command += ["--run", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", MARK: str(run)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)  # pyright: ignore[reportCallIssue, reportArgumentType]


def second_process(run: Path) -> int | None:
    """The process of rank 1 of this run."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{MARK}={run}".encode() in environment and b"LOCAL_RANK=1" in environment:
                return int(entry.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process in /proc")
def test_a_killed_rank_is_started_anew_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    data, straight, killed = (tmp_path / name for name in ("data", "straight", "killed"))
    recorded.synthetic_run(data, load_config(SMOKE, SETTINGS), per_task=4, length=24)
    overrides = [*SETTINGS, f"data.sources=[{{path: {data / 'dataset'}}}]"]
    on_ranks(2, train, str(straight), overrides)

    process = start(killed, overrides)
    deadline = time.monotonic() + 200
    while not (checkpoints(killed) and read_records(killed)[-1]["step"] >= 5):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim = second_process(killed)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "ddp over 2 processes" in output and "resuming after step" in output
    assert output.count("training on device cpu") == 2  # at each start one of the two speaks

    one, other = (load(checkpoints(run)[-1]) for run in (straight, killed))
    assert one.step == other.step == 12
    for name, own in one.tensors.items():
        for key, value in own.items():
            assert value.equal(other.tensors[name][key]), (name, key)
    assert one.state["loader"] == other.state["loader"]
    assert records(straight) == records(killed)
