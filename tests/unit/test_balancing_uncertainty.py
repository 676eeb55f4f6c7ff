"""Uncertainty weighting: torchjd's, times two; where it settles; what it leaves alone."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import Tensor
from torchjd.scalarization import UW

from tutti.objectives.balancing.learned import UncertaintyBalancing, UncertaintyBalancingConfig
from tutti.objectives.weight_schedule import schedule_of
from tutti.types import UserError

NAMES = ("action", "align", "recon")


def build(**options: float) -> UncertaintyBalancing:
    config = UncertaintyBalancingConfig.model_validate(options)
    return config.build(
        {name: schedule_of(weight) for name, weight in zip(NAMES, (1.0, 0.5, 2.0), strict=True)}
    )


def tensors(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_factors_are_twice_torchjds_gradient_and_follow_its_learning() -> None:
    """UW has lambda_i = exp(-s_i) / 2 and moves s by autograd; Adam moves both."""
    ours, theirs = build(learning_rate=0.05), UW(3).double()
    adam = torch.optim.Adam(theirs.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        losses = torch.rand(3, generator=generator, dtype=torch.float64).add(0.1).requires_grad_()
        total = theirs(losses)
        adam.zero_grad()
        (by_loss,) = torch.autograd.grad(total, losses, retain_graph=True)
        total.backward()
        values = dict(zip(NAMES, losses.tolist(), strict=True))
        found = torch.stack([torch.as_tensor(b) for b in ours.factors(tensors(values)).values()])
        torch.testing.assert_close(found, 2 * by_loss, rtol=1e-12, atol=0)
        ours.after_step(values)
        adam.step()
    torch.testing.assert_close(ours.log_variance, theirs.log_var.detach(), rtol=0, atol=1e-12)


def test_it_starts_as_the_plain_sum_and_weights_multiply() -> None:
    found = build()(tensors(dict.fromkeys(NAMES, 3.0)), 0.0)
    assert {name: value.item() for name, value in found.items()} == {"action": 1, "align": 0.5, "recon": 2}


def test_it_settles_where_the_factor_is_one_over_the_loss() -> None:
    balancing = build(learning_rate=0.05)
    for _ in range(600):
        balancing.after_step({"action": 0.25, "align": 4.0, "recon": 1.0})
    found = [float(b) for b in balancing.factors(tensors(dict.fromkeys(NAMES, 1.0))).values()]
    assert found == pytest.approx([4.0, 0.25, 1.0], rel=1e-3)


def test_first_step_by_hand() -> None:
    """g = (1 - L)/2 at s = 0; Adam's first step has the size of the learning rate."""
    balancing = build(learning_rate=0.1)
    balancing.after_step({"action": 3.0, "align": 0.5})
    assert balancing.log_variance.tolist() == pytest.approx([0.1, -0.1, 0.0], rel=1e-7)


def test_absent_and_exactly_zero_terms_are_left_alone_and_s_has_a_limit() -> None:
    balancing = build(learning_rate=0.5, limit=1.0)
    for _ in range(20):
        balancing.after_step({"action": 0.0, "align": 1e-3})
    assert balancing.log_variance.tolist() == [0.0, -1.0, 0.0]
    assert balancing.adam.updates.tolist() == [0.0, 20.0, 0.0]
    assert float(balancing.factors(tensors({"align": 1e-3}))["align"]) == pytest.approx(exp(1.0))


def test_a_negative_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"'recon' is -0\.5"):
        build().after_step({"recon": -0.5})
