"""The bins decoder: which bin a value falls in, its centre, the cross-entropy, both estimates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures.small_decoders import (
    ACTION,
    HORIZON,
    batch,
    build,
    chunks,
    doubled,
    features,
    fitted,
    gradients,
    holes,
)
from tutti.models.decoders.bins import BinsDecoder
from tutti.types import masked_mean


def decoder(**options: Any) -> BinsDecoder:
    made = build("bins", **options)
    assert isinstance(made, BinsDecoder)
    return made


def of_range(low: list[float], high: list[float], bins: int) -> BinsDecoder:
    made = decoder(bins=bins)
    made.low.copy_(torch.tensor(low))
    made.high.copy_(torch.tensor(high))
    made.fitted.fill_(True)
    return made


def columns(*values: float) -> Tensor:
    """One window, one step a value, the same in every dimension."""
    return torch.tensor(values)[None, :, None].expand(1, -1, ACTION)


def test_bins_and_centres_by_hand() -> None:
    bins = of_range([-1.0, 0.0, -2.0], [1.0, 4.0, 2.0], bins=4)
    found = bins.bin_of(columns(-1.0, -0.51, -0.5, 0.0, 0.99))
    assert found[0, :, 0].tolist() == [0, 0, 1, 2, 3]
    assert found[0, :, 1].tolist() == [0, 0, 0, 0, 0]
    assert found[0, :, 2].tolist() == [1, 1, 1, 2, 2]
    centres = bins.centre_of(torch.arange(4)[None, :, None].expand(1, 4, ACTION))
    assert centres[0, :, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert centres[0, :, 1].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_what_lies_outside_falls_in_the_end_bins() -> None:
    bins = of_range([-1.0] * 3, [1.0] * 3, bins=256)
    assert bins.bin_of(columns(-50.0, -1.0001, 1.0, 1.0001, 1e9))[0, :, 0].tolist() == [0, 0, 255, 255, 255]


def test_a_value_and_its_bins_centre_lie_half_a_bin_apart_at_most() -> None:
    bins = fitted("bins")
    assert isinstance(bins, BinsDecoder)
    actions, _ = chunks(64, seed=7)
    inside = (actions >= bins.low) & (actions <= bins.high)
    assert inside.float().mean() > 0.97
    distance = (bins.centre_of(bins.bin_of(actions)) - actions).abs()
    assert bool((distance <= 0.501 * (bins.high - bins.low) / 256)[inside].all())


def test_the_range_is_the_percentiles_of_what_is_present() -> None:
    bins = decoder()
    actions, mask = chunks(64, seed=7)
    mask[::3, 2:] = False
    bins.fit(torch.where(mask, actions, torch.tensor(1e6)), mask)
    for dimension in range(ACTION):
        values = actions[..., dimension][mask[..., dimension]].double().numpy()
        expected = np.quantile(values, [0.01, 0.99])
        assert [float(bins.low[dimension]), float(bins.high[dimension])] == pytest.approx(expected.tolist())


def test_dimensions_that_hardly_move_still_have_bins() -> None:
    bins = decoder()
    actions = torch.zeros(1000, 1, ACTION)
    actions[:5, 0, 0] = 2.0  # rarer than the percentiles see: from smallest to largest
    actions[:, 0, 1] = 0.7  # never moves: 1e-3 around it
    mask = torch.ones_like(actions, dtype=torch.bool)
    mask[..., 2] = False  # does not exist: -1 to 1
    bins.fit(actions, mask)
    torch.testing.assert_close(bins.low, torch.tensor([0.0, 0.6995, -1.0]))
    torch.testing.assert_close(bins.high, torch.tensor([2.0, 0.7005, 1.0]))
    still = bins.centre_of(bins.bin_of(torch.full((1, 1, ACTION), 0.7)))
    assert float(still[0, 0, 1]) == pytest.approx(0.7, abs=1e-5)


def test_the_error_and_its_gradient_are_those_of_the_formula() -> None:
    bins = of_range([-1.0] * 3, [1.0] * 3, bins=8).double()
    seen, given = features(dtype=torch.float64), doubled(batch(mask=holes()))
    with torch.no_grad():
        bins.out.weight.normal_()
    logits = bins.logits(seen)
    assert logits.shape == (4, HORIZON, ACTION, 8)
    total = torch.zeros((), dtype=torch.float64)
    for place in given.action_mask.nonzero().tolist():
        scores, value = logits[tuple(place)], float(given.actions[tuple(place)])
        number = min(7, max(0, math.floor(8 * (value + 1) / 2)))
        total = total + scores.exp().sum().log() - scores[number]
    formula = total / given.action_mask.sum()
    value = masked_mean(bins(seen, given), given.action_mask)
    torch.testing.assert_close(value, formula, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(bins, value), gradients(bins, formula), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)


def test_both_estimates_by_hand() -> None:
    likely = of_range([-1.0] * 3, [1.0] * 3, bins=4)
    mean = decoder(bins=4, estimate="expectation")
    for bins in (likely, mean):
        with torch.no_grad():
            bins.out.weight.zero_()
            bins.out.bias.copy_(torch.tensor([0.4, 0.1, 0.2, 0.3]).log().repeat(ACTION))
    torch.testing.assert_close(likely.predict(features(2)), torch.full((2, HORIZON, ACTION), -0.75))
    expected = 0.4 * -0.75 + 0.1 * -0.25 + 0.2 * 0.25 + 0.3 * 0.75
    torch.testing.assert_close(mean.predict(features(2)), torch.full((2, HORIZON, ACTION), expected))
