"""The regression decoder: the default as it always was, smooth L1, the gripper with two values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

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
    gradients,
    holes,
)
from tutti.models.decoders.regression import (
    Gripper,
    GripperConfig,
    RegressionConfig,
    RegressionDecoder,
)
from tutti.types import UserError, masked_mean

GRIPPER = {"gripper": {"dimension": -1, "weight": 0.5}}


def test_the_default_is_the_plain_l1_decoder_to_the_last_bit() -> None:
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
def test_the_gradient_is_that_of_the_formula(options: dict[str, object]) -> None:
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


def two_valued(low: float, high: float, odd: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
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
def test_a_dimension_that_is_not_binary_is_refused(
    data: tuple[torch.Tensor, torch.Tensor], message: str
) -> None:
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
