"""Normalisation: exact inverses, right quantiles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tutti.data.normalize import ActionStats, NormalizationKind, Normalizer
from tutti.types import UserError


def values(dims: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, (500, dims)).astype(np.float32)


def test_quantiles_are_those_of_all_frames_not_means_over_episodes() -> None:
    # Two episodes with different means: the mean of their quantiles would leave most frames outside.
    random = np.random.default_rng(0)
    episodes = [random.normal(mean, 0.1, (200, 1)) for mean in (-5.0, 5.0)]
    stats = ActionStats.fit(np.concatenate(episodes))
    assert stats.q01[0] < -5.0 and stats.q99[0] > 5.0
    inside = (np.concatenate(episodes) >= stats.q01) & (np.concatenate(episodes) <= stats.q99)
    assert inside.mean() == pytest.approx(0.98, abs=0.005)


def test_statistics_in_blocks_are_those_of_one_copy_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutti.data.normalize.BLOCK", 64)
    rows = values(4) + np.float32(100)
    exact = rows.astype(np.float64)
    q01, q99 = np.quantile(exact, [0.01, 0.99], axis=0)
    expected = {"q01": q01, "q99": q99, "mean": exact.mean(0), "std": exact.std(0)}
    expected |= {"min": exact.min(0), "max": exact.max(0)}
    found = ActionStats.fit(rows)
    for name, numbers in expected.items():  # to the last bit: a resumed run compares them
        np.testing.assert_array_equal(getattr(found, name), numbers, err_msg=name)


def test_quantile_maps_q01_and_q99_to_the_ends_and_does_not_clip() -> None:
    actions = values()
    normalizer = Normalizer.fit("quantile", "arm", actions, actions)
    stats = normalizer.stats["arm"].action
    np.testing.assert_allclose(normalizer.apply_action(stats.q01[None]), -1.0)
    np.testing.assert_allclose(normalizer.apply_action(stats.q99[None]), 1.0)
    assert np.abs(normalizer.apply_action(actions)).max() > 1.0


def test_standard_gives_mean_0_and_deviation_1() -> None:
    actions = values()
    normalized = Normalizer.fit("standard", "arm", actions, actions).apply_action(actions)
    np.testing.assert_allclose(normalized.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(0), 1.0, atol=1e-5)


@pytest.mark.parametrize("kind", ["quantile", "standard"])
def test_undo_is_the_inverse_for_arrays_and_tensors(kind: NormalizationKind) -> None:
    actions = values()
    normalizer = Normalizer.fit(kind, "arm", values(2), actions)
    back = normalizer.undo_action(normalizer.apply_action(actions))
    np.testing.assert_allclose(back, actions, rtol=1e-5, atol=1e-5)
    assert back.dtype == np.float32
    tensor = torch.from_numpy(actions).reshape(100, 5, 3)
    same = normalizer.undo_action(normalizer.apply_action(tensor))
    assert same.dtype == torch.float32
    torch.testing.assert_close(same, tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["quantile", "standard"])
def test_a_constant_dimension_stays_finite_and_comes_back(kind: NormalizationKind) -> None:
    actions = values()
    actions[:, 1] = 0.3
    normalizer = Normalizer.fit(kind, "arm", actions, actions)
    normalized = normalizer.apply_action(actions)
    np.testing.assert_allclose(normalized[:, 1], 0.0, atol=1e-6)
    np.testing.assert_allclose(normalizer.undo_action(normalized)[:, 1], 0.3, atol=1e-6)


@pytest.mark.parametrize("kind", ["quantile", "standard"])
def test_a_dimension_that_does_not_move_only_gets_its_center_taken_off(kind: NormalizationKind) -> None:
    """Not moving is relative to the size above 1: 0.04 of 10,000 is still, 0.04 of 1 is not."""
    still = np.full((50, 1), 5.0)
    wide = 10_000 + np.linspace(-0.02, 0.02, 50)[:, None]
    center, scale = ActionStats.fit(np.hstack([still, wide, wide - 9_999])).center_and_scale(kind)
    assert center == pytest.approx([5.0, 10_000, 1.0])
    assert scale[:2].tolist() == [1.0, 1.0] and 0.005 < scale[2] < 0.03


def test_a_rare_event_is_scaled_by_its_range() -> None:
    actions = np.zeros((1000, 1), dtype=np.float32)
    actions[3] = 5.0
    normalized = Normalizer.fit("quantile", "arm", actions, actions).apply_action(actions)
    assert set(normalized.ravel().tolist()) == {-1.0, 1.0}


def test_a_normalizer_survives_json_to_the_last_bit() -> None:
    actions = values()
    normalizer = Normalizer.fit("quantile", "arm", values(2, seed=1), actions)
    again = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    np.testing.assert_array_equal(again.apply_action(actions), normalizer.apply_action(actions))
    np.testing.assert_array_equal(again.apply_state(values(2)), normalizer.apply_state(values(2)))


def test_a_normalizer_names_what_does_not_fit() -> None:
    normalizer = Normalizer.fit("quantile", "arm", values(2), values(3))
    with pytest.raises(UserError, match=r"action of embodiment 'arm' has 3 dimensions"):
        normalizer.apply_action(values(2))
    with pytest.raises(UserError, match=r"'leg' has no statistics; expected one of \('arm',\)"):
        normalizer.undo_action(values(3), embodiment="leg")
