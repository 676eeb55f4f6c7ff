"""FAMO and uncertainty weighting: the numbers and learning of torchjd, terms at their bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd.scalarization import FAMO, UW

from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.balancing.learned import (
    FamoBalancing,
    FamoBalancingConfig,
    UncertaintyBalancing,
    UncertaintyBalancingConfig,
)
from tutti.objectives.weight_schedule import schedule_of
from tutti.types import UserError

NAMES = ("action", "align", "recon")


def famo(**options: Any) -> FamoBalancing:
    config = FamoBalancingConfig.model_validate(options)
    return config.build({name: schedule_of(1.0) for name in NAMES})


def uncertainty(**options: float) -> UncertaintyBalancing:
    weights = zip(NAMES, (1.0, 0.5, 2.0), strict=True)
    config = UncertaintyBalancingConfig.model_validate(options)
    return config.build({name: schedule_of(weight) for name, weight in weights})


def tensors(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def factors(balancing: Balancing, **values: float) -> list[float]:
    return [float(b) for b in balancing.factors(tensors(values)).values()]


@pytest.mark.parametrize("bounds", [[0.0, 0.0, 0.0], [0.0, 0.5, -1.0]])
def test_the_weights_and_learning_of_famo_are_torchjds(bounds: list[float]) -> None:
    ours = famo(bounds=dict(zip(NAMES, bounds, strict=True)))
    theirs = FAMO(3, min_losses=torch.tensor(bounds, dtype=torch.float64)).double()
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        noise = torch.rand(3, generator=generator, dtype=torch.float64)
        return torch.tensor(bounds, dtype=torch.float64) + 0.1 + noise

    assert ours.needs_losses_after_step
    for _ in range(15):
        before, after = drawn().requires_grad_(), drawn()
        (expected,) = torch.autograd.grad(theirs(before), before)
        values = dict(zip(NAMES, before.tolist(), strict=True))
        assert factors(ours, **values) == pytest.approx((3 * expected).tolist(), rel=1e-12)
        theirs.update(after)
        ours.reevaluate(values, dict(zip(NAMES, after.tolist(), strict=True)))
    torch.testing.assert_close(ours.logits, theirs._w.detach(), rtol=0, atol=1e-12)


def test_at_first_famos_lambdas_are_the_inverse_losses_scaled_to_sum_k() -> None:
    """z even: b_i = K (1/L_i) / sum_j (1/L_j)."""
    assert factors(famo(), action=1.0, align=2.0, recon=4.0) == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert factors(famo(), action=1.0, recon=4.0) == pytest.approx([8 / 5, 2 / 5])


def test_the_term_whose_logarithm_fell_most_loses_weight() -> None:
    balancing = famo(learning_rate=0.1, decay=0.0)
    balancing.reevaluate({"action": 1.0, "align": 1.0}, {"action": 0.5, "align": 0.9})
    action, align, recon = balancing.logits.tolist()
    assert action == pytest.approx(-0.1, rel=1e-6) and align == pytest.approx(0.1, rel=1e-6)
    assert recon == 0.0  # not computed: not moved


def test_a_term_at_its_bound_or_not_finite_takes_no_part() -> None:
    balancing = famo()
    assert factors(balancing, action=1.0, align=0.0, recon=1.0) == pytest.approx([1.5, 0.0, 1.5])
    assert factors(balancing, align=0.0) == [0.0]
    balancing.reevaluate({"action": 1.0, "align": 0.0}, {"action": 0.5, "align": 0.0})
    assert balancing.logits.tolist()[1] == 0.0 and balancing.adam.updates.tolist() == [1.0, 0.0, 0.0]
    balancing = famo()
    balancing.reevaluate(dict.fromkeys(NAMES, 3.0), {"action": math.inf, "align": math.nan, "recon": 2.0})
    assert balancing.logits[:2].tolist() == [0.0, 0.0] and bool(balancing.logits.isfinite().all())


def test_losses_that_do_not_fit_and_a_bound_without_a_term_are_refused() -> None:
    with pytest.raises(UserError, match=r"'align' is -0\.2 .*Set balancing\.bounds\.align"):
        famo().reevaluate({"action": 1.0, "align": 0.1}, {"action": 1.0, "align": -0.2})
    with pytest.raises(UserError, match="names recno; the objective has action, align, recon"):
        famo(bounds={"recno": 0.1})
    with pytest.raises(UserError, match=r"'recon' is -0\.5"):
        uncertainty().after_step({"recon": -0.5})


def test_uncertainty_is_twice_torchjds_gradient_and_follows_its_learning() -> None:
    """UW has lambda_i = exp(-s_i) / 2 and moves s by autograd; Adam moves both."""
    ours, theirs = uncertainty(learning_rate=0.05), UW(3).double()
    adam = torch.optim.Adam(theirs.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        losses = torch.rand(3, generator=generator, dtype=torch.float64).add(0.1).requires_grad_()
        total = theirs(losses)
        adam.zero_grad()
        (by_loss,) = torch.autograd.grad(total, losses, retain_graph=True)
        total.backward()
        values = dict(zip(NAMES, losses.tolist(), strict=True))
        assert factors(ours, **values) == pytest.approx((2 * by_loss).tolist(), rel=1e-12)
        ours.after_step(values)
        adam.step()
    torch.testing.assert_close(ours.log_variance, theirs.log_var.detach(), rtol=0, atol=1e-12)


def test_uncertainty_starts_as_the_plain_sum_and_settles_where_the_factor_is_one_over_the_loss() -> None:
    balancing = uncertainty(learning_rate=0.05)
    found = balancing(tensors(dict.fromkeys(NAMES, 3.0)), 0.0)
    assert {name: value.item() for name, value in found.items()} == {"action": 1, "align": 0.5, "recon": 2}
    for _ in range(600):
        balancing.after_step({"action": 0.25, "align": 4.0, "recon": 1.0})
    found = factors(balancing, **dict.fromkeys(NAMES, 1.0))
    assert found == pytest.approx([4.0, 0.25, 1.0], rel=1e-3)


def test_absent_and_exactly_zero_terms_are_left_alone_and_s_has_a_limit() -> None:
    balancing = uncertainty(learning_rate=0.1)
    balancing.after_step({"action": 3.0, "align": 0.5})  # Adam's first step has the size of the learning rate
    assert balancing.log_variance.tolist() == pytest.approx([0.1, -0.1, 0.0], rel=1e-7)
    balancing = uncertainty(learning_rate=0.5, limit=1.0)
    for _ in range(20):
        balancing.after_step({"action": 0.0, "align": 1e-3})
    assert balancing.log_variance.tolist() == [0.0, -1.0, 0.0]
    assert balancing.adam.updates.tolist() == [0.0, 20.0, 0.0]
    assert factors(balancing, align=1e-3) == pytest.approx([math.exp(1.0)])
