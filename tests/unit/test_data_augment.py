"""Augmentation: each operation against a plain reference, drawn by seed and place, alike now and later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_data_loading import build, digest, write_set
from test_terms_every import KINDS

from tutti.config import load_config
from tutti.data.augmentation import changes as kernels
from tutti.data.augmentation.changes import RawBatch
from tutti.data.augmentation.config import ColourJitter, PictureJitter
from tutti.data.augmentation.draws import Draws, changes_of, dropped
from tutti.data.bundle import DataBundle
from tutti.data.mixture import Stream
from tutti.distributed.ranks import Ranks
from tutti.objectives.config import ObjectiveConfig
from tutti.plugin import CUSTOM
from tutti.types import DataNeeds, UserError

LOOK_AHEAD = ("future_patches", "changed_patches", "future_latent", "inverse_dynamics")
OFF: dict[str, Any] = {
    name: {"probability": 0} for name in ("brightness", "contrast", "saturation", "hue", "blur")
}
EVERYTHING: dict[str, Any] = {
    "kind": "pictures",
    "brightness": {"strength": 0.5, "probability": 0.8},
    "contrast": {"strength": 1.0, "probability": 0.8},
    "saturation": {"strength": 1.0, "probability": 0.8},
    "hue": {"degrees": 90, "probability": 0.8},
    "blur": {"sigma": [0.3, 1.5], "probability": 0.5},
    "crop": {"scale": [0.6, 0.9], "probability": 0.5},
    "rotation": {"degrees": 20, "probability": 0.5},
    "shift": {"most": 0.2, "probability": 0.5},
    "view_drop": {"probability": 0.4},
}


def noise(shape: tuple[int, ...] = (3, 2, 3, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).uniform(40, 215, (3, 2, 3, 4, 4))
    return ndimage.zoom(coarse, (1, 1, 1, 5, 5), order=1).astype(np.uint8)


def drawn(rows: int = 3, views: int = 2, number: int = 7, seed: int = 5) -> Draws:
    return Draws.of(seed, number, [Stream((), slice(None), 0, rows)], rows, views)


def applied(config: PictureJitter, images: np.ndarray, *later: np.ndarray) -> list[np.ndarray]:
    change = changes_of(config, drawn(*images.shape[:2]), np.ones(images.shape[:2], bool))
    return [found.numpy() for found in change([torch.from_numpy(one) for one in (images, *later)])]


def only(**operation: Any) -> PictureJitter:
    return PictureJitter.model_validate(OFF | operation)


def close_to(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal, but where a value lies between two whole numbers."""
    difference = found - np.clip(expected, 0, 255)
    assert np.abs(difference).max() <= 0.5 + 2e-3


# --- each operation, slowly


def test_it_does_nothing_at_strength_zero_or_probability_zero() -> None:
    images = noise()
    for config in (ColourJitter(brightness=0, contrast=0, saturation=0).full(), only()):
        np.testing.assert_array_equal(applied(config, images)[0], images)


def test_colour_jitter_draws_the_factors_that_it_always_drew() -> None:
    """Its arithmetic of before, step by step: no picture differs by more than the rounding of a tie."""
    images = noise()
    random = np.random.default_rng([5, 3, 7])
    b, c, s = (random.uniform(0.8, 1.2, (3, 2, 1, 1, 1)).astype(np.float32) for _ in range(3))
    weights = np.array([0.299, 0.587, 0.114], np.float32).reshape(3, 1, 1)

    def grey(x: np.ndarray) -> np.ndarray:
        return (x * weights).sum(2, keepdims=True)

    mean = grey(images * b).mean((3, 4), keepdims=True)
    x = (images * b - mean) * c + mean
    close_to(applied(ColourJitter().full(), images)[0], (x - grey(x)) * s + grey(x))


def test_hue_turns_two_colours_of_yiq_and_keeps_grey_and_luminance() -> None:
    images, config = noise(), only(hue={"degrees": 60})
    images[0, 0] = images[0, 0, :1]  # grey
    found = applied(config, images)[0]
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    for place, angle in np.ndenumerate(np.deg2rad(-60 + 120 * drawn().hue)):
        y, i, q = np.einsum("ij,jhw->ihw", to_yiq, images[place].astype(float))
        turned = np.stack([y, np.cos(angle) * i - np.sin(angle) * q, np.sin(angle) * i + np.cos(angle) * q])
        close_to(found[place], np.einsum("ij,jhw->ihw", np.linalg.inv(to_yiq), turned))
    np.testing.assert_array_equal(found[0, 0], images[0, 0])


def test_blur_is_that_of_scipy() -> None:
    images = noise((3, 2, 3, 16, 16))
    found = applied(only(blur={"sigma": [0.5, 1.5], "probability": 1}), images)[0]
    for (*place, channel), sigma in np.ndenumerate(np.repeat(0.5 + drawn().blur[..., None], 3, axis=-1)):
        picture = images[(*place, channel)].astype(float)
        expected = ndimage.gaussian_filter(picture, sigma, mode="nearest", radius=5)
        close_to(found[(*place, channel)], expected)


@pytest.mark.parametrize("name", ["crop", "rotation", "shift", "all three"])
def test_what_moves_a_picture_is_scipys_affine_transform(name: str) -> None:
    images, draws, size = smooth(), drawn(), 20
    given: dict[str, Any] = {
        "crop": {"scale": [0.5, 0.9], "probability": 1},
        "rotation": {"degrees": 30, "probability": 1},
        "shift": {"most": 0.2, "probability": 1},
    }
    on = given if name == "all three" else {name: given[name]}
    found = applied(only(**on), images)[0]
    for place in np.ndindex(3, 2):
        u = {one: getattr(draws, one)[place] for one in ("crop", "crop_x", "crop_y", "rotation")}
        scale = 0.5 + 0.4 * u["crop"] if "crop" in on else 1.0
        angle = np.deg2rad(-30 + 60 * u["rotation"]) if "rotation" in on else 0.0
        shift = (
            np.array([draws.shift_y[place], draws.shift_x[place]]) * 2 - 1 if "shift" in on else np.zeros(2)
        )
        corner = np.array([u["crop_y"], u["crop_x"]]) if "crop" in on else np.zeros(2)
        # In pixels and with y first: p -> middle of the crop + scale R (p - middle + shift).
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        middle = (size - 1) / 2
        own = middle + (1 - scale) * size * (corner - 0.5) * ("crop" in on)
        matrix = scale * turn
        offset = own + matrix @ (0.2 * size * shift - middle)
        for channel in range(3):
            picture = images[place][channel].astype(float)
            expected = ndimage.affine_transform(picture, matrix, offset, order=1, mode="nearest")
            close_to(found[place][channel], expected)


def test_pixels_that_did_not_move_stay_equal_however_strong_it_is() -> None:
    now = noise()
    later = now.copy()
    later[..., :3] = 255 - later[..., :3]  # the mean grey of the picture changes too
    colours = {name: one for name, one in EVERYTHING.items() if name in OFF and name != "blur"}
    found, after = applied(only(**colours), now, later)
    np.testing.assert_array_equal(found[..., 3:], after[..., 3:])
    assert (found != now).any() and (found[..., :3] != after[..., :3]).any()


def test_still_scenes_stay_still_whatever_is_done() -> None:
    images = noise((5, 2, 3, 12, 12))
    now, later = applied(PictureJitter.model_validate(EVERYTHING), images, images)
    np.testing.assert_array_equal(now, later)
    assert (now != images).any(axis=(2, 3, 4)).all()


# --- what is drawn


def test_nothing_that_moves_a_picture_or_hides_a_view_is_done_unless_it_is_asked_for() -> None:
    default, draws = PictureJitter(), drawn(64, 2)
    change = changes_of(default, draws, np.ones((64, 2), bool))
    assert len(change.warped) == 0 and not dropped(default, draws, np.ones((64, 2), bool)).any()
    assert 0 < len(change.blurred) < 128


def test_each_is_drawn_as_often_and_as_far_as_it_says() -> None:
    config = PictureJitter.model_validate(EVERYTHING)
    draws, every = drawn(2000, 2), np.ones((2000, 2), bool)
    change = changes_of(config, draws, every)
    moved = 1 - 0.5**3
    assert len(change.blurred) / 4000 == pytest.approx(0.5, abs=0.03)
    assert len(change.warped) / 4000 == pytest.approx(moved, abs=0.03)
    scale = change.affine[:, :, :2].double().det().sqrt()
    assert scale.min() >= 0.6 - 1e-6 and (scale < 0.95).double().mean() == pytest.approx(
        0.5 / moved, abs=0.03
    )
    crops = only(crop=EVERYTHING["crop"])
    affine = changes_of(crops, draws, every).affine
    assert (affine[:, :, 2].abs() <= 1 - affine[:, 0, :1] + 1e-6).all()  # inside of the picture
    assert affine[:, :, 2].mean(0).tolist() == pytest.approx([0, 0], abs=0.03)
    factors = changes_of(only(brightness=EVERYTHING["brightness"]), draws, every).matrix[:, 0, 0]
    assert (factors == 1).double().mean() == pytest.approx(0.2, abs=0.03)
    assert factors.min() >= 0.5 and factors.max() <= 1.5 and factors.mean() == pytest.approx(1, abs=0.02)
    assert change.kernel.sum(1).mul(2).sub(change.kernel[:, 0]).sub(1).abs().max() < 1e-6


def test_one_operation_leaves_the_draws_of_the_others() -> None:
    every = np.ones((3, 2), bool)
    both = changes_of(only(crop=EVERYTHING["crop"], blur={"probability": 1}), drawn(), every)
    one = changes_of(only(blur={"probability": 1}), drawn(), every)
    assert torch.equal(both.kernel, one.kernel) and torch.equal(both.matrix, one.matrix)


def test_one_view_that_is_there_always_stays() -> None:
    config = only(view_drop={"probability": 0.9})
    mask = np.random.default_rng(1).random((500, 3)) < 0.6
    drop = dropped(config, drawn(500, 3), mask)
    assert not (drop & ~mask).any()
    left = (mask & ~drop).sum(1)
    assert (left[mask.any(1)] >= 1).all() and (left > 1).any() and drop.sum() > 0.4 * mask.sum()
    assert (
        dropped(only(view_drop={"probability": 1}), drawn(500, 3), mask).sum()
        == (mask.sum(1) - 1).clip(0).sum()
    )


# --- the loader


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def data(data_set: Path, tmp_path: Path) -> Iterator[DataBundle]:
    built = build(data_set, tmp_path, DataNeeds(futures=(2, "last")), augmentation=EVERYTHING)
    with closing(built.train):
        yield built


def needs(kind: str) -> tuple[int, ...]:
    objective = {"recon": None, "extra": {"kind": kind, **KINDS[kind]}}
    return ObjectiveConfig.model_validate(objective).needs().futures


def test_the_kinds_that_look_ahead_are_known_here() -> None:
    assert {kind for kind in KINDS if kind != CUSTOM and needs(kind)} == set(LOOK_AHEAD)


@pytest.mark.parametrize("augmentation", [{"kind": "colour", "contrast": 1.0}, EVERYTHING])
@pytest.mark.parametrize("kind", LOOK_AHEAD)
def test_what_a_term_sees_later_is_changed_as_what_it_sees_now(
    kind: str, augmentation: dict[str, Any], data_set: Path, tmp_path: Path
) -> None:
    offsets = needs(kind)
    built = build(data_set, tmp_path, DataNeeds(futures=offsets), augmentation=augmentation)
    with closing(built.train) as train:
        batch = train.batch_at(4)
    clean = built.replay(batch.window)
    config = built.train._augmentation.full()
    draws = Draws.of(0, 4, [Stream((), slice(None), 0, 6)], 6, 2)
    change = changes_of(config, draws, batch.observation.image_mask.numpy())
    later = [clean.futures[offset].observation.images for offset in offsets]
    expected = change([clean.observation.images, *later])
    assert torch.equal(batch.observation.images, expected[0])
    assert (batch.observation.images != clean.observation.images).any()
    for offset, images in zip(offsets, expected[1:], strict=True):
        future = batch.futures[offset]
        assert torch.equal(future.observation.images, images)
        assert torch.equal(future.observation.image_mask, batch.observation.image_mask)
        assert torch.equal(future.mask, clean.futures[offset].mask)


def test_dropped_views_are_masked_now_and_later_and_masked_ones_stay_so(data: DataBundle) -> None:
    gather = data.windows.gather

    def without_first_view(windows: np.ndarray) -> Any:
        batch = gather(windows)
        batch.observation.image_mask[0, 0] = False
        for future in batch.futures.values():
            future.observation.image_mask[0, 0] = False
        return batch

    data.train.windows.gather = without_first_view  # pyright: ignore[reportAttributeAccessIssue]
    masks = []
    for number in range(12):
        batch = data.train.batch_at(number)
        masks.append(batch.observation.image_mask)
        assert all(torch.equal(one.observation.image_mask, masks[-1]) for one in batch.futures.values())
    seen = torch.stack(masks)
    assert not seen[:, 0, 0].any() and seen[:, 0, 1].all() and seen.any(2).all()
    assert 0.2 < (~seen[:, 1:]).double().mean() < 0.5


def test_batches_are_the_same_after_a_resume_and_however_far_ahead_they_are_made(
    data: DataBundle, data_set: Path, tmp_path: Path
) -> None:
    expected = [digest(data.train.batch_at(number)) for number in range(8)]
    for prefetch in (0, 2):
        needed = DataNeeds(futures=(2, "last"))
        again = build(data_set, tmp_path, needed, augmentation=EVERYTHING, prefetch=prefetch).train
        with closing(again):
            assert [digest(next(again)) for _ in range(3)] == expected[:3]
            state = again.state_dict()
            next(again)
            again.load_state_dict(state)
            assert [digest(next(again)) for _ in range(5)] == expected[3:]


def test_ranks_and_parts_of_the_work_change_no_bit(data: DataBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.train.batch_at(3)
    monkeypatch.setattr(kernels, "AT_ONCE", 1)
    monkeypatch.setattr(kernels, "FEWEST", 1)
    assert digest(data.train.batch_at(3)) == digest(whole)
    for count in (2, 3, 6):
        for rank in range(count):
            data.train.share(Ranks(rank, count))
            rows = Ranks(rank, count).rows(6)
            assert digest(data.train.batch_at(3)) == digest(whole.apply(lambda value, rows=rows: value[rows]))


def test_raw_batches_go_on_where_the_loader_is_and_are_changed_where_they_arrive(data: DataBundle) -> None:
    expected = [digest(data.train.batch_at(number)) for number in range(3)]
    assert digest(next(data.train)) == expected[0]
    raw = next(data.train.raw_batches())
    assert isinstance(raw, RawBatch) and raw.batch.observation.images.dtype == torch.uint8
    assert torch.equal(raw.batch.observation.images, data.replay(raw.batch.window).observation.images)
    assert digest(raw.augmented()) == expected[1] and digest(next(data.train)) == expected[2]


def test_validation_and_replays_are_not_augmented(data: DataBundle) -> None:
    held = data.validation[0]
    assert digest(held) == digest(data.replay(held.window))
    np.testing.assert_array_equal(
        held.observation.images.numpy(), data.windows.sources[0].frames[held.window.numpy()]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"blur": {"sigma": [2, 1]}}, r"data\.augmentation.*blur\.sigma.*lower end comes first"),
        ({"blur": {"sigma": [0, 1]}}, r"blur\.sigma"),
        ({"crop": {"scale": [0.5, 1.5]}}, r"crop\.scale"),
        ({"rotation": {"degrees": 90}}, r"rotation\.degrees"),
        ({"view_drop": {"probability": 1.5}}, r"view_drop\.probability"),
        ({"hue": {"turns": 1}}, r"hue\.turns"),
    ],
)
def test_a_range_that_cannot_be_is_one_error_that_names_its_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config("smoke", [f"data.augmentation={{kind: pictures, {yaml_of(given)}}}"])
    assert re.search(message, str(raised.value), re.DOTALL)


def yaml_of(given: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}".replace("'", "") for key, value in given.items())


def test_a_batch_keeps_all_else(data: DataBundle) -> None:
    batch = data.train.batch_at(1)
    clean = data.replay(batch.window)
    pictures = {"images": clean.observation.images, "image_mask": clean.observation.image_mask}
    same = replace(batch, observation=replace(batch.observation, **pictures), futures=clean.futures)
    assert digest(same) == digest(clean)
