"""Gradient share: medians over the right updates, frozen once, said in words, refused where it cannot be."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from tutti.objectives.balancing.gradient_share import GradientShareBalancing, GradientShareBalancingConfig
from tutti.objectives.weight_schedule import WeightSchedule, schedule_of
from tutti.types import UserError


def schedules(**weights: float | WeightSchedule) -> dict[str, WeightSchedule]:
    return {name: schedule_of(weight) for name, weight in weights.items()}


def build(start: int = 2, steps: int = 3, **weights: float | WeightSchedule) -> GradientShareBalancing:
    given = weights or {"align": 0.1, "action": 1.0, "recon": 0.2}
    return GradientShareBalancingConfig(start=start, steps=steps).build(schedules(**given))


def losses(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones((), dtype=torch.float64) for name in names}


def lambdas(balancing: GradientShareBalancing, *names: str, progress: float = 0.0) -> dict[str, float]:
    return {name: value.item() for name, value in balancing(losses(*names), progress).items()}


def test_lambda_is_share_times_the_ratio_of_medians_and_a_plain_weight_before() -> None:
    balancing = build()
    assert [step for step in range(8) if balancing.wants_gradients(step)] == [2, 3, 4]
    names = ("align", "action", "recon")
    for row in ((8.0, 2.0, 0.5), (2.0, 3.0, 0.25), (4.0, 100.0, 0.75)):
        assert lambdas(balancing, *names) == {"align": 0.1, "action": 1.0, "recon": 0.2}
        balancing.observe_gradients(dict(zip(names, row, strict=True)))
    # medians: align 4, action 3, recon 0.5
    assert lambdas(balancing, *names) == pytest.approx(
        {"align": 0.1 * 3 / 4, "action": 1.0, "recon": 0.2 * 6}
    )


def test_share_follows_its_schedule_and_an_even_number_of_updates_has_the_middle_as_median() -> None:
    fading = WeightSchedule(start=0.4, end=0.0, schedule="linear")
    balancing = build(steps=2, action=1.0, recon=fading)
    balancing.observe_gradients({"action": 1.0, "recon": 0.5})
    balancing.observe_gradients({"action": 3.0, "recon": 0.5})
    assert lambdas(balancing, "action", "recon", progress=0.5)["recon"] == pytest.approx(0.2 * 2.0 / 0.5)


def test_terms_that_cannot_be_measured_keep_their_weight_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    balancing = build(steps=2, action=1.0, stopped=0.3, later=0.5, now_and_then=1.0)
    with caplog.at_level(logging.INFO, "tutti.objectives"):
        balancing.observe_gradients({"action": 2.0, "stopped": 0.0, "now_and_then": 4.0})
        balancing.observe_gradients({"action": 2.0, "stopped": 0.0})
    found = lambdas(balancing, "action", "stopped", "later", "now_and_then")
    assert found == {"action": 1.0, "stopped": 0.3, "later": 0.5, "now_and_then": 0.5}
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 2
    assert any("'stopped' moved nothing that action moves" in line for line in warned)
    assert any("'later' was not active" in line for line in warned)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(told) == 1 and "now_and_then 0.5 (|g| 4)" in told[0]


def test_without_a_gradient_of_action_it_says_so() -> None:
    balancing = build(steps=1)
    with pytest.raises(UserError, match="gradient of 'action' was 0"):
        balancing.observe_gradients({"action": 0.0, "align": 1.0, "recon": 1.0})
    with pytest.raises(UserError, match=r"the objective has align, recon\."):
        build(align=1.0, recon=1.0)


@pytest.mark.parametrize("left_out", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_updates_that_are_left_out_do_not_count_and_the_rest_is_frozen(
    left_out: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    balancing, rows = build(start=2, steps=3), (8.0, 2.0, 4.0)
    for step in range(7):
        balancing.before_step(step)
        if balancing.wants_gradients(step) and step - 2 not in left_out:
            balancing.observe_gradients({"align": rows[step - 2], "action": 1.0, "recon": 0.5})
        assert bool((balancing.factor == 1).all()) == (step < 5)
    kept = sorted(row for number, row in enumerate(rows) if number not in left_out)
    assert balancing.factor.tolist() == [2 / (kept[0] + kept[-1]), 1.0, 2.0]
    with caplog.at_level(logging.INFO, "tutti.objectives"):
        again = build(start=2, steps=3)
        again.load_state_dict(balancing.state_dict() | {"factor": torch.ones(3, dtype=torch.float64)})
        again.before_step(5)
    assert torch.equal(again.factor, balancing.factor)
    assert f"measured in {len(kept)} of 3 updates" in caplog.text


def test_where_all_updates_were_left_out_it_says_so() -> None:
    balancing = build(start=2, steps=3)
    with pytest.raises(UserError, match=r"0 of 3 updates were measured, the others left out"):
        balancing.before_step(5)


def test_a_measurement_that_is_rolled_back_is_made_again() -> None:
    balancing = build(start=2, steps=2, action=1.0, recon=1.0)
    before = {key: value.clone() for key, value in balancing.state_dict().items()}
    for found in (1.0, 4.0):
        balancing.load_state_dict(before)
        for step in range(2, 5):
            balancing.before_step(step)
            if step == 3:
                balancing.observe_gradients({"action": found, "recon": 1.0})
        assert balancing.factor.tolist() == [1.0, found]
