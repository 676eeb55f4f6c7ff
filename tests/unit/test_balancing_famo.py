"""FAMO: torchjd's weights times K, its learning to the last digits, terms at and below their bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd.scalarization import FAMO

from tutti.objectives.balancing.learned import FamoBalancing, FamoBalancingConfig
from tutti.objectives.weight_schedule import schedule_of
from tutti.types import UserError

NAMES = ("action", "align", "recon")


def build(**options: Any) -> FamoBalancing:
    config = FamoBalancingConfig.model_validate(options)
    return config.build({name: schedule_of(1.0) for name in NAMES})


def factors(balancing: FamoBalancing, **values: float) -> list[float]:
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return [float(b) for b in balancing.factors(tensors).values()]


@pytest.mark.parametrize("bounds", [[0.0, 0.0, 0.0], [0.0, 0.5, -1.0]])
def test_weights_and_learning_are_torchjds(bounds: list[float]) -> None:
    ours = build(bounds=dict(zip(NAMES, bounds, strict=True)))
    theirs = FAMO(3, min_losses=torch.tensor(bounds, dtype=torch.float64)).double()
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        noise = torch.rand(3, generator=generator, dtype=torch.float64)
        return torch.tensor(bounds, dtype=torch.float64) + 0.1 + noise

    for _ in range(15):
        before, after = drawn().requires_grad_(), drawn()
        (expected,) = torch.autograd.grad(theirs(before), before)
        values = dict(zip(NAMES, before.tolist(), strict=True))
        assert factors(ours, **values) == pytest.approx((3 * expected).tolist(), rel=1e-12)
        theirs.update(after)
        ours.reevaluate(values, dict(zip(NAMES, after.tolist(), strict=True)))
    torch.testing.assert_close(ours.logits, theirs._w.detach(), rtol=0, atol=1e-12)


def test_at_first_lambdas_are_the_inverse_losses_scaled_to_sum_k() -> None:
    """z even: b_i = K (1/L_i) / sum_j (1/L_j)."""
    assert factors(build(), action=1.0, align=2.0, recon=4.0) == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert factors(build(), action=1.0, recon=4.0) == pytest.approx([8 / 5, 2 / 5])


def test_the_term_whose_logarithm_fell_most_loses_weight() -> None:
    balancing = build(learning_rate=0.1, decay=0.0)
    balancing.reevaluate({"action": 1.0, "align": 1.0}, {"action": 0.5, "align": 0.9})
    action, align, recon = balancing.logits.tolist()
    assert action == pytest.approx(-0.1, rel=1e-6) and align == pytest.approx(0.1, rel=1e-6)
    assert recon == 0.0  # not computed: not moved


def test_a_term_at_its_bound_takes_no_part() -> None:
    balancing = build()
    assert factors(balancing, action=1.0, align=0.0, recon=1.0) == pytest.approx([1.5, 0.0, 1.5])
    assert factors(balancing, align=0.0) == [0.0]
    balancing.reevaluate({"action": 1.0, "align": 0.0}, {"action": 0.5, "align": 0.0})
    assert balancing.logits.tolist()[1] == 0.0 and balancing.adam.updates.tolist() == [1.0, 0.0, 0.0]


def test_a_term_below_its_bound_and_a_bound_without_a_term_are_refused() -> None:
    with pytest.raises(UserError, match=r"'align' is -0\.2 .*Set balancing\.bounds\.align"):
        build().reevaluate({"action": 1.0, "align": 0.1}, {"action": 1.0, "align": -0.2})
    with pytest.raises(UserError, match="names recno; the objective has action, align, recon"):
        build(bounds={"recno": 0.1})


def test_it_asks_for_a_second_look() -> None:
    assert build().needs_losses_after_step


def test_a_term_that_is_not_finite_after_the_update_has_no_part_in_it() -> None:
    balancing = build()
    after = {"action": math.inf, "align": math.nan, "recon": 2.0}
    balancing.reevaluate(dict.fromkeys(NAMES, 3.0), after)
    assert balancing.logits[:2].tolist() == [0.0, 0.0] and bool(balancing.logits.isfinite().all())
