"""Bad gradients: skipped updates and roll-backs, all exact under resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fixtures.checkpoints import load_latest
from fixtures.run_equality import differing, killed_and_resumed, records
from fixtures.toy_training import BATCH, Data, config, make_trainer
from tutti.report.inputs import read_records as read_columns
from tutti.report.judges import judge_records
from tutti.storage.checkpoint import checkpoints
from tutti.training.faults.config import GradientsConfig
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.faults.policy import FaultPolicy
from tutti.training.faults.saved_steps import load_step
from tutti.types import Batch, UserError


def spoil(*numbers: int) -> Any:
    """Data whose batches of these numbers have a NaN action."""

    def change(number: int, batch: Batch) -> Batch:
        if number in numbers:
            batch.actions[1, 0, 0] = float("nan")
        return batch

    return lambda: Data(change)


SKIP: dict[str, Any] = {
    "gradients": {"non_finite": "skip", "max_skips": 2},
    "accumulation": 2,
    "steps": 10,
    "log_every": 1,
    "checkpoints": {"every": 4},
    "validation": {"every": 0},
}


def test_a_skipped_update_moves_nothing_and_the_data_go_on(tmp_path: Path) -> None:
    """Batch 6 is in update 4 (from 1): weights, moments and averages stay, step and position do not."""
    data = spoil(6)()
    trainer = make_trainer(tmp_path, **SKIP | {"steps": 4, "checkpoints": {"every": 3}})
    trainer.fit(data)
    before, after = (torch.load(f / "optimizer.pt", weights_only=True) for f in checkpoints(tmp_path))
    assert before["adamw"]["state"][0]["step"] == after["adamw"]["state"][0]["step"] == 3
    assert torch.equal(before["adamw"]["state"][0]["exp_avg"], after["adamw"]["state"][0]["exp_avg"])
    assert all(average.updates == 3 for average in trainer.averages.values())
    assert (trainer.step, data.train.position, trainer.counters.samples) == (4, 8, 8 * BATCH)
    last = records(tmp_path)[-1]
    assert last["optim/skipped"] == 1.0 and "loss/total" not in last
    batches, _ = load_step(tmp_path / "failures" / "step-000004")
    assert batches[0].window[0] == 6000


def test_skips_are_exact_under_resume_and_said_in_the_report(tmp_path: Path) -> None:
    data = spoil(3, 9, 10)
    make_trainer(tmp_path / "straight", **SKIP).fit(data())
    killed_and_resumed(tmp_path / "killed", (5, 2), data, **SKIP)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []
    assert records(tmp_path / "straight")[-1]["optim/skipped"] == 3.0
    columns = read_columns(tmp_path / "straight" / "records.jsonl")
    said = [finding.sentence for finding in judge_records(columns, {})]
    assert any("3 of 10 updates were left out" in sentence for sentence in said)


def test_too_many_skips_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="Step 5: the loss term 'action' is nan"):
        make_trainer(tmp_path, **SKIP | {"accumulation": 1}).fit(spoil(2, 3, 4)())
    assert (tmp_path / "failures" / "step-000005").is_dir()
    make_trainer(tmp_path / "b", **SKIP | {"accumulation": 1}).fit(spoil(2, 3, 5, 6)())


ROLL: dict[str, Any] = {
    "gradients": {
        "rollback": {"z_threshold": 4.0, "patience": 3, "rewind_steps": 4, "max_rollbacks": 1}
        | {"warmup": 4, "decay": 0.9}
    },
    "steps": 20,
    "log_every": 1,
    "checkpoints": {"every": 4, "keep": 2},
    "validation": {"every": 0},
}


def wild(first: int, last: int) -> Any:
    """Data whose batches from `first` to `last` have actions a thousand times too large."""

    def change(number: int, batch: Batch) -> Batch:
        if first <= number <= last:
            batch.actions.mul_(1000)
        return batch

    return lambda: Data(change)


def test_a_divergence_goes_back_past_the_data_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches 10 to 12 are wild: after update 13 the run goes back to step 8, not 12, and reads on at 13."""
    data = wild(10, 12)()
    trainer = make_trainer(tmp_path, **ROLL)
    with caplog.at_level(logging.WARNING, "tutti.training"):
        trainer.fit(data)
    assert trainer.fault_policy.rollbacks == [(13, 8)]
    assert data.train.position == 13 + 12 and trainer.counters.samples == 25 * BATCH
    assert any("the run diverges. Rolled back to step 8 (1 of 1)" in r.getMessage() for r in caplog.records)
    found = records(tmp_path)
    assert [r["step"] for r in found] == [*range(1, 9), 8, *range(9, 21)]  # the detour is gone
    assert found[8] == {"step": 8, "kind": "event", "optim/rollbacks": 1.0, "optim/rollback_from": 13.0}
    assert max(r["loss/action/raw"] for r in found if r["kind"] == "train") < 100
    assert found[-1]["optim/rollbacks"] == 1.0
    columns = read_columns(tmp_path / "records.jsonl")
    said = [finding.sentence for finding in judge_records(columns, {})]
    assert any("went back 1 time (from step 13 to 8)" in sentence for sentence in said)


@pytest.mark.parametrize("at", [(12,), (15,), (18,), (14, 8)])
def test_a_run_that_rolls_back_is_exact_under_resume(tmp_path: Path, at: tuple[int, ...]) -> None:
    """Killed before the roll-back, right after it (it is made again), and after its next checkpoint."""
    make_trainer(tmp_path / "straight", **ROLL).fit(wild(10, 12)())
    killed_and_resumed(tmp_path / "killed", at, wild(10, 12), **ROLL)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []


def test_a_second_divergence_stops_with_a_clear_message(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"diverges\. The run has rolled back 1 times already \(from 13 to 8\)"
    ):
        make_trainer(tmp_path, **ROLL).fit(wild(10, 99)())
    assert load_latest(tmp_path) is not None


@pytest.mark.parametrize("at", [(12,), (16,)])
def test_with_a_roll_back_too_many_skips_lead_to_it(tmp_path: Path, at: tuple[int, ...]) -> None:
    """Batches 10 to 12 are not finite: updates 11 and 12 are skipped, after 13 the run goes back to 8."""
    settings = {**ROLL, "gradients": ROLL["gradients"] | {"non_finite": "skip", "max_skips": 2}}
    trainer = make_trainer(tmp_path / "straight", **settings)
    trainer.fit(spoil(10, 11, 12)())
    assert trainer.fault_policy.rollbacks == [(13, 8)] and trainer.fault_policy.skipped == 2
    killed_and_resumed(tmp_path / "killed", at, spoil(10, 11, 12), **settings)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []


def test_without_an_old_checkpoint_a_divergence_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint from step 3 or before .* there are \[4\]"):
        make_trainer(tmp_path, **ROLL).fit(wild(4, 6)())


def test_high_totals_do_not_become_the_level_and_a_phase_has_its_own() -> None:
    settings = GradientsConfig.model_validate(
        {"rollback": {"patience": 2, "rewind_steps": 2, "warmup": 3, "z_threshold": 3.0}}
    )
    policy = FaultPolicy(settings, {})
    for total in (1.0, 1.1, 0.9, 5.0):
        policy.observe(total, 0)
    assert policy.high == 1 and policy.level.mean == pytest.approx(1.0)
    policy.observe(1.0, 0)
    assert policy.high == 0
    for phase, total in ((0, 5.0), (1, 50.0), (1, 50.0)):
        policy.observe(total, phase)
    assert not policy.diverged and policy.level.mean == 50.0


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"rollback": {"patience": 9, "rewind_steps": 8}}, "would lie within it. Raise rewind_steps"),
        ({"rollback": {"rewind_steps": 200}}, "no checkpoint that old"),
        ({"zclip": {"kind": "agc"}}, "kind"),
        ({"max_skips": 0}, "greater than or equal to 1"),
    ],
)
def test_policies_that_cannot_work_are_refused(gradients: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(gradients=gradients, checkpoints={"every": 100})
