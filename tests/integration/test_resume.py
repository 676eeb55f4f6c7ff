"""A run that was killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.checkpoints import load_latest
from fixtures.toy_training import main
from tutti.storage.checkpoint import Checkpoint, checkpoints
from tutti.training.records import read_records
from tutti.types import UserError

WORLD = Path(__file__).parents[1] / "fixtures" / "toy_training.py"
SOURCE = Path(__file__).parents[2] / "src"


def run_process(run: Path, steps: int, kill_after: int | None = None) -> int:
    command = [sys.executable, str(WORLD), str(run), str(steps)]
    command += [] if kill_after is None else [str(kill_after)]
    return subprocess.run(command, env={"PYTHONPATH": str(SOURCE)}, check=False).returncode


def run_here(run: Path, steps: int) -> None:
    main(run, steps, None)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """All values of a nested structure by their path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in leaves(item, f"{name}/{key}").items()}
    return {name: value}


def differing(one: Any, other: Any) -> list[str]:
    """The paths whose values are not equal to the last bit."""
    a, b = leaves(one), leaves(other)
    assert a.keys() == b.keys()
    return [n for n in a if not (torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n])]


def content(saved: Checkpoint) -> dict[str, Any]:
    state = {name: saved.state[name] for name in ("step", "loader", "samples", "ema_updates", "meter")}
    return {"tensors": saved.tensors, "optimizer": saved.optimizer, "rng": saved.rng, "state": state}


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read_records(run)]


def test_killed_and_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_process(straight, 20) == 0
    assert run_process(killed, 20, kill_after=13) == -signal.SIGKILL
    assert [folder.name for folder in checkpoints(killed)] == ["step-000010"]
    assert read_records(killed)[-1]["step"] == 12  # to be dropped: the checkpoint is older
    assert run_process(killed, 20) == 0
    expected, found = load_latest(straight), load_latest(killed)
    assert expected is not None and found is not None and found.step == 20
    assert set(found.tensors) == {"model", "ema", "objective", "objective_ema"}
    assert differing(content(expected), content(found)) == []
    records = without_times(killed)
    assert records == without_times(straight)
    assert [r["step"] for r in records if r["kind"] == "train"] == [3, 6, 9, 12, 15, 18, 20]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    run_here(short, 10)
    run_here(long, 11)
    one, other = load_latest(short), load_latest(long)
    assert one is not None and other is not None
    assert "/tensors/model/state.weight" in differing(content(one), content(other))


def test_a_truncated_checkpoint_is_refused_with_the_cure(tmp_path: Path) -> None:
    run_here(tmp_path, 20)
    weights = checkpoints(tmp_path)[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated, .* Delete the folder .*step-000020"):
        load_latest(tmp_path)
