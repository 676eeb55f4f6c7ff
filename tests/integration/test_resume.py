"""A run that was killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fixtures.checkpoints import load_latest
from fixtures.processes import context
from fixtures.run_equality import differing, records
from fixtures.toy_training import main
from tutti.storage.checkpoint import checkpoints
from tutti.training.records import read_records
from tutti.types import UserError


def run_process(run: Path, steps: int, kill_after: int | None = None) -> int | None:
    process = context.Process(target=main, args=(run, steps, kill_after))
    process.start()
    process.join(240)
    return process.exitcode


def run_here(run: Path, steps: int) -> None:
    main(run, steps, None)


def test_killed_and_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_process(straight, 20) == 0
    assert run_process(killed, 20, kill_after=13) == -signal.SIGKILL
    assert [folder.name for folder in checkpoints(killed)] == ["step-000010"]
    assert read_records(killed)[-1]["step"] == 12  # to be dropped: the checkpoint is older
    assert run_process(killed, 20) == 0
    found = load_latest(killed)
    assert found is not None and found.step == 20
    assert set(found.tensors) == {"model", "ema", "objective", "objective_ema"}
    assert differing(straight, killed) == []
    assert [r["step"] for r in records(killed) if r["kind"] == "train"] == [3, 6, 9, 12, 15, 18, 20]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    run_here(short, 10)
    run_here(long, 11)
    assert {"tensors/model/state.weight", "records"} <= set(differing(short, long))


def test_a_truncated_checkpoint_is_refused_with_the_cure(tmp_path: Path) -> None:
    run_here(tmp_path, 20)
    weights = checkpoints(tmp_path)[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated, .* Delete the folder .*step-000020"):
        load_latest(tmp_path)
