"""Flow and diffusion: their levels, errors and steps, the one noise, the range that predictions keep to."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
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
from tutti.models.decoders.denoising import (
    DiffusionConfig,
    DiffusionDecoder,
    FlowDecoder,
    Prediction,
    cosine_shares,
    visited_levels,
)
from tutti.models.decoders.trunk import ChunkNetwork, Condition, level_waves
from tutti.types import masked_mean

PREDICTIONS: tuple[Prediction, ...] = ("sample", "velocity", "noise")


def flow(**options: object) -> FlowDecoder:
    return cast("FlowDecoder", build("flow", **options))


def diffusion_of(**options: object) -> DiffusionDecoder:
    return cast("DiffusionDecoder", fitted("diffusion", **options))


class Field(ChunkNetwork):
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
    u = flow().draw_levels(100_000, torch.empty(0, dtype=torch.float64))
    assert float(u.min()) >= 0 and float(u.max()) < 0.999
    for at in (0.1, 0.3, 0.6, 0.9):
        cumulated = 1 - (1 - at / 0.999) ** 1.5  # P(b > 1 - at / 0.999) for b ~ Beta(1.5, 1)
        assert float((u < at).double().mean()) == pytest.approx(cumulated, abs=0.005)
    assert float(u.mean()) == pytest.approx(0.999 * (1 - 1.5 / 2.5), abs=0.002)
    assert (u < 0.1).sum() > 2 * (u > 0.899).sum()


def test_the_error_of_flow_and_its_gradient_are_those_of_the_formula() -> None:
    made = flow(draws=1).double()
    seen, given = features(dtype=torch.float64), doubled(batch(mask=holes()))
    torch.manual_seed(5)
    u = 0.999 * (1 - torch.rand(4, dtype=torch.float64) ** (2 / 3))
    eps = torch.randn(4, HORIZON, ACTION, dtype=torch.float64)
    mix = (1 - u[:, None, None]) * eps + u[:, None, None] * given.actions
    mix = torch.where(given.action_mask, mix, eps)
    velocity = made.denoiser(mix, u, made.conditioning(seen))
    square = (velocity - (given.actions - eps)) ** 2
    formula = (square * given.action_mask).sum() / given.action_mask.sum()
    torch.manual_seed(5)
    value = masked_mean(made(seen, given), given.action_mask)
    torch.testing.assert_close(value, formula, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(made, value), gradients(made, formula), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_several_draws_are_the_mean_of_single_ones() -> None:
    many = flow(draws=3).double()
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
    made = flow(steps=4)
    target = batch(4).actions
    made.denoiser = Field(target, straight=True)
    torch.testing.assert_close(made.predict(features()), target, rtol=0, atol=1e-5)
    assert made.denoiser.seen == [0.0, 0.25, 0.5, 0.75]
    made.denoiser = Field(target, straight=False)  # dx/du = -x: each step takes a quarter off
    torch.testing.assert_close(made.predict(features())[0], 0.75**4 * made.noise)


def test_the_noise_has_its_own_seed_and_leaves_the_global_generator_alone() -> None:
    first = flow(noise_seed=4)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = flow(noise_seed=4)
    assert torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, flow(noise_seed=5).noise)
    assert "noise" in first.state_dict() and first.noise.shape == (HORIZON, ACTION)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), flow(noise_seed=9).parameters(), strict=True)
    )
    torch.set_rng_state(before)


def test_temperature_scales_the_noise_that_predict_starts_from() -> None:
    made = flow(temperature=0.25)
    made.denoiser = Field(torch.zeros(()), straight=False)
    torch.testing.assert_close(made.predict(features())[0], 0.25 * 0.9**10 * made.noise)
    cold = flow(temperature=0.0)
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


class Oracle(ChunkNetwork):
    """A network that knows the clean chunk."""

    def __init__(self, diffusion: DiffusionDecoder, actions: Tensor) -> None:
        super().__init__()
        self.share, self.levels = diffusion.share, diffusion.levels
        self.prediction, self.actions = diffusion.prediction, actions
        self.visited: list[int] = []

    def forward(self, chunk: Tensor, level: Tensor, condition: Condition) -> Tensor:
        k = round(float(level[0]) * self.levels)
        self.visited.append(k)
        clean, noisy = self.share[k].sqrt(), (1 - self.share[k]).sqrt()
        noise = (chunk - clean * self.actions) / noisy
        outputs = {"sample": self.actions, "velocity": clean * noise - noisy * self.actions, "noise": noise}
        return outputs[self.prediction]


def test_the_shares_are_the_cosine_schedule() -> None:
    share = cosine_shares(100)
    assert share.shape == (101,) and share[0] == 1
    for k in (1, 10, 50, 99):
        f = [math.cos((at / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for at in (k, 0)]
        assert float(share[k]) == pytest.approx(f[0] / f[1], rel=1e-5)
    assert float(share[100]) == pytest.approx(float(share[99]) * 0.001, rel=1e-4)  # beta stops at 0.999
    assert bool((share.diff() < 0).all())


def test_levels_are_visited_from_the_noisiest_down_to_one() -> None:
    assert visited_levels(100, 10) == [100, 89, 78, 67, 56, 45, 34, 23, 12, 1]
    assert visited_levels(10, 10) == list(range(10, 0, -1))
    assert visited_levels(100, 1) == [100]
    for steps in range(2, 51):
        levels = visited_levels(50, steps)
        assert len(set(levels)) == steps and levels == sorted(levels, reverse=True)
    with pytest.raises(ValueError, match="sampling_steps 11 is more than training_steps 10"):
        DiffusionConfig(sampling_steps=11, training_steps=10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_error_of_diffusion_and_its_gradient_are_those_of_the_formula(prediction: Prediction) -> None:
    diffusion = diffusion_of(draws=1, prediction=prediction).double()
    seen, given = features(dtype=torch.float64), doubled(batch(mask=holes()))
    torch.manual_seed(5)
    k = torch.randint(1, 101, (4,))
    eps = torch.randn(4, HORIZON, ACTION, dtype=torch.float64)
    share = cosine_shares(100).double()[k][:, None, None]
    a = given.actions
    mix = torch.where(given.action_mask, share.sqrt() * a + (1 - share).sqrt() * eps, eps)
    target = {"sample": a, "velocity": share.sqrt() * eps - (1 - share).sqrt() * a, "noise": eps}[prediction]
    square = (diffusion.denoiser(mix, k.double() / 100, diffusion.conditioning(seen)) - target) ** 2
    formula = (square * given.action_mask).sum() / given.action_mask.sum()
    torch.manual_seed(5)
    value = masked_mean(diffusion(seen, given), given.action_mask)
    torch.testing.assert_close(value, formula, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(diffusion, value), gradients(diffusion, formula), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_perfect_network_gives_the_action_whatever_it_predicts(prediction: Prediction, steps: int) -> None:
    diffusion = diffusion_of(prediction=prediction, sampling_steps=steps).double()
    actions = 0.5 * batch().actions.double()
    diffusion.low.fill_(-5.0)
    diffusion.high.fill_(5.0)
    oracle = Oracle(diffusion, actions)
    diffusion.denoiser = oracle
    seen = features(dtype=torch.float64)
    torch.testing.assert_close(diffusion.predict(seen), actions, rtol=0, atol=1e-9)
    assert oracle.visited == visited_levels(100, steps)


def test_predictions_stay_in_the_range_of_the_training_data() -> None:
    diffusion = diffusion_of()
    actions, _ = chunks(64, seed=7)
    torch.testing.assert_close(diffusion.low, actions.amin((0, 1)))
    torch.testing.assert_close(diffusion.high, actions.amax((0, 1)))
    diffusion.denoiser = Oracle(diffusion, torch.full((4, HORIZON, ACTION), 100.0))
    torch.testing.assert_close(diffusion.predict(features())[0, 0], diffusion.high)


def test_masked_actions_do_not_widen_the_range() -> None:
    diffusion = DiffusionConfig().build(SMALL, WIDTH)
    actions, mask = torch.zeros(3, HORIZON, ACTION), torch.ones(3, HORIZON, ACTION, dtype=torch.bool)
    actions[0, 0] = torch.tensor([-2.0, 0.5, 7.0])
    actions[1, 4], mask[1, 4] = 99.0, False
    mask[..., 2] = False
    diffusion.fit(actions, mask)
    assert diffusion.low.tolist() == [-2.0, 0.0, -1.0]
    assert diffusion.high.tolist() == [0.0, 0.5, 1.0]


def test_ddim_mixes_the_clipped_chunk_with_the_noise_that_is_left() -> None:
    diffusion = diffusion_of(sampling_steps=2)
    diffusion.denoiser = Oracle(diffusion, torch.full((1, HORIZON, ACTION), 0.25))
    share = cosine_shares(100)
    eps = (diffusion.noise - share[100].sqrt() * 0.25) / (1 - share[100]).sqrt()
    middle = share[1].sqrt() * 0.25 + (1 - share[1]).sqrt() * eps
    seen: list[Tensor] = []
    diffusion.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    diffusion.predict(features(1))
    torch.testing.assert_close(seen[0][0], diffusion.noise)
    torch.testing.assert_close(seen[1][0], middle)
