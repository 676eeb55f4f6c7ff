"""Balancings of the user's own, and what all balancings have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tutti.config.run_config import load_config
from tutti.objectives.balancing.interface import Balancing
from tutti.objectives.balancing.shares import SharesBalancing
from tutti.objectives.config import BalancingConfig
from tutti.objectives.objective import TermSize
from tutti.objectives.weight_schedule import WeightSchedule, schedule_of
from tutti.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = ("shares", "uncertainty", "dwa", "rlw", "famo", "own_balancing:EqualLosses")
SCHEDULES = {
    "action": schedule_of(1.0),
    "recon": WeightSchedule(start=0.5, end=0.0, schedule="linear"),
    "align": schedule_of(0.25),
}


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_balancing", raising=False)


def build(kind: str, **options: Any) -> Balancing:
    method = TypeAdapter(BalancingConfig).validate_python({"kind": kind, **options})
    return method.build(SCHEDULES, ("recon", "align")) if kind == "shares" else method.build(SCHEDULES)


def values(dtype: torch.dtype = torch.float32, **given: float) -> dict[str, Tensor]:
    given = given or {"action": 0.5, "recon": 2.0, "align": 1.0}
    return {name: torch.tensor(value, dtype=dtype) for name, value in given.items()}


def test_the_example_is_short_and_makes_the_terms_equal() -> None:
    assert len((EXAMPLES / "own_balancing.py").read_text().rstrip().splitlines()) <= 30
    balancing = build("own_balancing:EqualLosses", options={"decay": 0.0})
    balancing.after_step({"action": 0.5, "recon": 2.0})
    found = balancing(values(), 0.0)
    assert {name: value.item() for name, value in found.items()} == {
        "action": 1.0,
        "recon": 0.5 * 0.25,
        "align": 0.25 * 0.5,  # align is still at its start, 1
    }
    assert load_config(None, ["balancing.kind=own_balancing:EqualLosses"]).balancing.kind == (
        "own_balancing:EqualLosses"
    )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("own_balancing:Nothing", {}, r"balancing\.kind is 'own_bal.*no such name.*EqualLosses"),
        ("own_balancing:EqualLosses", {"options": {"decya": 1}}, r"does not accept.*decya"),
    ],
)
def test_errors_name_the_target(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(kind, **options)


def learn(balancing: Balancing) -> None:
    """What a trainer tells it in one update (and, of gradients, in those before)."""
    before, after = {"action": 0.9, "recon": 2.5, "align": 1.1}, {"action": 0.8, "recon": 2.4, "align": 1.0}
    if isinstance(balancing, SharesBalancing):
        found = {"action": (1.0, 1.0), "recon": (0.5, 1.0), "align": (3.0, 2.0)}
        sizes = {n: TermSize(own=a, primary=b, anywhere=a, value=1.0) for n, (a, b) in found.items()}
        balancing.observe_gradients(sizes)
    if balancing.needs_losses_after_step:
        balancing.reevaluate(before, after)
    balancing.after_step(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambdas_are_detached_in_the_precision_of_their_values_and_follow_schedules(
    kind: str, dtype: torch.dtype
) -> None:
    balancing = build(kind)
    learn(balancing)
    given = {name: value.requires_grad_() for name, value in values(dtype).items()}
    found = balancing(given, 0.5)
    assert list(found) == list(given)
    assert all(value.dtype == dtype and not value.requires_grad for value in found.values())
    at_start = balancing(given, 0.0)
    assert found["recon"].item() == pytest.approx(0.5 * at_start["recon"].item())
    assert balancing({}, 0.0) == {}
    assert not balancing.is_active("recon", 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_asking_for_lambdas_changes_nothing(kind: str) -> None:
    balancing = build(kind)
    learn(balancing)
    before = {name: value.clone() for name, value in balancing.state_dict().items()}
    balancing(values(), 0.3)
    balancing(values(action=3.0), 0.3)
    after = balancing.state_dict()
    assert all(
        torch.equal(value.nan_to_num(-1), after[name].nan_to_num(-1)) for name, value in before.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_no_parameters_and_a_loaded_state_gives_the_same_lambdas(kind: str) -> None:
    one, other = build(kind), build(kind)
    assert not list(one.parameters())
    learn(one)
    other.load_state_dict(one.state_dict())
    for _ in range(2):
        found, expected = other(values(torch.float64), 0.25), one(values(torch.float64), 0.25)
        assert {n: v.item() for n, v in found.items()} == {n: v.item() for n, v in expected.items()}
        learn(one)
        learn(other)


@pytest.mark.parametrize("kind", ["dwa", "rlw", "famo"])
def test_scale_free_methods_sum_to_the_number_of_terms(kind: str) -> None:
    balancing = build(kind)
    learn(balancing)
    for given in (values(), values(action=0.3, align=2.0)):
        assert sum(float(b) for b in balancing.factors(given).values()) == pytest.approx(len(given))
