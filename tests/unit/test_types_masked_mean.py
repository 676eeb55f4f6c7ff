"""The masked mean against a loop, with masks that broadcast and nothing left; the effective rank by hand."""

from __future__ import annotations

import pytest
import torch

from tutti.types import effective_rank, masked_mean

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


def test_the_effective_rank_follows_the_singular_values() -> None:
    two = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    mixed = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.linalg.svdvals(mixed) / torch.linalg.svdvals(mixed).sum()
    for rows, expected in (
        (torch.eye(5, dtype=torch.float64), 5.0),
        (torch.ones(9, 4), 1.0),
        (torch.zeros(3, 4), 0.0),
        (two, 4 / 3**0.75),  # p = (3/4, 1/4): exp(0.75 log(4/3) + 0.25 log 4)
        (torch.cat([two, torch.zeros(5, 2)]), 4 / 3**0.75),
        (two.repeat(1, 3), 4 / 3**0.75),  # wide as well as tall
        (mixed, float((-(shares * shares.log()).sum()).exp())),
    ):
        assert float(effective_rank(rows)) == pytest.approx(expected, rel=1e-6, abs=1e-5)
