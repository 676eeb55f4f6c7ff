"""Gradients term by term: where terms compete, and how long their gradients are there."""

from __future__ import annotations

import pytest
import torch

from fixtures.linear_terms import SHARED, SIZES, parameters, rows, terms
from tutti.training.backward.term_gradients import shared_norms, shared_numbers, term_gradients
from tutti.types import UserError

NAMES = list(SIZES)


def test_shared_is_what_action_and_another_term_move() -> None:
    given = parameters()
    found = term_gradients(terms(given, rows(0)).values, list(given.values()))
    assert [NAMES[number] for number in shared_numbers(found)] == list(SHARED)


def test_a_gradient_of_zeros_moves_nothing_and_one_of_nan_does() -> None:
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.tensor([0.0, float("nan")])
    found = {
        "action": [one, one, zero, one, one, None, torch.zeros(0)],
        "recon": [zero, None, one, one, nan, one, torch.zeros(0)],
    }
    assert shared_numbers(found) == [3, 4]


def test_norms_are_over_the_shared_parameters_for_action_too() -> None:
    given, first = parameters(), rows(0)
    found = shared_norms(term_gradients(terms(given, first).values, list(given.values())))
    for term, own in first.items():
        expected = torch.cat([row for name, row in own.items() if name in SHARED]).norm()
        assert found[term] == pytest.approx(expected.item(), rel=1e-6)


def test_alone_action_is_measured_over_all_that_it_moves_and_without_it_nothing_is() -> None:
    given, first = parameters(), rows(0)
    found = term_gradients(terms(given, {"action": first["action"]}).values, list(given.values()))
    assert shared_norms(found)["action"] == pytest.approx(
        torch.cat([*first["action"].values()]).norm().item()
    )
    assert shared_numbers(found) == []
    without = term_gradients(terms(given, {"recon": first["recon"]}).values, list(given.values()))
    assert shared_numbers(without) == []
    with pytest.raises(UserError, match="'action', but that term is not computed"):
        shared_norms(without)
