"""The reconstruction term: its targets, weights and masks, its baseline, its gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fixtures.term_batches import NO_MODEL
from tutti.objectives.term import Model
from tutti.objectives.terms.patches import FuturePatchesConfig, FuturePatchesTerm, normalise_patches
from tutti.types import Batch, DataSpec, Features, Future, Observation, Tokens, UserError

SPEC = DataSpec(
    views=("a", "b"),
    image_size=8,
    state_dim=1,
    action_dim=1,
    horizon=5,
    vocab_size=4,
    text_length=2,
    embodiments=("x",),
    fps=20.0,
)


@dataclass
class Sizes:
    width: int
    tokens_per_view: int = 4

    def __call__(self, images: Tensor, image_mask: Tensor) -> Tokens:
        raise AssertionError("this term looks at no picture of its own")


def model_of(tokens: int = 4, spec: DataSpec = SPEC) -> Model:
    sizes = SimpleNamespace(
        spec=spec,
        vision=Sizes(6, tokens),
        language=Sizes(6),
        fusion=Sizes(6),
        action=None,
        prepare=lambda images: images,
    )
    return cast("Model", sizes)


def term_of(**config: Any) -> FuturePatchesTerm:
    torch.manual_seed(0)
    return (
        FuturePatchesConfig(width=8, heads=2, **{"downsample": 1, **config})
        .build(model_of(), "recon")
        .double()
    )


def scene(b: int = 3, seed: int = 0) -> tuple[Features, Batch]:
    random = torch.Generator().manual_seed(seed)

    def look() -> Observation:
        return Observation(
            images=torch.randint(0, 256, (b, 2, 3, 8, 8), dtype=torch.uint8, generator=random),
            image_mask=torch.ones(b, 2, dtype=torch.bool),
            text=torch.zeros(b, 2, dtype=torch.int64),
            text_mask=torch.ones(b, 2, dtype=torch.bool),
            state=torch.zeros(b, 1),
        )

    fused = torch.randn(b, 8, 6, dtype=torch.float64, generator=random)
    tokens = Tokens(values=fused, mask=torch.ones(b, 8, dtype=torch.bool))
    zeros = torch.zeros(b, dtype=torch.int64)
    batch = Batch(
        observation=look(),
        actions=torch.zeros(b, 5, 1),
        action_mask=torch.ones(b, 5, 1, dtype=torch.bool),
        instruction_id=zeros,
        embodiment=zeros,
        window=zeros,
        futures={4: Future(observation=look(), mask=torch.ones(b, dtype=torch.bool))},
    )
    return Features(vision=tokens, language=tokens, readout=fused[:, 0], fused_vision=tokens), batch


def future_of(batch: Batch) -> Observation:
    return batch.futures[4].observation


def with_future(batch: Batch, observation: Observation | None = None, mask: Tensor | None = None) -> Batch:
    """The batch with another future observation, or another mask of it."""
    now = batch.futures[4]
    changed = Future(observation=observation or now.observation, mask=now.mask if mask is None else mask)
    return replace(batch, futures={4: changed})


def test_patches_follow_the_order_of_the_tokens() -> None:
    images = torch.zeros(1, 2, 3, 8, 8)
    images[0, 1, :, 0:4, 4:8] = 1.0  # view b, upper right
    patches = term_of().patches(images, torch.float64)
    assert patches.shape == (1, 8, 48)
    assert patches.sum(dim=-1).tolist() == [[0, 0, 0, 0, 0, 48, 0, 0]]


def test_targets_are_downsampled_bytes_normalised_by_patch() -> None:
    term = term_of(downsample=2)
    _, batch = scene()
    patches = term.patches(future_of(batch).images, torch.float64)
    assert patches.shape == (3, 8, 12)
    corner = future_of(batch).images[0, 0, :, :2, :2].double().mean(dim=(1, 2)) / 127.5 - 1
    torch.testing.assert_close(patches[0, 0, :3], corner)
    target = normalise_patches(patches)
    torch.testing.assert_close(
        target.mean(dim=-1), torch.zeros(3, 8, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        target.square().mean(dim=-1), torch.ones(3, 8, dtype=torch.float64), atol=1e-3, rtol=0
    )


def test_uniform_is_the_mean_over_patches_that_count() -> None:
    term = term_of(weighting="uniform")
    features, batch = scene()
    there = torch.tensor([True, False, True])
    batch = with_future(batch, mask=there)
    target = normalise_patches(term.patches(future_of(batch).images, torch.float64))
    expected = (term.predict(features.fused_vision.values) - target)[there].square().mean()
    torch.testing.assert_close(term(features, batch, NO_MODEL).value, expected)


def test_changed_patches_weigh_floor_plus_one() -> None:
    term = term_of(floor=0.25)
    features, batch = scene()
    images = batch.observation.images.clone()
    images[:, 1, :, 4:, :4] = 255 - images[:, 1, :, 4:, :4]  # the third patch of view b moves, nothing else
    batch = with_future(batch, replace(future_of(batch), images=images))
    weight = torch.full((3, 8), 0.25, dtype=torch.float64)
    weight[:, 6] = 1.25
    target = normalise_patches(term.patches(images, torch.float64))
    errors = (term.predict(features.fused_vision.values) - target).square().mean(dim=-1)
    result = term(features, batch, NO_MODEL)
    torch.testing.assert_close(result.value, (weight * errors).sum() / weight.sum())
    assert result.metrics["recon/changed_share"].item() == pytest.approx(1 / 8)


def test_the_copy_baseline_is_the_loss_of_the_present_picture() -> None:
    term = term_of(weighting="uniform")
    features, batch = scene()
    now, future = (term.patches(o.images, torch.float64) for o in (batch.observation, future_of(batch)))
    expected = (normalise_patches(now) - normalise_patches(future)).square().mean()
    torch.testing.assert_close(term(features, batch, NO_MODEL).metrics["recon/copy_baseline"], expected)
    still = with_future(batch, batch.observation)
    assert term(features, still, NO_MODEL).metrics["recon/copy_baseline"] == 0


@pytest.mark.parametrize("weighting", ["uniform", "changed"])
def test_what_is_masked_does_not_count(weighting: str) -> None:
    term = term_of(weighting=weighting)
    features, batch = scene()
    future = future_of(batch)
    batch = with_future(batch, mask=torch.tensor([True, True, False]))
    batch = with_future(
        batch, replace(future, image_mask=torch.tensor([[True, True], [True, False], [True, True]]))
    )
    images = future.images.clone()
    images[1, 1], images[2] = 255 - images[1, 1], 255 - images[2]
    other = with_future(batch, replace(future_of(batch), images=images))
    assert term(features, batch, NO_MODEL).value == term(features, other, NO_MODEL).value
    assert term(features, batch, NO_MODEL).metrics == term(features, other, NO_MODEL).metrics


def test_a_view_absent_now_does_not_count_even_if_it_is_there_later() -> None:
    term = term_of()
    features, batch = scene()
    mask = features.fused_vision.mask.clone()
    mask[0, 4:] = False
    values = features.fused_vision.values.clone()
    values[0, 4:] += 10
    absent = replace(features, fused_vision=replace(features.fused_vision, mask=mask))
    other = replace(features, fused_vision=Tokens(values=values, mask=mask))
    assert term(absent, batch, NO_MODEL).value == term(other, batch, NO_MODEL).value
    assert term(absent, batch, NO_MODEL).value != term(features, batch, NO_MODEL).value


def test_masked_nan_stays_out_of_value_and_gradient() -> None:
    term = term_of()
    features, batch = scene()
    images = future_of(batch).images.double() / 127.5 - 1
    images[2] = float("nan")
    future = replace(future_of(batch), images=images)
    result = term(features, with_future(batch, future, torch.tensor([True, True, False])), NO_MODEL)
    result.value.backward()
    assert result.value.isfinite()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in term.parameters())


def test_nothing_left_gives_zero_with_zero_gradient() -> None:
    term = term_of()
    features, batch = scene()
    result = term(features, with_future(batch, mask=torch.zeros(3, dtype=torch.bool)), NO_MODEL)
    result.value.backward()
    assert result.value == 0
    assert all(p.grad is None or not p.grad.any() for p in term.parameters())


def test_gradients_are_right() -> None:
    term = term_of()
    features, batch = scene()
    batch = with_future(batch, mask=torch.tensor([True, False, True]))
    names, weights = zip(*term.named_parameters(), strict=True)
    chosen = [i for i, n in enumerate(names) if n in ("embed.weight", "out.bias", "norm.weight")]

    def value(fused: Tensor, *given: Tensor) -> Tensor:
        tokens = replace(features.fused_vision, values=fused)
        parameters = {names[i]: tensor for i, tensor in zip(chosen, given, strict=True)}
        arguments = (replace(features, fused_vision=tokens), batch, NO_MODEL)
        return torch.func.functional_call(term, parameters, arguments).value

    inputs = [features.fused_vision.values, *(weights[i] for i in chosen)]
    copies = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(value, copies)


def test_sizes_that_clash_name_the_key_and_the_cure() -> None:
    with pytest.raises(UserError, match=r"recon\.offset is 6, but must lie in 1\.\.5"):
        FuturePatchesConfig(offset=6).build(model_of(), "recon")
    with pytest.raises(UserError, match=r"recon\.downsample is 3, but must divide the patch of 4"):
        FuturePatchesConfig(downsample=3).build(model_of(), "recon")
    with pytest.raises(UserError, match="square grid"):
        FuturePatchesConfig().build(model_of(tokens=5), "recon")
    features, batch = scene()
    with pytest.raises(UserError, match="needs the observation 4 actions later"):
        term_of()(features, replace(batch, futures={}), NO_MODEL)
