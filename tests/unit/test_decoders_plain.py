"""Regression (L1, smooth L1, a gripper with two values) and bins (edges, cross-entropy, both estimates)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.small_decoders import (
    ACTION,
    HORIZON,
    SMALL,
    WIDTH,
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
from tutti.models.decoders.regression import (
    Gripper,
    GripperConfig,
    RegressionConfig,
    RegressionDecoder,
)
from tutti.types import UserError, masked_mean

GRIPPER = {"gripper": {"dimension": -1, "weight": 0.5}}


def test_the_default_regression_is_the_plain_l1_decoder_to_the_last_bit() -> None:
    decoder, seen, given = build("regression"), features(), batch()
    assert list(decoder.state_dict()) == ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]
    assert not decoder.needs_fit
    torch.manual_seed(0)
    hidden, out = torch.nn.Linear(WIDTH, 256), torch.nn.Linear(256, HORIZON * ACTION)
    with torch.no_grad():
        out.weight.mul_(0.1)
        out.bias.zero_()
    chunk = out(hidden(seen.readout).relu()).view(-1, HORIZON, ACTION)
    assert torch.equal(decoder.predict(seen), chunk)
    assert torch.equal(decoder(seen, given), (chunk - given.actions).abs())


def test_smooth_l1_by_hand() -> None:
    decoder = build("regression", loss="smooth_l1", beta=0.5)
    assert isinstance(decoder, RegressionDecoder)
    with torch.no_grad():
        decoder.out.weight.zero_()  # so every prediction is 0
    given = batch(1)
    actions = given.actions.clone()
    actions[0, 0] = torch.tensor([0.2, -0.5, 3.0])
    error = decoder(features(1), replace(given, actions=actions))
    expected = torch.tensor([0.2**2 / (2 * 0.5), 0.5 - 0.25, 3.0 - 0.25])
    torch.testing.assert_close(error[0, 0], expected)


@pytest.mark.parametrize("options", [{}, {"loss": "smooth_l1", "beta": 0.3}, GRIPPER])
def test_the_gradient_of_regression_is_that_of_the_formula(options: dict[str, object]) -> None:
    decoder = build("regression", **options).double()
    assert isinstance(decoder, RegressionDecoder)
    if decoder.needs_fit:
        decoder.fit(*chunks(64, seed=7))
    seen, given = features(dtype=torch.float64), doubled(batch(mask=holes()))
    output = decoder.out(decoder.hidden(seen.readout).relu()).view(-1, HORIZON, ACTION)
    difference = output - given.actions
    error = difference.abs()
    if "loss" in options:
        error = torch.where(error < 0.3, difference.square() / 0.6, error - 0.15)
    if "gripper" in options:
        logit, closed = output[..., -1], (given.actions[..., -1] > 0).double()
        question = 0.5 * (F.softplus(logit) - closed * logit)
        error = torch.cat([error[..., :-1], question[..., None]], dim=-1)
    formula = (error * given.action_mask).sum() / given.action_mask.sum()
    value = masked_mean(decoder(seen, given), given.action_mask)
    torch.testing.assert_close(value, formula, rtol=1e-12, atol=0)
    pairs = zip(gradients(decoder, value), gradients(decoder, formula), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def two_valued(low: float, high: float, odd: int = 0) -> tuple[Tensor, Tensor]:
    """1000 windows of one step whose first dimension is `low` or `high`, but for `odd` of them in between."""
    actions = torch.zeros(1000, 1, ACTION)
    actions[:, 0, 0] = low
    actions[600:, 0, 0] = high
    actions[:odd, 0, 0] = low + 0.4 * (high - low)
    return actions, torch.ones_like(actions, dtype=torch.bool)


def test_the_gripper_finds_its_two_values_and_predicts_nothing_else() -> None:
    decoder = RegressionConfig(gripper=GripperConfig(dimension=0)).build(SMALL, WIDTH)
    decoder.fit(*two_valued(-0.25, 3.0, odd=20))
    assert isinstance(decoder.gripper, Gripper)
    assert decoder.gripper.values.tolist() == [-0.25, 3.0]
    with torch.no_grad():
        decoder.out.weight.mul_(50)
    chunk = decoder.predict(features(32))
    assert set(chunk[..., 0].unique().tolist()) == {-0.25, 3.0}
    assert len(chunk[..., 1].unique()) > 100
    logits = decoder.out(decoder.hidden(features(32).readout).relu()).view(-1, HORIZON, ACTION)[..., 0]
    assert torch.equal(chunk[..., 0] == 3.0, logits > 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (two_valued(0.0, 1.0, odd=21), r"action dimension 0 is not binary: 2\.1 % of its values"),
        (two_valued(0.5, 0.5), r"has one value only, 0\.5"),
    ],
)
def test_a_dimension_that_is_not_binary_is_refused(data: tuple[Tensor, Tensor], message: str) -> None:
    decoder = RegressionConfig(gripper=GripperConfig(dimension=-ACTION)).build(SMALL, WIDTH)
    with pytest.raises(UserError, match=rf"model\.action\.gripper.*{message}.*model\.action\.gripper=off"):
        decoder.fit(*data)


def test_masked_values_do_not_make_a_gripper_unfit() -> None:
    decoder = RegressionConfig(gripper=GripperConfig(dimension=0)).build(SMALL, WIDTH)
    actions, mask = two_valued(-1.0, 1.0)
    actions[::2], mask[::2] = 0.3, False
    decoder.fit(actions, mask)
    assert decoder.gripper is not None and decoder.gripper.values.tolist() == [-1.0, 1.0]


def test_a_gripper_outside_the_action_is_refused() -> None:
    with pytest.raises(UserError, match=r"gripper\.dimension is 3, but actions have 3.*0 to 2"):
        RegressionConfig(gripper=GripperConfig(dimension=3)).build(SMALL, WIDTH)


def bins_of(**options: Any) -> BinsDecoder:
    made = build("bins", **options)
    assert isinstance(made, BinsDecoder)
    return made


def of_range(low: list[float], high: list[float], bins: int) -> BinsDecoder:
    made = bins_of(bins=bins)
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
    bins = bins_of()
    actions, mask = chunks(64, seed=7)
    mask[::3, 2:] = False
    bins.fit(torch.where(mask, actions, torch.tensor(1e6)), mask)
    for dimension in range(ACTION):
        values = actions[..., dimension][mask[..., dimension]].double().numpy()
        expected = np.quantile(values, [0.01, 0.99])
        assert [float(bins.low[dimension]), float(bins.high[dimension])] == pytest.approx(expected.tolist())


def test_dimensions_that_hardly_move_still_have_bins() -> None:
    bins = bins_of()
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


def test_the_error_of_bins_and_its_gradient_are_those_of_the_formula() -> None:
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
    mean = bins_of(bins=4, estimate="expectation")
    for bins in (likely, mean):
        with torch.no_grad():
            bins.out.weight.zero_()
            bins.out.bias.copy_(torch.tensor([0.4, 0.1, 0.2, 0.3]).log().repeat(ACTION))
    torch.testing.assert_close(likely.predict(features(2)), torch.full((2, HORIZON, ACTION), -0.75))
    expected = 0.4 * -0.75 + 0.1 * -0.25 + 0.2 * 0.25 + 0.3 * 0.75
    torch.testing.assert_close(mean.predict(features(2)), torch.full((2, HORIZON, ACTION), expected))
