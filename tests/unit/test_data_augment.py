"""Augmentation: seeded, spread over ranks, and one change for every picture of a sample."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_loading import build, write_set
from test_terms_every import KINDS

from tutti.data.loader import ColourJitter
from tutti.objectives.config import ObjectiveConfig
from tutti.plugin import CUSTOM
from tutti.types import DataNeeds

STRONG: dict[str, Any] = {"kind": "colour", "brightness": 0.5, "contrast": 1.0, "saturation": 1.0}
LOOK_AHEAD = ("future_patches", "changed_patches", "future_latent", "inverse_dynamics")


def noise(shape: tuple[int, ...] = (3, 2, 3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def needs(kind: str) -> tuple[int, ...]:
    return (
        ObjectiveConfig.model_validate({"recon": None, "extra": {"kind": kind, **KINDS[kind]}})
        .needs()
        .futures
    )


def test_it_is_seeded_and_off_at_strength_zero() -> None:
    images = noise()
    off = ColourJitter(brightness=0, contrast=0, saturation=0)
    np.testing.assert_array_equal(off.draw(images, np.random.default_rng(1))(images), images)
    first, again, other = (
        ColourJitter().draw(images, np.random.default_rng(seed))(images) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_present_picture_is_jittered_as_it_always_was() -> None:
    images = noise()
    found = ColourJitter().draw(images, np.random.default_rng([5, 3, 7]), 2, 9)(images)
    expected = "1f290ad6d6dc8b5b0b94e9a8abd56abb326bdb7e6c5895271d888094681f49df"
    assert hashlib.sha256(found.tobytes()).hexdigest() == expected


def test_pixels_that_did_not_move_stay_equal_however_strong_it_is() -> None:
    now = noise()
    later = now.copy()
    later[..., :3] = 255 - later[..., :3]  # the mean grey of the picture changes too
    change = ColourJitter(**STRONG).draw(now, np.random.default_rng(2))
    np.testing.assert_array_equal(change(now)[..., 3:], change(later)[..., 3:])
    assert (change(now) != now).any()


def test_the_kinds_that_look_ahead_are_known_here() -> None:
    assert {kind for kind in KINDS if kind != CUSTOM and needs(kind)} == set(LOOK_AHEAD)


@pytest.mark.parametrize("kind", LOOK_AHEAD)
def test_what_a_term_sees_later_is_changed_as_what_it_sees_now(kind: str, tmp_path: Path) -> None:
    offsets = needs(kind)
    data = build(write_set(tmp_path / "set"), tmp_path, DataNeeds(futures=offsets), augmentation=STRONG)
    number = 4
    with closing(data.train) as train:
        batch = train.batch_at(number)
    clean = data.replay(batch.window)
    present = clean.observation.images.numpy()
    change = ColourJitter(**STRONG).draw(present, np.random.default_rng([0, 3, number]))
    np.testing.assert_array_equal(batch.observation.images.numpy(), change(present))
    for offset in offsets:
        expected = change(clean.futures[offset].observation.images.numpy())
        np.testing.assert_array_equal(batch.futures[offset].observation.images.numpy(), expected)
        assert torch.equal(batch.futures[offset].mask, clean.futures[offset].mask)
