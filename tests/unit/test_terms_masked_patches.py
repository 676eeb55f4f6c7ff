"""Masked patches: what is hidden, what counts, that validation repeats itself, what the text adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.term_batches import as_double, make_batch, make_model
from tutti.models.vla import VLA
from tutti.objectives.terms.masked_patches import MaskedPatchesConfig, MaskedPatchesTerm
from tutti.objectives.terms.patches import normalise_patches
from tutti.types import Batch, Tokens


def scene(**config: Any) -> tuple[VLA, MaskedPatchesTerm, Batch]:
    """The small model, the term and a batch in float64: four tokens a view, one of them visible."""
    model = make_model().double()
    term = MaskedPatchesConfig(**{"width": 16, "heads": 2, **config}).build(model, "recon").double()
    return model, term.eval(), as_double(make_batch())


def with_images(batch: Batch, images: Tensor) -> Batch:
    return replace(batch, observation=replace(batch.observation, images=images))


def pixels(hidden: Tensor) -> Tensor:
    """(b, n) over 2 x 2 patches of two views of 32 pixels to (b, 2, 1, 32, 32)."""
    grid = hidden.view(-1, 2, 1, 2, 2)
    return grid.repeat_interleave(16, dim=3).repeat_interleave(16, dim=4)


def test_the_value_and_the_blind_baseline_worked_out_by_hand() -> None:
    model, term, batch = scene(downsample=1)
    with torch.no_grad():  # every number of every patch is predicted as 0.5
        term.out.weight.zero_()
        term.out.bias.fill_(0.5)
    images = torch.full_like(batch.observation.images, 255)
    images[..., ::2] = 0  # stripes: half the numbers of a patch are 1, half -1; mean 0, variance 1
    images[:, 1] = 77  # flat: normalised to 0; absent in the last of six windows
    given = with_images(batch, images)
    result = term(model(given.observation), given, model)
    striped, flat = 0.25 + 1 / (1 + 1e-6), 0.25
    assert result.value.item() == pytest.approx((6 * striped + 5 * flat) / 11, rel=1e-12)
    blind = 6 * (1 / (1 + 1e-6)) / 11
    assert result.metrics["recon/blind_baseline"].item() == pytest.approx(blind, rel=1e-12)
    assert result.metrics["recon/text_gain"] == 0


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 1), (0.5, 2), (0.3, 3)])
def test_each_view_hides_equally_many_patches(ratio: float, visible: int) -> None:
    _, term, batch = scene(ratio=ratio)
    torch.manual_seed(3)
    first, second = term.train().hidden(batch), term.hidden(batch)
    assert not torch.equal(first, second)
    for hidden in (first, second, term.eval().hidden(batch)):
        assert ((~hidden).view(6, 2, 4).sum(dim=2) == visible).all()


def test_every_patch_is_hidden_about_equally_often() -> None:
    _, term, batch = scene()
    torch.manual_seed(1)
    drawn = torch.stack([term.train().hidden(batch) for _ in range(500)]).double().mean(dim=(0, 1))
    assert (drawn - 0.75).abs().max() < 0.05
    listed = (term.fixed_order >= term.num_visible).double().mean(dim=0)
    assert (listed - 0.75).abs().max() < 0.15


def test_hidden_pixels_never_enter_the_prediction_and_only_they_count() -> None:
    model, term, batch = scene()
    features, hidden = model(batch.observation), term.hidden(batch)
    images = batch.observation.images
    inside = with_images(batch, torch.where(pixels(hidden), 255 - images, images))
    outside = with_images(batch, torch.where(pixels(hidden), images, 255 - images))

    def predicted(given: Batch) -> Tensor:
        tokens = term.encode_visible(given, hidden, model)
        return term.predict(tokens, hidden, features.language.mean())

    assert torch.equal(predicted(inside), predicted(batch))
    assert not torch.equal(predicted(outside), predicted(batch))
    with torch.no_grad():  # without a look at the picture, what is visible changes nothing
        term.out.weight.zero_()
    value = term(features, batch, model).value
    assert term(features, outside, model).value == value
    with torch.no_grad():
        term.out.bias.normal_()
    assert term(features, inside, model).value != term(features, batch, model).value


def test_tokens_of_hidden_patches_and_absent_views_never_enter_the_decoder() -> None:
    model, term, batch = scene()
    features, hidden = model(batch.observation), term.hidden(batch)
    language, tokens = features.language.mean(), features.vision
    clean = term.predict(tokens, hidden, language)
    spoiled = tokens.values.masked_fill((hidden | ~tokens.mask)[..., None], float("nan"))
    assert torch.equal(term.predict(Tokens(values=spoiled, mask=tokens.mask), hidden, language), clean)


def test_the_value_is_the_masked_mean_over_hidden_patches() -> None:
    model, term, batch = scene()
    features, hidden = model(batch.observation), term.hidden(batch)
    tokens = term.encode_visible(batch, hidden, model)
    images = batch.observation.images.double().flatten(0, 1)
    pooled = torch.nn.functional.avg_pool2d(images, 2) / 127.5 - 1
    cut = pooled.view(-1, 2, 3, 2, 8, 2, 8).permute(0, 1, 3, 5, 4, 6, 2).reshape(len(batch.window), 8, -1)
    errors = term.predict(tokens, hidden, features.language.mean()) - normalise_patches(cut)
    kept = hidden & batch.observation.image_mask.repeat_interleave(4, dim=1)
    expected = errors.square().mean(dim=-1)[kept].mean()
    torch.testing.assert_close(term(features, batch, model).value, expected)


def test_evaluation_repeats_itself_and_does_not_depend_on_the_batch() -> None:
    model, term, batch = scene()
    random = torch.get_rng_state()
    features = model(batch.observation)
    first, again = term(features, batch, model), term(features, batch, model)
    assert torch.equal(random, torch.get_rng_state())
    assert first.value == again.value and first.metrics == again.metrics
    order = torch.tensor([5, 2, 0, 1, 3, 4])
    shuffled = replace(batch, window=batch.window[order])
    assert torch.equal(term.hidden(shuffled), term.hidden(batch)[order])
    torch.manual_seed(9)
    assert torch.equal(scene()[1].hidden(batch), term.hidden(batch))


def test_training_draws_from_torchs_generator_alone() -> None:
    model, term, batch = scene()
    features = model(batch.observation)
    term.train()
    random = torch.get_rng_state()
    first, second = term(features, batch, model).value, term(features, batch, model).value
    torch.set_rng_state(random)
    assert term(features, batch, model).value == first != second


def test_text_gain_is_what_the_instruction_adds_and_is_measured_in_evaluation_alone() -> None:
    model, term, batch = scene()
    features = model(batch.observation)
    assert set(term.train()(features, batch, model).metrics) == {"recon/blind_baseline"}
    silent = replace(features, language=replace(features.language, mask=features.language.mask & False))
    term.eval()
    result, without = term(features, batch, model), term(silent, batch, model)
    gain = result.metrics["recon/text_gain"]
    torch.testing.assert_close(gain, (without.value - result.value).detach())
    assert gain != 0 and without.metrics["recon/text_gain"] == 0


def test_it_learns_to_beat_the_blind_guess() -> None:
    torch.manual_seed(0)
    model, batch = make_model(), make_batch()
    term = MaskedPatchesConfig(width=32, heads=2, downsample=4).build(model, "recon").eval()
    optimizer = torch.optim.Adam([*model.parameters(), *term.parameters()], lr=3e-3)
    for _ in range(60):
        result = term(model(batch.observation), batch, model)
        optimizer.zero_grad()
        result.value.backward()
        optimizer.step()
    assert result.value.item() < 0.5 * result.metrics["recon/blind_baseline"].item()
    assert result.metrics["recon/text_gain"].item() > 0


def test_half_precision_encoders_are_scored_in_full_precision() -> None:
    model, batch = make_model(), make_batch()
    term = MaskedPatchesConfig(width=16, heads=2).build(model, "recon").eval()
    with torch.autocast("cpu", torch.bfloat16):
        result = term(model(batch.observation), batch, model)
    assert result.value.dtype == torch.float32
    exact = term(model(batch.observation), batch, model).value.item()
    assert result.value.item() == pytest.approx(exact, rel=0.02)
