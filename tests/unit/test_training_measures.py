"""Shares, cosines, dead units, noise scale and spikes, on numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fixtures.learnable import make_batch
from tutti.training.diagnostics.loss_spikes import SpikeDetector, SpikesConfig
from tutti.training.diagnostics.measures import (
    DEAD_DEVIATION,
    dead_share,
    gradient_measures,
    update_ratio,
    weighted_sum,
)
from tutti.training.diagnostics.noise_scale import KEEP, NoiseScale
from tutti.training.faults.saved_steps import keep_newest


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def everywhere(count: int, width: int = 3) -> torch.Tensor:
    return torch.ones(count, width, dtype=torch.bool)


GRADIENTS = {
    # parameter 0 and 1: vision; parameter 2: fusion
    "action": [vector(3.0, 4.0), vector(0.0), vector(2.0)],
    "recon": [vector(-3.0, 0.0), None, None],
}


def test_norms_are_weighted_shares_sum_to_one_and_cosines_ignore_lambda() -> None:
    """A cosine is over the parameters that both reach; what is undefined is left out."""
    found = gradient_measures(GRADIENTS, {"action": 2.0, "recon": 0.5}, {"vision": [0, 1], "fusion": [2]})
    assert found == {
        "norm/action/vision": pytest.approx(10.0),
        "norm/recon/vision": pytest.approx(1.5),
        "share/action/vision": pytest.approx(10 / 11.5),
        "share/recon/vision": pytest.approx(1.5 / 11.5),
        "cosine/action~recon/vision": pytest.approx(-0.6),
        "norm/action/fusion": pytest.approx(4.0),
        "norm/recon/fusion": 0,
        "share/action/fusion": 1,
        "share/recon/fusion": 0,
    }
    zero = {"action": [vector(0.0)], "recon": [vector(1.0)]}
    lambdas = {"action": 1.0, "recon": 1.0}
    assert "cosine/action~recon/x" not in gradient_measures(zero, lambdas, {"x": [0]})
    nothing = gradient_measures({"action": [None], "recon": [None]}, lambdas, {"x": [0]})
    assert nothing == {"norm/action/x": 0.0, "norm/recon/x": 0.0}
    assert gradient_measures({}, {}, {"x": [0]}) == {}


def test_weighted_sum_is_the_gradient_of_the_total() -> None:
    total = weighted_sum(GRADIENTS, {"action": 2.0, "recon": 0.5})
    assert [None if t is None else t.tolist() for t in total] == [[4.5, 8.0], [0.0], [4.0]]
    assert weighted_sum({"a": [None]}, {"a": 1.0}) == [None]
    assert GRADIENTS["action"][0].tolist() == [3.0, 4.0]  # what went in is as it was


def test_a_unit_that_only_knows_its_token_is_dead() -> None:
    values = torch.zeros(4, 3, 4)
    values[:, :, 0] = torch.arange(3.0)  # a position, the same for every sample
    values[:, :, 1] = 5.0  # constant
    values[2, 1, 2] = 0.9 * DEAD_DEVIATION  # moves, by too little
    values[2, 1, 3] = 2.0 * DEAD_DEVIATION  # moves in one token of one sample
    assert dead_share(values, everywhere(4)) == 0.75


def test_masked_tokens_neither_keep_a_unit_alive_nor_spoil_it() -> None:
    values, mask = torch.zeros(3, 3, 1), everywhere(3)
    values[0, 2], mask[0, 2] = math.nan, False
    assert dead_share(values, mask) == 1.0
    values[1, 0] = 1.0
    assert dead_share(values, mask) == 0.0
    assert dead_share(values[:1], mask[:1]) is None  # one sample cannot be compared


def test_update_ratio_is_of_the_part_as_one_vector() -> None:
    before, after = [vector(3.0), vector(4.0)], [vector(3.0), vector(4.5)]
    assert update_ratio(before, after) == pytest.approx(0.1)
    assert update_ratio([vector(0.0)], [vector(1.0)]) is None


def test_noise_scale_recovers_signal_and_trace() -> None:
    """E |G_n|^2 = |G|^2 + tr / n: exact expectations in, exact estimates out."""
    signal, trace, b, big = 2.0, 48.0, 4, 16
    noise = NoiseScale()
    for _ in range(3):
        found = noise.add(signal + trace / b, signal + trace / big, b, big)
        assert found["signal"] == pytest.approx(signal)
        assert found["noise_trace"] == pytest.approx(trace)
        assert found["noise_scale"] == pytest.approx(24.0)


def test_noise_scale_averages_numerator_and_denominator_apart() -> None:
    assert "noise_scale" not in NoiseScale().add(small=1.0, large=2.0, b=4, B=16)  # it would be negative
    noise = NoiseScale()
    noise.add(1 + 8 / 4, 1 + 8 / 16, 4, 16)
    found = noise.add(3 + 2 / 4, 3 + 2 / 16, 4, 16)
    old, new = KEEP * (1 - KEEP), 1 - KEEP
    assert found["noise_scale"] == pytest.approx((8 * old + 2 * new) / (1 * old + 3 * new))


def test_single_estimates_are_unbiased_though_the_small_batch_is_part_of_the_large_one() -> None:
    """Per-sample gradients of mean (2, 0) and unit variance in 2 dimensions: |G|^2 = 4, tr = 2."""
    random = torch.Generator().manual_seed(0)
    looks = []
    for _ in range(2000):
        samples = torch.randn(32, 2, generator=random) + torch.tensor([2.0, 0.0])
        small, large = (float(samples[:n].mean(0).square().sum()) for n in (16, 32))
        looks.append(NoiseScale().add(small, large, 16, 32))
    signal, trace = (sum(look[name] for look in looks) / len(looks) for name in ("signal", "noise_trace"))
    assert signal == pytest.approx(4.0, rel=0.03)
    assert trace == pytest.approx(2.0, abs=0.7)


def feed(detector: SpikeDetector, values: list[float], term: str = "action") -> list[float]:
    """The z of the spikes."""
    return [z for value in values for z in detector.detect({term: value}).values()]


def wave(count: int) -> list[float]:
    return [1.0 + 0.1 * (-1) ** n for n in range(count)]


def test_spike_is_far_above_the_mean_after_the_warm_up_only() -> None:
    settings = SpikesConfig(warmup=20)
    assert feed(SpikeDetector(settings), [*wave(19), 9.0]) == []
    detector = SpikeDetector(settings)
    assert feed(detector, [*wave(20), 0.0, 1.55]) == []
    detector = SpikeDetector(settings)
    # 20 values of mean 1 and standard deviation 0.1
    assert feed(detector, [*wave(20), 9.0]) == [pytest.approx(80.0)]
    assert detector.count == 1


def test_one_spike_does_not_hide_the_next_but_a_new_level_is_learned() -> None:
    detector = SpikeDetector(SpikesConfig(warmup=20))
    assert len(feed(detector, [*wave(40), 9.0, *wave(6), 9.0])) == 2
    late = feed(detector, [9.0] * 100)
    assert 0 < len(late) < 60
    assert feed(detector, [9.0] * 20) == []


def test_terms_have_levels_of_their_own_and_warm_up_when_they_appear() -> None:
    detector = SpikeDetector(SpikesConfig(warmup=10))
    feed(detector, wave(30))
    assert feed(detector, [50.0] * 3, term="align") == []
    assert set(detector.detect({"action": 9.0, "align": 50.0})) == {"action"}


def test_falling_loss_and_constant_loss_have_no_spike() -> None:
    falling = [2 * math.exp(-n / 50) + 0.02 * (-1) ** n for n in range(400)]
    assert feed(SpikeDetector(SpikesConfig()), falling) == []
    assert feed(SpikeDetector(SpikesConfig()), [1.0] * 200 + [1.004]) == []
    assert feed(SpikeDetector(SpikesConfig(z_threshold="off", warmup=1)), [*wave(9), 99.0]) == []


def test_state_of_the_detector_continues_to_the_same_digits() -> None:
    one = SpikeDetector(SpikesConfig(warmup=5))
    feed(one, [*wave(9), 7.0])
    other = SpikeDetector(SpikesConfig(warmup=5))
    other.load_state_dict(one.state_dict())
    assert feed(one, [1.3, 9.0]) == feed(other, [1.3, 9.0]) and one.state_dict() == other.state_dict()


def test_only_the_newest_spikes_are_kept(tmp_path: Path) -> None:
    for step in (90, 100, 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000100", "step-1000000"]
    keep_newest(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 2


def test_first_windows_of_a_batch_have_everything_that_the_batch_has() -> None:
    batch = make_batch(3, size=6)
    few = batch.first(2)
    assert few.window.tolist() == batch.window[:2].tolist()
    assert few.observation.images.shape[0] == few.futures[4].mask.shape[0] == len(few.actions) == 2
    assert few.later_states is not None and batch.later_states is not None
    assert few.later_states.labels == batch.later_states.labels
    assert torch.equal(few.futures[4].observation.images, batch.futures[4].observation.images[:2])
    assert few.progress is None
