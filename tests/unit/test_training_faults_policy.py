"""Bad gradients: clipping by hand-worked numbers, skipped updates, roll-backs, all exact under resume."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.parameter import Parameter

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
from tutti.training.optim.clipping import Clipper, NormMoments, ZClipConfig
from tutti.types import Batch, UserError


def parameters(**gradients: list[float]) -> dict[str, Parameter]:
    made = {f"model.{name}.w": Parameter(torch.zeros(len(g))) for name, g in gradients.items()}
    for parameter, gradient in zip(made.values(), gradients.values(), strict=True):
        parameter.grad = torch.tensor(gradient)
    return made


def test_zclip_by_hand() -> None:
    """Norms 1 and 3 give m = 2, s = 1; then 8 has z = 6 and k = 2.5: it is clipped to 2 + 6.25 / 6."""
    settings, history = ZClipConfig(warmup=2, decay=0.5), NormMoments()
    assert [history.limit(size, settings) for size in (1.0, 3.0)] == [math.inf] * 2
    assert (history.mean, history.variance) == (2.0, 1.0)
    limit = history.limit(8.0, settings)
    assert limit == pytest.approx(2 + 6.25 / 6)
    assert history.mean == pytest.approx((2 + limit) / 2)
    assert history.variance == pytest.approx((1 + (limit - history.mean) ** 2) / 2)
    mean, variance = history.mean, history.variance
    assert history.limit(2.2, settings) == math.inf  # a usual norm
    assert history.mean == pytest.approx((mean + 2.2) / 2)
    assert history.variance == pytest.approx((variance + (2.2 - history.mean) ** 2) / 2)


def test_the_history_of_norms_moves_by_one_minus_its_decay() -> None:
    settings, history = ZClipConfig(warmup=2, decay=0.9), NormMoments()
    for size in (1.0, 3.0, 3.0):
        history.limit(size, settings)
    assert history.mean == pytest.approx(0.9 * 2 + 0.1 * 3)
    assert history.variance == pytest.approx(0.9 * 1 + 0.1 * 0.9**2)


def test_the_smaller_of_the_fixed_and_the_adaptive_limit_clips() -> None:
    for norm, expected in ((1.5, 1.5), (100.0, 2 + 6.25 / 6)):
        made = parameters(a=[8.0])
        clipper = Clipper(made, norm=norm, by="global", zclip=ZClipConfig(warmup=2))
        clipper.histories["all"] = NormMoments(mean=2.0, variance=1.0, count=2)
        values = clipper.clip(torch.tensor(8.0), 8.0)
        (parameter,) = made.values()
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx(expected, rel=1e-5)
        assert values["optim/clip_share"] == 1.0


def test_equal_norms_are_no_division_by_zero_and_an_outlier_after_them_is_clipped() -> None:
    settings, history = ZClipConfig(warmup=3), NormMoments()
    assert {history.limit(1.0, settings) for _ in range(5)} == {math.inf}
    assert 1.0 < history.limit(50.0, settings) < 1.01


def test_clipping_by_part_scales_only_the_part_that_is_too_long() -> None:
    made = parameters(vision=[3.0, 4.0], action=[0.6, 0.0])
    clipper = Clipper(made, norm=1.0, by="part", zclip="off")
    size = math.sqrt(25.36)
    values = clipper.clip(torch.tensor(size), size)
    assert made["model.vision.w"].grad is not None and made["model.action.w"].grad is not None
    assert made["model.vision.w"].grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert made["model.action.w"].grad.tolist() == pytest.approx([0.6, 0.0])
    assert (values["optim/clip_share/vision"], values["optim/clip_share/action"]) == (1.0, 0.0)
    assert values["optim/clip_share"] == 1.0 and values["optim/grad_norm"] == size


def test_the_whole_gradient_is_clipped_as_torch_clips_it() -> None:
    made, other = (parameters(a=[3.0, 4.0], b=[12.0]) for _ in range(2))
    Clipper(made, norm=2.0, by="global", zclip="off").clip(torch.tensor(13.0), 13.0)
    torch.nn.utils.clip_grad_norm_(list(other.values()), 2.0)
    for name, parameter in made.items():
        own, expected = parameter.grad, other[name].grad
        assert own is not None and expected is not None and torch.equal(own, expected)


ADAPTIVE: dict[str, Any] = {
    "gradients": {"clip_by": "part", "zclip": {"warmup": 4, "z_threshold": 0.5}},
    "steps": 16,
    "checkpoints": {"every": 6},
    "validation": {"every": 0},
}


def test_adaptive_clipping_acts_is_recorded_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    """Killed in its warm-up, and behind it."""
    make_trainer(tmp_path / "straight", **ADAPTIVE).fit(Data())
    killed_and_resumed(tmp_path / "killed", (3, 8), **ADAPTIVE)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []
    found = records(tmp_path / "straight")
    assert "optim/grad_norm_mean/action" not in found[0] and found[-1]["optim/grad_norm_mean/action"] > 0
    assert any(0 < record["optim/clip_share/action"] <= 1 for record in found)


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
    policy = FaultPolicy(settings, parameters(a=[1.0]))
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
