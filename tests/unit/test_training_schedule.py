"""Schedules by hand-worked numbers, and the batch that grows: a function of the step, exact under resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fixtures.run_equality import differing, killed_and_resumed
from fixtures.toy_training import BATCH, Data, config, make_trainer
from tutti.training.optim.schedules import (
    BatchRampConfig,
    ConstantConfig,
    DecayConfig,
    ScheduleConfig,
    WsdConfig,
)
from tutti.training.records import read_records

LINEAR, COSINE = (
    DecayConfig(kind="linear", warmup=10, final=0.2),
    DecayConfig(kind="cosine", warmup=10, final=0.1),
)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (ConstantConfig(warmup=4), 100, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        # Behind the last step every schedule stays at its end, as a fork of another length may go on.
        (LINEAR, 110, {4: 0.5, 9: 1.0, 10: 1.0, 60: 0.6, 110: 0.2, 130: 0.2}),
        (DecayConfig(kind="linear", warmup=0), 100, {75: 0.25}),
        (COSINE, 110, {4: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 130: 0.1}),
        (WsdConfig(warmup=10, decay=0.5), 100, {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 75: 0.5, 99: 0.02}),
        (WsdConfig(warmup=5, decay=0.2), 100, {2: 0.6, 4: 1.0, 50: 1.0, 80: 1.0, 85: 0.75, 99: 0.05}),
        (WsdConfig(warmup=0, decay=0.2, shape="1-sqrt"), 100, {80: 1.0, 85: 0.5, 90: 1 - 0.5**0.5}),
        (WsdConfig(warmup=0, decay=0.0), 100, {99: 1.0}),
        (WsdConfig(warmup=0), 100, {130: 0.0}),
        # A cool-down that begins at a step of its own.
        (WsdConfig(warmup=0, decay_from=3000), 3600, {2999: 1.0, 3000: 1.0, 3300: 0.5, 3599: 1 / 600}),
        (WsdConfig(warmup=0, decay_from=3000, shape="1-sqrt"), 3600, {3150: 0.5}),
        (WsdConfig(warmup=0, decay_from=100), 100, {99: 1.0}),
    ],
)
def test_a_schedule_by_hand(schedule: ScheduleConfig, steps: int, expected: dict[int, float]) -> None:
    assert {step: schedule.factor(step, steps) for step in expected} == pytest.approx(expected)


def stages(*pairs: tuple[float, int], **settings: Any) -> BatchRampConfig:
    listed = [{"until": until, "accumulation": size} for until, size in pairs]
    return BatchRampConfig.model_validate({"stages": listed, **settings})


def test_stages_by_steps_and_by_samples() -> None:
    """By samples with shares 0.1, 0.3, 0.6 at 1, 2, 4: updates as 0.1/1 : 0.3/2 : 0.6/4 = 2 : 3 : 3."""
    by_steps = stages((0.1, 1), (0.4, 2), by="steps")
    assert by_steps.ends(4, 100) == (10, 40)
    assert [by_steps.accumulation_at(step, 4, 100) for step in (0, 9, 10, 39, 40, 99)] == [1, 1, 2, 2, 4, 4]
    by_samples = stages((0.1, 1), (0.4, 2), by="samples")
    assert by_samples.ends(4, 800) == (200, 500)
    sizes = [by_samples.accumulation_at(step, 4, 800) for step in range(800)]
    assert (sum(sizes[:200]) / sum(sizes), sum(sizes[:500]) / sum(sizes)) == (0.1, 0.4)


def test_the_learning_rate_follows_the_batch_as_told() -> None:
    ramp = stages((0.5, 2), by="steps", learning_rate="sqrt")
    whole = config(batch_ramp=ramp, accumulation=8, steps=20)
    assert [whole.batch_factor(step) for step in (9, 10)] == [0.5, 1.0]
    assert stages((0.5, 2), learning_rate="linear").rate_factor(2, 8) == 0.25
    assert stages((0.5, 2)).rate_factor(2, 8) == 1.0
    assert (config().accumulation_at(7), config().batch_factor(7)) == (1, 1.0)


RAMP: dict[str, Any] = {
    "accumulation": 3,
    "batch_ramp": stages((0.25, 1), (0.5, 2), by="steps", learning_rate="linear").model_dump(),
    "steps": 12,
    "log_every": 1,
    "checkpoints": {"every": 4},
    "validation": {"every": 0},
}


def test_a_growing_batch_takes_the_next_batches_of_the_same_stream(tmp_path: Path) -> None:
    data = Data()
    trainer = make_trainer(tmp_path, **RAMP)
    trainer.fit(data)
    records = read_records(tmp_path)
    assert [r["optim/accumulation"] for r in records] == [1.0] * 3 + [2.0] * 3 + [3.0] * 6
    assert data.train.position == 3 + 6 + 18 and trainer.counters.samples == 27 * BATCH
    assert [r["optim/lr_factor"] for r in records[1:6]] == pytest.approx([2 / 9, 1 / 3, *[2 / 3] * 3])


def test_a_growing_batch_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    """Killed inside a stage and right after its end; the checkpoints lie inside other stages."""
    make_trainer(tmp_path / "straight", **RAMP).fit(Data())
    killed_and_resumed(tmp_path / "killed", (5, 3), **RAMP)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ([(0.5, 2), (0.4, 4)], "must end later and be larger"),
        ([(0.2, 2), (0.4, 2)], "must end later and be larger"),
        ([], "stages is empty"),
        ([(0.5, 8)], "training.accumulation, which holds after it, is 8"),
        ([(0.01, 1)], "a stage gets none"),
    ],
)
def test_a_ramp_that_does_not_grow_is_refused(ramp: list[tuple[float, int]], message: str) -> None:
    listed = [{"until": until, "accumulation": size} for until, size in ramp]
    with pytest.raises(ValidationError, match=message):
        config(accumulation=8, batch_ramp={"stages": listed, "by": "steps"})
