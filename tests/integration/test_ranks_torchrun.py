"""`tutti train` under torchrun: one command, two processes; one of them killed, or their launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import recorded
import torch

from fixtures.ranks import on_ranks
from fixtures.run_equality import equal, records
from fixtures.torchrun import MARK, ROOT, start
from tutti import pipeline
from tutti.config.run_config import load_config
from tutti.distributed import world
from tutti.storage.checkpoint import checkpoints, load
from tutti.training.records import read_records

SMOKE = ROOT / "configs" / "smoke.yaml"
ALWAYS = [
    *("training.validation.every=6", "training.log_every=1", "training.threads=1", "training.device=cpu"),
    "data.augmentation={kind: colour}",
]
SETTINGS = [*ALWAYS, "training.steps=12", "training.checkpoints={every: 4, keep: 4}"]
ENDLESS = [*ALWAYS, "training.steps=100000", "training.checkpoints.every=0"]
in_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


def train(run: str, overrides: list[str]) -> None:
    pipeline.train(load_config(SMOKE, overrides), Path(run))


def ranks_of(run: Path) -> dict[int, int]:
    """The process of each rank of this run that is alive."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")  # empty of one that has ended
            except OSError:
                continue
            if f"{MARK}={run}".encode() in environment:
                found |= {rank: int(entry.name) for rank in (0, 1) if b"LOCAL_RANK=%d" % rank in environment}
    return found


def wait_until(happened: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@in_proc
def test_a_killed_rank_is_started_anew_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    data, straight, killed = (tmp_path / name for name in ("data", "straight", "killed"))
    recorded.synthetic_run(data, load_config(SMOKE, SETTINGS), per_task=4, length=24)
    overrides = [*SETTINGS, f"data.sources=[{{path: {data / 'dataset'}}}]"]
    on_ranks(2, train, str(straight), overrides)

    process = start(SMOKE, killed, overrides)
    wait_until(lambda: checkpoints(killed) and read_records(killed)[-1]["step"] >= 5, 200)
    os.kill(ranks_of(killed)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "ddp over 2 processes" in output and "resuming after step" in output
    assert output.count("training on device cpu") == 2  # at each start one of the two speaks

    one, other = (load(checkpoints(run)[-1]) for run in (straight, killed))
    assert one.step == other.step == 12
    for name, own in one.tensors.items():
        for key, value in own.items():
            assert equal(value, other.tensors[name][key]), (name, key)
    assert one.state["loader"] == other.state["loader"]
    assert records(straight) == records(killed)


@pytest.mark.slow
@in_proc
def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    data, starting, training = (tmp_path / name for name in ("data", "starting", "training"))
    recorded.synthetic_run(data, load_config(SMOKE, SETTINGS), per_task=4, length=24)
    overrides = [*ENDLESS, f"data.sources=[{{path: {data / 'dataset'}}}]"]

    def watched() -> bool:  # a second thread, long before torch is there
        return len(found := ranks_of(starting)) == 2 and all(
            len(list(Path(f"/proc/{pid}/task").iterdir())) > 1 for pid in found.values()
        )

    for run, begun in ((starting, watched), (training, lambda: len(read_records(training)) > 1)):
        launcher = start(SMOKE, run, overrides)
        wait_until(begun, 200)
        launcher.kill()
        said, _ = launcher.communicate(timeout=60)  # its output ends with the last process that writes to it
        wait_until(lambda run=run: not ranks_of(run), 5)
        # The rank that sees it first tells the other, which may end before its own look, a second apart.
        assert said.count(f"the launcher (process {launcher.pid}) is gone") in (1, 2)
    assert not checkpoints(starting)
    (saved,) = checkpoints(training)  # after the step that it was in
    assert load(saved).step >= read_records(training)[-1]["step"] > 0
    assert "SIGTERM: ended after step" in said


def test_a_launcher_that_was_gone_before_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens there
        where = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(world, "CONNECT_SECONDS", 0.5)
        with (
            pytest.raises(world.UserError, match="could not connect"),
            world.process_group(2, torch.device("cpu"), 3600.0),
        ):
            pass


DEAF = """
import os, signal, time
from tutti.distributed import launcher
reader, writer = os.pipe()
if os.fork():
    os.read(reader, 1)
    os.kill(os.getpid(), signal.SIGKILL)
os.environ["TORCHELASTIC_RUN_ID"] = "one"
launcher.INTERVAL, launcher.PATIENCE = 0.05, 0.2
signal.signal(signal.SIGTERM, signal.SIG_IGN)
launcher.end_with_launcher()
os.write(writer, b"!")
time.sleep(100)
"""


def test_a_rank_that_does_not_hear_a_signal_ends_all_the_same() -> None:
    """As one does that hangs in C++; what it was started with is open as long as it lives."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    given = {"env": environment, "capture_output": True, "text": True, "timeout": 30}
    done = subprocess.run([sys.executable, "-c", DEAF], check=False, **given)
    assert done.returncode == -signal.SIGKILL and "is gone: process" in done.stderr
