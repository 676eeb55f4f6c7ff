"""The masked mean against a loop: what counts, how often a mask that broadcasts counts, and nothing left."""

from __future__ import annotations

import pytest
import torch

from tutti.types import masked_mean

VALUES = torch.arange(12, dtype=torch.float64).reshape(2, 3, 2)
MASK = torch.tensor([[True, False, True], [False, False, True]])


def test_a_mask_that_broadcasts_counts_every_element_that_it_covers() -> None:
    kept = [VALUES[b, t].tolist() for b in range(2) for t in range(3) if MASK[b, t]]
    numbers = [number for pair in kept for number in pair]
    assert masked_mean(VALUES, MASK[..., None]).item() == pytest.approx(sum(numbers) / len(numbers))


def test_over_a_dimension_each_row_has_its_own_count() -> None:
    found = masked_mean(VALUES[..., 0], MASK, dim=1)
    assert found.tolist() == [(0 + 4) / 2, 10 / 1]
    assert masked_mean(VALUES[..., 0], MASK & False, dim=1).tolist() == [0.0, 0.0]


def test_what_does_not_count_may_be_anything_and_gets_no_gradient() -> None:
    values = VALUES.clone()
    values[~MASK] = torch.nan
    values.requires_grad_()
    masked_mean(values, MASK[..., None]).backward()
    assert values.grad is not None
    assert torch.equal(values.grad, (MASK[..., None].double() / 6).expand(2, 3, 2))


def test_nothing_left_is_zero() -> None:
    assert masked_mean(VALUES, torch.zeros(2, 3, 1, dtype=torch.bool)).item() == 0.0
