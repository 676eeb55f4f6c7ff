"""Clipping: by hand-worked numbers, on synthetic series of norms, in small trainings, exact under resume."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn.parameter import Parameter

from fixtures.run_equality import differing, killed_and_resumed, records
from fixtures.toy_training import Data, make_trainer
from tutti.training.backward.k_gradients import KGradientsConfig
from tutti.training.optim.clipping import Clipper, NormMoments, ZClipConfig

Norms = np.ndarray[Any, np.dtype[np.float64]]


def parameters(**gradients: list[float]) -> dict[str, Parameter]:
    made = {f"model.{name}.w": Parameter(torch.zeros(len(g))) for name, g in gradients.items()}
    for parameter, gradient in zip(made.values(), gradients.values(), strict=True):
        parameter.grad = torch.tensor(gradient)
    return made


def test_zclip_by_hand() -> None:
    """Norms 1 and e^0.5 give m = s = 0.25 of the logarithms; then e^1.75 has z = 6, and k = 2.5."""
    settings, history = ZClipConfig(warmup=2, decay=0.5), NormMoments()
    assert [history.limit(size, settings) for size in (1.0, math.e**0.5)] == [math.inf] * 2
    assert (history.mean, history.variance) == (0.25, 0.0625)
    assert history.threshold(settings) == pytest.approx(math.exp(0.25 + 2.5 * 0.25))
    assert history.limit(math.e**1.75, settings) == pytest.approx(math.exp(0.25 + 6.25 / 6 * 0.25))
    assert history.mean == pytest.approx(0.25 + 0.5 * 2.5 * 0.25)  # as if it had been at the threshold
    assert history.variance == pytest.approx(0.5 * (0.0625 + 0.5 * (2.5 * 0.25) ** 2))
    mean, variance = history.mean, history.variance
    assert history.limit(math.e**0.5, settings) == math.inf  # a usual norm
    assert history.mean == pytest.approx((mean + 0.5) / 2)
    assert history.variance == pytest.approx(0.5 * (variance + 0.5 * (0.5 - mean) ** 2))


def test_the_history_of_norms_moves_by_one_minus_its_decay() -> None:
    settings, history = ZClipConfig(warmup=2, decay=0.6), NormMoments()
    for size in (1.0, math.e**0.5, math.e**0.5):
        history.limit(size, settings)
    assert history.mean == pytest.approx(0.25 + 0.4 * 0.25)
    assert history.variance == pytest.approx(0.6 * (0.0625 + 0.4 * 0.0625))


def test_the_spread_goes_over_from_a_first_guess_to_what_is_measured() -> None:
    settings, history = ZClipConfig(warmup=4, decay=0.9), NormMoments()
    spreads = [0.5, math.sqrt(0.75 * 0.25), math.sqrt(0.5 * 0.25), 0.25, 0.1, 0.1]
    for expected in spreads:
        assert history.spread(settings) == pytest.approx(expected)
        assert history.limit(3.0, settings) == math.inf
    assert history.threshold(settings) == pytest.approx(3 * math.exp(0.25))


def test_the_smaller_of_the_fixed_and_the_adaptive_limit_clips() -> None:
    norms: dict[float | Literal["auto"], float] = {
        1.5: 1.5,
        100.0: 2 * math.exp(6.25 / 6),
        "auto": 2 * math.exp(6.25 / 6),
    }
    for norm, expected in norms.items():
        made = parameters(a=[2 * math.e**6])
        zclip = "off" if norm == "auto" else ZClipConfig(warmup=2)
        clipper = Clipper(made, norm=norm, by="global", zclip=zclip)
        clipper.histories["all"] = NormMoments(mean=math.log(2.0), variance=1.0, count=100)
        values = clipper.clip(torch.tensor(2 * math.e**6), 2 * math.e**6)
        (parameter,) = made.values()
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx(expected, rel=1e-5)
        assert values["optim/clip_share"] == 1.0
        threshold = clipper.histories["all"].threshold(ZClipConfig())
        assert values["optim/clip_threshold"] == min(threshold, 1.5 if norm == 1.5 else math.inf)


def test_no_limit_without_one_and_none_for_a_gradient_of_zero() -> None:
    made = parameters(a=[0.0])
    clipper = Clipper(made, norm="auto", by="global", zclip="off")
    assert clipper.clip(torch.tensor(0.0), 0.0)["optim/clip_share"] == 0.0 and not clipper.histories
    off = Clipper(made, norm="off", by="global", zclip="off")
    assert "optim/clip_threshold" not in off.clip(torch.tensor(1e9), 1e9) and not off.histories


# --- series of norms: healthy ones pass, spikes do not


def scatter(deviation: float, seed: int, steps: int = 1000) -> Norms:
    """log norms around 0."""
    return np.random.default_rng(seed).normal(0, deviation, steps)


DRIFTS: dict[str, Norms] = {
    "level": np.zeros(1000),
    "falls tenfold": np.linspace(0, -math.log(10), 1000),
    "falls a hundredfold": np.linspace(0, -math.log(100), 1000),
    "rises tenfold": np.linspace(0, math.log(10), 1000),
    "up in the warm-up, then down": np.concatenate(
        [np.linspace(0, 1.6, 50), 1.6 * np.exp(-np.arange(950) / 60)]
    ),
    "another phase": np.repeat([0.0, math.log(10), math.log(0.1)], [350, 350, 300]),
    "a hundred times higher for good": np.repeat([0.0, math.log(100)], [500, 500]),
}


def clipped(log_norms: Norms) -> list[float]:
    """The norm of each update after clipping."""
    settings, history = ZClipConfig(), NormMoments()
    return [min(size, history.limit(size, settings)) for size in np.exp(log_norms).tolist()]


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("deviation", [0.02, 0.1, 0.3, 0.6])
def test_less_than_a_twentieth_of_a_healthy_training_is_clipped(drift: str, deviation: float) -> None:
    for seed in range(2):
        norms = DRIFTS[drift] + scatter(deviation, seed)
        cut = np.array(clipped(norms)) < np.exp(norms)
        assert cut.mean() < 0.05
        if drift not in ("another phase", "a hundred times higher for good"):  # they have to find their level
            assert all(stretch.mean() < 0.06 for stretch in np.split(cut, 10))
        assert cut[-200:].mean() < 0.05  # nothing is clipped for ever


@pytest.mark.parametrize("first", [1, 4, 12, 24, 400])
@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("deviation", [0.1, 0.5])
def test_spikes_are_cut_to_about_a_usual_norm_also_among_the_first_25(
    first: int, length: int, deviation: float
) -> None:
    """A hundred times the usual norm, once or several times in a row; what is left is at most 6 times it, of
    usual scatter 4 times."""
    for seed in range(2):
        norms = scatter(deviation, seed, 500)
        norms[first : first + length] += math.log(100)
        left = clipped(norms)
        assert max(left[first : first + length]) < (6 if deviation == 0.5 else 4)
        after = np.array(left[first + length :]) < np.exp(norms[first + length :])
        assert after.mean() < 0.05


def test_a_first_norm_that_is_a_spike_is_forgotten() -> None:
    """Nothing is known before it, so it passes; what follows is guarded again within 100 updates."""
    norms = scatter(0.2, 0)
    norms[0] += math.log(100)
    norms[100] += math.log(100)
    assert clipped(norms)[100] < 6


def test_clipping_by_part_scales_only_the_part_that_is_too_long() -> None:
    made = parameters(vision=[3.0, 4.0], action=[0.6, 0.0])
    clipper = Clipper(made, norm=1.0, by="part", zclip="off")
    size = math.sqrt(25.36)
    values = clipper.clip(torch.tensor(size), size)
    assert made["model.vision.w"].grad is not None and made["model.action.w"].grad is not None
    assert made["model.vision.w"].grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert made["model.action.w"].grad.tolist() == pytest.approx([0.6, 0.0])
    assert (values["optim/clip_share/vision"], values["optim/clip_share/action"]) == (1.0, 0.0)
    assert values["optim/clip_share"] == 1.0 and values["optim/grad_norm"] == size


def test_the_whole_gradient_is_clipped_as_torch_clips_it() -> None:
    made, other = (parameters(a=[3.0, 4.0], b=[12.0]) for _ in range(2))
    Clipper(made, norm=2.0, by="global", zclip="off").clip(torch.tensor(13.0), 13.0)
    torch.nn.utils.clip_grad_norm_(list(other.values()), 2.0)
    for name, parameter in made.items():
        own, expected = parameter.grad, other[name].grad
        assert own is not None and expected is not None and torch.equal(own, expected)


# --- in trainings


def lengths(run: Path, spikes: Collection[int] = (), **settings: Any) -> list[float]:
    """Norm of the gradient that the optimiser gets in each update; in those of `spikes` (from 0) the
    backward pass gives 100 times the gradient."""
    trainer = make_trainer(run, **settings)
    found: list[float] = []
    finish, step = trainer.backward.finish, trainer.optimizer.step

    def gradients() -> list[torch.Tensor]:
        return [one.grad for one in trainer.parameters.values() if one.grad is not None]

    def spike() -> dict[str, float]:
        values = finish()
        for gradient in gradients() if trainer.step in spikes else []:
            gradient.mul_(100)
        return values

    def measure() -> None:
        found.append(float(torch.cat([one.flatten() for one in gradients()]).norm()))
        step()

    trainer.backward.finish, trainer.optimizer.step = spike, measure
    trainer.fit(Data())
    return found


def shares(run: Path) -> list[float]:
    return [one["optim/clip_share"] for one in records(run) if "optim/clip_share" in one]


SHORT: dict[str, Any] = {
    "steps": 40,
    "log_every": 1,
    "validation": {"every": 0},
    "checkpoints": {"every": 0},
    "diagnostics": {"every": 0},
}
K_GRADIENTS = KGradientsConfig.model_validate({"aggregator": {"kind": "cosine_gate"}})


@pytest.mark.parametrize(("backward", "by"), [(None, "global"), (K_GRADIENTS, "part")])
def test_by_default_planted_spikes_never_reach_the_weights(backward: Any, by: str, tmp_path: Path) -> None:
    """Also within the first 25 updates, several in a row, of each part alone, of a gradient made of K."""
    spikes, settings = (5, 11, 12, 13, 30), SHORT | {"backward": backward, "gradients": {"clip_by": by}}
    usual = max(lengths(tmp_path / "calm", **settings))
    guarded = lengths(tmp_path / "guarded", spikes, **settings)
    bare = lengths(tmp_path / "bare", spikes, **settings | {"gradients": {"clip_norm": "off"}})
    assert max(bare[number] for number in spikes) > 30 * usual
    assert max(guarded) < 4 * usual
    clipped = shares(tmp_path / "guarded")
    assert len(clipped) == 40 and all(clipped[number] == 1.0 for number in spikes)


def test_less_than_a_twentieth_of_a_small_training_is_clipped(tmp_path: Path) -> None:
    lengths(tmp_path, **SHORT | {"steps": 120, "optimizer": {"kind": "muon"}})
    assert sum(shares(tmp_path)) < 0.05 * 120


ADAPTIVE: dict[str, Any] = {
    "gradients": {"clip_norm": 1.0, "clip_by": "part", "zclip": {"warmup": 4, "z_threshold": 0.5}},
    "steps": 16,
    "checkpoints": {"every": 6},
    "validation": {"every": 0},
}


def test_adaptive_clipping_acts_is_recorded_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    """Killed in its warm-up, and behind it."""
    make_trainer(tmp_path / "straight", **ADAPTIVE).fit(Data())
    killed_and_resumed(tmp_path / "killed", (3, 8), **ADAPTIVE)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []
    found = records(tmp_path / "straight")
    assert all(
        record[f"optim/{name}/action"] > 0
        for record in found
        for name in ("grad_norm_mean", "clip_threshold")
    )
    assert any(0 < record["optim/clip_share/action"] <= 1 for record in found)
