"""The flow decoder: its path, its levels, its error, its Euler steps and its one noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fixtures.small_decoders import ACTION, HORIZON, batch, build, doubled, features, gradients, holes
from tutti.models.decoders.denoising import FlowDecoder, level_waves
from tutti.models.decoders.trunk import Condition
from tutti.types import masked_mean


def decoder(**options: object) -> FlowDecoder:
    made = build("flow", **options)
    assert isinstance(made, FlowDecoder)
    return made


class Field(nn.Module):
    """A known vector field in place of the network."""

    def __init__(self, target: Tensor, *, straight: bool) -> None:
        super().__init__()
        self.target, self.straight = target, straight
        self.seen: list[float] = []

    def forward(self, chunk: Tensor, level: Tensor, condition: Condition) -> Tensor:
        self.seen.append(float(level[0]))
        return (self.target - chunk) / (1 - level[0]) if self.straight else -chunk


def test_levels_are_those_of_pi0_and_the_noisy_end_is_seen_most() -> None:
    torch.manual_seed(0)
    u = decoder().draw_levels(100_000, torch.empty(0, dtype=torch.float64))
    assert float(u.min()) >= 0 and float(u.max()) < 0.999
    for at in (0.1, 0.3, 0.6, 0.9):
        cumulated = 1 - (1 - at / 0.999) ** 1.5  # P(b > 1 - at / 0.999) for b ~ Beta(1.5, 1)
        assert float((u < at).double().mean()) == pytest.approx(cumulated, abs=0.005)
    assert float(u.mean()) == pytest.approx(0.999 * (1 - 1.5 / 2.5), abs=0.002)
    assert (u < 0.1).sum() > 2 * (u > 0.899).sum()


def test_the_error_and_its_gradient_are_those_of_the_formula() -> None:
    flow = decoder(draws=1).double()
    seen, given = features(dtype=torch.float64), doubled(batch(mask=holes()))
    torch.manual_seed(5)
    u = 0.999 * (1 - torch.rand(4, dtype=torch.float64) ** (2 / 3))
    eps = torch.randn(4, HORIZON, ACTION, dtype=torch.float64)
    mix = (1 - u[:, None, None]) * eps + u[:, None, None] * given.actions
    mix = torch.where(given.action_mask, mix, eps)
    velocity = flow.denoiser(mix, u, flow.conditioning(seen))
    square = (velocity - (given.actions - eps)) ** 2
    formula = (square * given.action_mask).sum() / given.action_mask.sum()
    torch.manual_seed(5)
    value = masked_mean(flow(seen, given), given.action_mask)
    torch.testing.assert_close(value, formula, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(flow, value), gradients(flow, formula), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_several_draws_are_the_mean_of_single_ones() -> None:
    many = decoder(draws=3).double()
    seen, given = features(dtype=torch.float64), doubled(batch())
    torch.manual_seed(6)
    levels = many.draw_levels(12, given.actions)
    noise = torch.randn(12, HORIZON, ACTION, dtype=torch.float64)
    condition = many.conditioning(seen)
    single = [
        many.error_at(condition, given.actions, given.action_mask, levels[i : i + 4], noise[i : i + 4])
        for i in (0, 4, 8)
    ]
    torch.manual_seed(6)
    torch.testing.assert_close(many(seen, given), torch.stack(single).mean(0), rtol=1e-12, atol=1e-12)


def test_euler_steps_follow_a_known_field() -> None:
    flow = decoder(steps=4)
    target = batch(4).actions
    flow.denoiser = Field(target, straight=True)
    torch.testing.assert_close(flow.predict(features()), target, rtol=0, atol=1e-5)
    assert flow.denoiser.seen == [0.0, 0.25, 0.5, 0.75]
    flow.denoiser = Field(target, straight=False)  # dx/du = -x: each step takes a quarter off
    torch.testing.assert_close(flow.predict(features())[0], 0.75**4 * flow.noise)


def test_the_noise_has_its_own_seed_and_leaves_the_global_generator_alone() -> None:
    first = decoder(noise_seed=4)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = decoder(noise_seed=4)
    assert torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, decoder(noise_seed=5).noise)
    assert "noise" in first.state_dict() and first.noise.shape == (HORIZON, ACTION)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), decoder(noise_seed=9).parameters(), strict=True)
    )
    torch.set_rng_state(before)


def test_temperature_scales_the_noise_that_predict_starts_from() -> None:
    flow = decoder(temperature=0.25)
    flow.denoiser = Field(torch.zeros(()), straight=False)
    torch.testing.assert_close(flow.predict(features())[0], 0.25 * 0.9**10 * flow.noise)
    cold = decoder(temperature=0.0)
    cold.denoiser = Field(torch.zeros(()), straight=False)
    assert not cold.predict(features()).any()


def test_level_waves_by_hand() -> None:
    waves = level_waves(torch.tensor([0.0, 0.5], dtype=torch.float64), 4)
    assert waves[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    # Periods 0.004 and 4: half a level is 125 whole turns of the first, an eighth of a turn of the second.
    torch.testing.assert_close(
        waves[1], torch.tensor([0.0, 0.5**0.5, 1.0, 0.5**0.5], dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert level_waves(torch.zeros(2), 5).shape == (2, 5)
