"""Schedules by hand-worked numbers, and the batch that grows: a function of the step, exact under resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fixtures.run_equality import differing, killed_and_resumed
from fixtures.toy_training import BATCH, Data, config, make_trainer
from tutti.training.optim.batch_ramp import BatchRampConfig
from tutti.training.optim.schedules import ConstantConfig, CosineConfig, LinearConfig, WsdConfig
from tutti.training.records import read_records


def test_constant_warms_up_and_stays() -> None:
    constant = ConstantConfig(warmup=4)
    assert [constant.factor(step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_linear_is_a_straight_line_from_the_warm_up_to_its_final_factor() -> None:
    linear = LinearConfig(warmup=10, final=0.2)
    assert [linear.factor(step, 110) for step in (4, 9, 10, 60, 110)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.6, 0.2]
    )
    assert LinearConfig(warmup=0).factor(75, 100) == pytest.approx(0.25)


def test_the_last_share_of_the_steps_decays() -> None:
    wsd = WsdConfig(warmup=5, decay=0.2)
    assert [wsd.factor(step, 100) for step in (2, 4, 50, 80, 85, 95, 99)] == pytest.approx(
        [0.6, 1.0, 1.0, 1.0, 0.75, 0.25, 0.05]
    )
    assert WsdConfig(warmup=0, decay=0.2, shape="1-sqrt").factor(85, 100) == pytest.approx(0.5)


def test_behind_the_last_step_every_schedule_stays_at_its_end() -> None:
    """A run that goes on behind the end of its schedule, as a fork of another length may."""
    assert LinearConfig(warmup=0, final=0.1).factor(130, 100) == pytest.approx(0.1)
    assert CosineConfig(warmup=0, final=0.1).factor(130, 100) == pytest.approx(0.1)
    assert WsdConfig(warmup=0).factor(130, 100) == 0.0


def test_a_cool_down_can_begin_at_a_step_of_its_own() -> None:
    wsd = WsdConfig(warmup=0, decay_from=3000)
    assert [wsd.factor(step, 3600) for step in (2999, 3000, 3300, 3599)] == pytest.approx(
        [1.0, 1.0, 0.5, 1 / 600]
    )
    root = WsdConfig(warmup=0, decay_from=3000, shape="1-sqrt")
    assert root.factor(3150, 3600) == pytest.approx(0.5)
    assert WsdConfig(warmup=0, decay=0.5).factor(75, 100) == pytest.approx(0.5)  # a share, as before
    assert WsdConfig(warmup=0, decay_from=100).factor(99, 100) == 1.0


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
