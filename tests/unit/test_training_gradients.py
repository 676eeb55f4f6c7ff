"""Gradients term by term: where terms compete, and how long their gradients are there."""

from __future__ import annotations

import math

import pytest
import torch

from fixtures.linear_terms import SHARED, SIZES, parameters, rows, terms
from tutti.objectives.objective import TermSize
from tutti.training.backward.term_gradients import shared_numbers, term_gradients, term_sizes

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


def test_sizes_are_over_what_a_term_and_action_move_pair_by_pair() -> None:
    one, nan = torch.tensor([3.0, 4.0]), torch.tensor([math.nan])
    found = term_sizes(
        {
            "action": [one, 2 * one, None, one, one],
            "recon": [one, None, one, None, 0 * one],
            "align": [None, one, None, 2 * one, None],
            "stopped": [None] * 5,
            "bad": [nan, None, None, None, None],
        },
        {"action": 0.5, "recon": 0.1, "align": 0.2, "stopped": 3.0},
    )
    whole = (3 * 25 + 100) ** 0.5
    assert found["action"] == TermSize(own=whole, primary=whole, anywhere=whole, value=0.5)
    assert found["recon"] == TermSize(own=5.0, primary=5.0, anywhere=50**0.5, value=0.1)
    both = 125**0.5
    assert found["align"] == TermSize(own=both, primary=both, anywhere=both, value=0.2)
    assert found["stopped"] == TermSize(own=0.0, primary=0.0, anywhere=0.0, value=3.0)
    assert math.isnan(found["bad"].anywhere)


def test_sizes_are_those_of_the_real_gradients_and_nothing_is_lost_of_tiny_ones() -> None:
    given, first = parameters(), rows(0)
    found = term_sizes(term_gradients(terms(given, first).values, list(given.values())), {})
    for term, own in first.items():
        both = [name for name in own if name in first["action"]]
        for side, of in (("own", own), ("primary", first["action"])):
            expected = torch.cat([of[name] for name in both]).norm()
            assert getattr(found[term], side) == pytest.approx(expected.item(), rel=1e-6)
    tiny = torch.full((4,), 1e-30)
    assert term_sizes({"action": [tiny], "recon": [tiny]}, {})["recon"].own == pytest.approx(2e-30)


def test_without_action_nothing_is_shared() -> None:
    given, first = parameters(), rows(0)
    without = term_gradients(terms(given, {"recon": first["recon"]}).values, list(given.values()))
    assert shared_numbers(without) == []
    assert term_sizes(without, {})["recon"].own == 0
