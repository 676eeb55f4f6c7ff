"""Pictures as patches, and the terms of the future picture: targets, weights, masks and the baseline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.term_batches import NO_MODEL, as_double, make_batch, make_loss, make_model
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.terms.patches import (
    ChangedPatchesConfig,
    FuturePatchesConfig,
    FuturePatchesTerm,
    averaged,
    normalise_patches,
    to_patches,
)
from tutti.types import Batch, Features, Tokens

SMALL = {"width": 16, "heads": 2, "offsets": (3,)}
CELLS = 4


def scene(**config: Any) -> tuple[FuturePatchesTerm, Features, Batch]:
    """The term in float64, features and a batch in which every view is there now and then."""
    model, batch = make_model().double(), as_double(make_batch())
    term = FuturePatchesConfig(**{"width": 8, "heads": 2, "downsample": 1, **config}).build(model, "recon")
    everything = torch.ones_like(batch.observation.image_mask)
    batch = replace(batch, observation=replace(batch.observation, image_mask=everything))
    batch = with_future(batch, mask=everything[:, 0], image_mask=everything)
    return term.double(), model(batch.observation), batch


def with_future(batch: Batch, mask: Tensor | None = None, **changes: Any) -> Batch:
    """The batch with another future: its mask, or parts of its observation."""
    future = batch.futures[4]
    seen = replace(future.observation, **changes)
    return replace(
        batch, futures={4: replace(future, observation=seen, mask=future.mask if mask is None else mask)}
    )


def errors_of(term: FuturePatchesTerm, features: Features, batch: Batch) -> Tensor:
    """l_p of every patch."""
    later = term.patches(batch.futures[4].observation.images, torch.float64)
    return (term.predict(features.fused_vision.values) - normalise_patches(later)).square().mean(dim=-1)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 12])
def test_averaged_is_average_pooling_to_the_last_bit_on_bytes(factor: int) -> None:
    drawn = torch.randint(0, 256, (5, 3, 12, 24))
    drawn[0] = 255  # the largest sums
    expected = F.avg_pool2d(drawn.double(), factor).float()
    for dtype in (torch.uint8, torch.float32):
        assert torch.equal(averaged(drawn.to(dtype), factor, torch.float32), expected)
    floats = torch.rand(5, 3, 12, 24)
    torch.testing.assert_close(averaged(floats, factor, torch.float32), F.avg_pool2d(floats, factor))


def test_a_patch_holds_its_own_square_row_by_row_and_colour_last() -> None:
    images = torch.arange(1 * 2 * 3 * 4 * 4, dtype=torch.float64).reshape(1, 2, 3, 4, 4)
    patches = to_patches(images, grid=2, downsample=1, dtype=torch.float64)
    assert patches.shape == (1, 8, 12)
    square = images[0, 1, :, 2:4, 0:2]  # second view, lower left
    assert torch.equal(patches[0, 6], square.permute(1, 2, 0).flatten())
    coarse = to_patches(images, grid=2, downsample=2, dtype=torch.float64)
    assert torch.equal(coarse[0, 6], square.mean((1, 2)))


def test_targets_are_downsampled_bytes_normalised_by_patch() -> None:
    term, _, batch = scene(downsample=2)
    images = batch.futures[4].observation.images
    patches = term.patches(images, torch.float64)
    assert patches.shape == (6, 2 * CELLS, 3 * 8 * 8)
    torch.testing.assert_close(patches[0, 0, :3], images[0, 0, :, :2, :2].double().mean((1, 2)) / 127.5 - 1)
    target, each = normalise_patches(patches), torch.ones(6, 2 * CELLS, dtype=torch.float64)
    torch.testing.assert_close(target.mean(dim=-1), 0 * each, atol=1e-12, rtol=0)
    torch.testing.assert_close(target.square().mean(dim=-1), each, atol=1e-3, rtol=0)


def test_uniform_is_the_mean_over_patches_that_count() -> None:
    term, features, batch = scene(weighting="uniform")
    there = torch.tensor([True, False, True, True, False, True])
    batch = with_future(batch, mask=there)
    expected = errors_of(term, features, batch)[there].mean()
    torch.testing.assert_close(term(features, batch, NO_MODEL).value, expected)


def test_changed_patches_weigh_floor_plus_one() -> None:
    term, features, batch = scene(floor=0.25)
    images = batch.observation.images.clone()
    images[:, 1, :, 16:, :16] = 255 - images[:, 1, :, 16:, :16]  # the third patch of view 1, nothing else
    batch = with_future(batch, images=images)
    weight = torch.full((6, 2 * CELLS), 0.25, dtype=torch.float64)
    weight[:, 6] = 1.25
    result = term(features, batch, NO_MODEL)
    expected = (weight * errors_of(term, features, batch)).sum() / weight.sum()
    torch.testing.assert_close(result.value, expected)
    assert result.metrics["recon/changed_share"].item() == pytest.approx(1 / 8)


def test_the_copy_baseline_is_the_loss_of_the_present_picture() -> None:
    term, features, batch = scene(weighting="uniform")
    now, later = (
        normalise_patches(term.patches(seen.images, torch.float64))
        for seen in (batch.observation, batch.futures[4].observation)
    )
    found = term(features, batch, NO_MODEL).metrics["recon/copy_baseline"]
    torch.testing.assert_close(found, (now - later).square().mean())
    still = with_future(batch, images=batch.observation.images)
    assert term(features, still, NO_MODEL).metrics["recon/copy_baseline"] == 0


def two_offsets() -> tuple[FuturePatchesTerm, Features, Batch]:
    """The scene with a second, nearer future, which two windows do not have."""
    term, features, batch = scene(offsets=(2, 4))
    near = as_double(make_batch(7)).futures[4]
    reached = torch.tensor([True, True, False, True, False, True])
    return term, features, replace(batch, futures={**batch.futures, 2: replace(near, mask=reached)})


def test_several_offsets_share_the_decoder_and_are_told_apart() -> None:
    term, features, batch = two_offsets()
    found, sums = term(features, batch, NO_MODEL), torch.zeros(3)
    assert term.offset is not None
    for place, offset in enumerate((2, 4)):
        alone, _, _ = scene(offsets=(offset,))
        alone.load_state_dict({name: v for name, v in term.state_dict().items() if name != "offset"})
        with torch.no_grad():  # the vector of one offset, put where the decoder adds its positions
            alone.position += term.offset[place]
        expected = alone(features, batch, NO_MODEL)
        torch.testing.assert_close(found.metrics[f"recon/value/{offset}"], expected.value)
        baseline = expected.metrics["recon/copy_baseline"]
        torch.testing.assert_close(found.metrics[f"recon/copy_baseline/{offset}"], baseline)
        weight = alone.weight(batch).sum()
        sums = sums + torch.stack([weight, weight * expected.value, weight * baseline]).detach()
    torch.testing.assert_close(found.value, sums[1] / sums[0])
    torch.testing.assert_close(found.metrics["recon/copy_baseline"], sums[2] / sums[0])


def test_a_row_without_a_future_does_not_count_at_that_offset_alone() -> None:
    term, features, batch = two_offsets()
    spoilt = batch.futures[2].observation.images.clone()
    spoilt[2] = 255 - spoilt[2]
    near = replace(batch.futures[2], observation=replace(batch.futures[2].observation, images=spoilt))
    other = replace(batch, futures={**batch.futures, 2: near})
    before, after = (term(features, one, NO_MODEL) for one in (batch, other))
    assert before.value == after.value and before.metrics == after.metrics
    far = with_future(batch, images=255 - batch.futures[4].observation.images)
    far = replace(far, futures={**batch.futures, **far.futures})
    assert term(features, far, NO_MODEL).value != before.value


def test_one_offset_has_no_vector_and_no_further_metrics() -> None:
    term, features, batch = scene()
    assert term.offset is None and not [name for name in term.state_dict() if name == "offset"]
    found = term(features, batch, NO_MODEL)
    assert set(found.metrics) == {"recon/changed_share", "recon/copy_baseline"}


def test_a_view_that_is_absent_now_or_then_does_not_count() -> None:
    term, features, batch = scene()
    fused = features.fused_vision
    mask, values = fused.mask.clone(), fused.values.clone()
    mask[0, CELLS:] = False
    values[0, CELLS:] += 10
    now = replace(features, fused_vision=replace(fused, mask=mask))
    other = replace(features, fused_vision=Tokens(values=values, mask=mask))
    image_mask = batch.observation.image_mask.clone()
    image_mask[0, 1] = False
    then = with_future(batch, image_mask=image_mask)
    value = term(now, batch, NO_MODEL).value
    assert value == term(other, batch, NO_MODEL).value != term(features, batch, NO_MODEL).value
    torch.testing.assert_close(term(features, then, NO_MODEL).value, value)


def test_changed_patches_is_future_patches_weighted_by_change_to_the_last_bit() -> None:
    batch, found = make_batch(), []
    for recon in (
        {"kind": "changed_patches", "floor": 0.03, "threshold": 0.5, **SMALL},
        {"kind": "future_patches", "weighting": "changed", "floor": 0.03, "threshold": 0.5, **SMALL},
    ):
        model = make_model()
        loss = make_loss(model, recon=recon)
        terms = loss(model(batch.observation), batch, model)
        terms.total.backward()
        gradients = {n: p.grad for m in (model, loss) for n, p in m.named_parameters() if p.grad is not None}
        found.append((terms, gradients))
    (first, ours), (second, theirs) = found
    assert torch.equal(first.total, second.total) and first.metrics == second.metrics
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("kind", "floor"), [("changed_patches", 0.01), ("future_patches", 0.1)])
def test_its_own_floor_leaves_little_to_what_stands_still(kind: str, floor: float) -> None:
    """All is predicted as 0. One patch of four turns to stripes, l_p = 1; the rest stays grey, l_p = 0."""
    batch, model = make_batch(), make_model()
    grey = torch.full_like(batch.observation.images, 128)
    striped = grey.clone()
    striped[..., :16, :16] = (torch.arange(16) // 2 % 2 * 255).to(torch.uint8)
    batch = replace(with_future(batch, images=striped), observation=replace(batch.observation, images=grey))
    term = make_loss(model, recon={"kind": kind, **SMALL, "offsets": (4,)}).terms["recon"]
    with torch.no_grad():
        term.out.weight.zero_()
        term.out.bias.zero_()
    result = term(model(batch.observation), batch, model)
    assert result.metrics["recon/changed_share"].item() == pytest.approx(0.25)
    assert result.value.item() == pytest.approx((1 + floor) * 0.25 / (floor + 0.25), rel=1e-5)


def test_the_default_objective_is_what_it_was() -> None:
    recon = ObjectiveConfig().recon
    assert isinstance(recon, FuturePatchesConfig)
    assert (recon.weighting, recon.floor, recon.threshold) == ("changed", 0.1, 0.04)
    ours = ChangedPatchesConfig()
    assert (ours.floor, ours.threshold, ours.weight) == (0.01, 0.04, recon.weight)
    assert ObjectiveConfig.model_validate({"recon": {"kind": "changed_patches"}}).recon == ours
