"""Masked patches: what is hidden, what counts, who learns, and that validation repeats itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fixtures.term_batches import as_double, make_batch, make_model
from tutti.models.vla import VLA
from tutti.objectives.term import Model
from tutti.objectives.terms.masked_patches import MaskedPatchesConfig, MaskedPatchesTerm
from tutti.objectives.terms.patches import normalise_patches
from tutti.types import Batch, DataSpec, Features, Observation, Tokens, UserError, masked_mean

SMALL = DataSpec(
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
class Fixed:
    """An encoder of 2 x 2 patches, whose tokens are given and not seen."""

    values: Tensor
    width: int = 6
    tokens_per_view: int = 4

    def __call__(self, images: Tensor, image_mask: Tensor) -> Tokens:
        return Tokens(values=self.values[: len(images)], mask=image_mask.repeat_interleave(4, dim=1))


def fixed_term(**config: Any) -> tuple[Any, MaskedPatchesTerm]:
    torch.manual_seed(0)
    random = torch.randn(4, 8, 6, dtype=torch.float64)
    model = SimpleNamespace(
        spec=SMALL,
        vision=Fixed(random),
        language=SimpleNamespace(width=6),
        fusion=SimpleNamespace(width=6),
        action=None,
        prepare=lambda images: images.double() / 127.5 - 1,
    )
    chosen = MaskedPatchesConfig(**{"width": 8, "heads": 2, "downsample": 1, **config})
    return model, chosen.build(cast("Model", model), "recon").double().eval()


def scene(b: int = 4) -> tuple[Features, Batch]:
    random = torch.Generator().manual_seed(0)
    tokens = Tokens(
        values=torch.randn(b, 2, 6, dtype=torch.float64, generator=random),
        mask=torch.ones(b, 2, dtype=torch.bool),
    )
    ids = torch.arange(b)
    batch = Batch(
        observation=Observation(
            images=torch.randint(0, 256, (b, 2, 3, 8, 8), dtype=torch.uint8, generator=random),
            image_mask=torch.ones(b, 2, dtype=torch.bool),
            text=torch.zeros(b, 2, dtype=torch.int64),
            text_mask=torch.ones(b, 2, dtype=torch.bool),
            state=torch.zeros(b, 1),
        ),
        actions=torch.zeros(b, 5, 1),
        action_mask=torch.ones(b, 5, 1, dtype=torch.bool),
        instruction_id=ids,
        embodiment=torch.zeros_like(ids),
        window=ids,
    )
    return Features(vision=tokens, language=tokens, readout=tokens.mean(), fused_vision=tokens), batch


def with_images(batch: Batch, images: Tensor, mask: Tensor | None = None) -> Batch:
    seen = replace(batch.observation, images=images)
    return replace(batch, observation=seen if mask is None else replace(seen, image_mask=mask))


def real(**config: Any) -> tuple[VLA, MaskedPatchesTerm, Batch]:
    """The small real model in float64: four tokens a view, one of them visible."""
    model = make_model().double()
    term = MaskedPatchesConfig(**{"width": 16, "heads": 2, **config}).build(model, "recon").double()
    return model, term, as_double(make_batch())


def cells(hidden: Tensor) -> Tensor:
    """(b, n) over 2 x 2 patches of two views of 32 pixels to (b, 2, 1, 32, 32)."""
    grid = hidden.view(-1, 2, 1, 2, 2)
    return grid.repeat_interleave(16, dim=3).repeat_interleave(16, dim=4)


def test_the_value_worked_out_by_hand() -> None:
    model, term = fixed_term()
    with torch.no_grad():  # every number of every patch is predicted as 0.5
        term.out.weight.zero_()
        term.out.bias.fill_(0.5)
    features, batch = scene()
    images = torch.full((4, 2, 3, 8, 8), 255, dtype=torch.uint8)
    images[..., ::2] = 0  # stripes: half the numbers of a patch are 1, half -1; mean 0, variance 1
    images[:, 1] = 77  # flat: normalised to 0
    result = term(features, with_images(batch, images), model)
    striped, flat = 0.25 + 1 / (1 + 1e-6), 0.25
    assert result.value.item() == pytest.approx((striped + flat) / 2, rel=1e-12)
    expected = (1 / (1 + 1e-6)) / 2
    assert result.metrics["recon/blind_baseline"].item() == pytest.approx(expected, rel=1e-12)
    assert result.metrics["recon/text_gain"] == 0


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 1), (0.5, 2), (0.3, 3)])
def test_each_view_hides_equally_many_patches(ratio: float, visible: int) -> None:
    term = fixed_term(ratio=ratio)[1].train()
    _, batch = scene()
    torch.manual_seed(3)
    first, second = term.hidden(batch), term.hidden(batch)
    assert not torch.equal(first, second)
    for hidden in (first, second, term.eval().hidden(batch)):
        assert ((~hidden).view(4, 2, 4).sum(dim=2) == visible).all()


def test_every_patch_is_hidden_about_equally_often() -> None:
    term = fixed_term()[1].train()
    _, batch = scene()
    torch.manual_seed(1)
    drawn = torch.stack([term.hidden(batch) for _ in range(500)]).double().mean(dim=(0, 1))
    assert (drawn - 0.75).abs().max() < 0.05
    listed = (term.fixed_order >= term.num_visible).double().mean(dim=0)
    assert (listed - 0.75).abs().max() < 0.15


def test_hidden_pixels_never_enter_the_prediction() -> None:
    model, term, batch = real()
    hidden = term.hidden(batch)
    images = batch.observation.images
    inside = with_images(batch, torch.where(cells(hidden), 255 - images, images))
    outside = with_images(batch, torch.where(cells(hidden), images, 255 - images))
    language = model(batch.observation).language.mean()

    def predicted(given: Batch) -> Tensor:
        return term.predict(term.encode_visible(given, hidden, model), hidden, language)

    assert torch.equal(predicted(inside), predicted(batch))
    assert not torch.equal(predicted(outside), predicted(batch))


def test_only_hidden_patches_count() -> None:
    model, term = fixed_term()
    features, batch = scene()
    hidden = term.hidden(batch).view(4, 2, 1, 2, 2)
    hidden = hidden.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
    images = batch.observation.images
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    visible = with_images(batch, torch.where(hidden, images, noise))
    covered = with_images(batch, torch.where(hidden, noise, images))
    assert term(features, visible, model).value == term(features, batch, model).value
    assert term(features, covered, model).value != term(features, batch, model).value


def test_tokens_of_hidden_patches_and_absent_views_never_enter_the_decoder() -> None:
    _, term = fixed_term()
    features, batch = scene()
    hidden = term.hidden(batch)
    mask = torch.tensor([[True, True]] * 3 + [[True, False]]).repeat_interleave(4, dim=1)
    values = torch.randn(4, 8, 6, dtype=torch.float64)
    language = features.language.mean()
    clean = term.predict(Tokens(values=values, mask=mask), hidden, language)
    spoiled = values.masked_fill((hidden | ~mask)[..., None], float("nan"))
    assert torch.equal(term.predict(Tokens(values=spoiled, mask=mask), hidden, language), clean)


def test_the_value_is_the_masked_mean_over_hidden_patches() -> None:
    model, term, batch = real()
    term.eval()
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
    model, term, batch = real()
    term.eval()
    random = torch.get_rng_state()
    features = model(batch.observation)
    first, again = term(features, batch, model), term(features, batch, model)
    assert torch.equal(random, torch.get_rng_state())
    assert first.value == again.value and first.metrics == again.metrics
    order = torch.tensor([5, 2, 0, 1, 3, 4])
    shuffled = replace(batch, window=batch.window[order])
    assert torch.equal(term.hidden(shuffled), term.hidden(batch)[order])
    torch.manual_seed(9)
    other = MaskedPatchesConfig(width=16, heads=2).build(model, "recon").eval()
    assert torch.equal(other.hidden(batch), term.hidden(batch))


def test_training_draws_from_torchs_generator_alone() -> None:
    model, term, batch = real()
    features = model(batch.observation)
    random = torch.get_rng_state()
    first = term(features, batch, model).value
    second = term(features, batch, model).value
    torch.set_rng_state(random)
    assert term(features, batch, model).value == first != second


def test_an_absent_view_does_not_count_even_if_it_is_nan() -> None:
    model, term, batch = real()
    term.eval()
    prepared = model.prepare(batch.observation.images)
    spoiled = prepared.clone()
    spoiled[-1, 1] = float("nan")  # the view that this batch's last window lacks
    clean, dirty = (with_images(batch, images) for images in (prepared, spoiled))
    result = term(model(dirty.observation), dirty, model)
    assert result.value == term(model(clean.observation), clean, model).value
    assert all(bool(metric.isfinite()) for metric in result.metrics.values())
    result.value.backward()
    gradients = [p.grad for module in (model, term) for p in module.parameters() if p.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_nothing_left_gives_zero_with_zero_gradient() -> None:
    model, term, batch = real()
    gone = with_images(batch, batch.observation.images, torch.zeros_like(batch.observation.image_mask))
    result = term(model(gone.observation), gone, model)
    result.value.backward()
    assert result.value == 0
    assert all(p.grad is None or not p.grad.any() for m in (model, term) for p in m.parameters())


def test_vision_and_language_learn_and_a_stop_stops_them() -> None:
    def moved(*stop: Any) -> tuple[float, set[str]]:
        model, term, batch = real(stop_gradient=stop)
        value = term.eval()(model(batch.observation), batch, model).value
        value.backward()
        parts = {
            name
            for name, part in model.named_children()
            if any(p.grad is not None and p.grad.any() for p in part.parameters())
        }
        return value.item(), parts

    value, parts = moved()
    assert parts == {"vision", "language"}
    assert moved("vision") == (value, {"language"})
    assert moved("language") == (value, {"vision"})
    assert moved("vision", "language") == (value, set())


def test_the_encoder_stays_the_models() -> None:
    model, term, _ = real()
    mine = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in mine for parameter in term.parameters())
    assert not any(key.startswith(("vision", "model", "fixed")) for key in term.state_dict())


def test_text_gain_is_what_the_instruction_adds_and_is_measured_in_evaluation_alone() -> None:
    model, term, batch = real()
    features = model(batch.observation)
    assert set(term(features, batch, model).metrics) == {"recon/blind_baseline"}
    silent = replace(features, language=replace(features.language, mask=features.language.mask & False))
    term.eval()
    result, without = term(features, batch, model), term(silent, batch, model)
    gain = result.metrics["recon/text_gain"]
    torch.testing.assert_close(gain, (without.value - result.value).detach())
    assert gain != 0 and without.metrics["recon/text_gain"] == 0


def test_gradients_are_right() -> None:
    values = torch.randn(2, 8, 6, dtype=torch.float64)
    features, batch = scene(2)
    mask = torch.tensor([[True, True], [True, False]])
    batch = with_images(batch, batch.observation.images, mask)
    model, term = fixed_term()
    names = ("mask_token", "out.bias", "language.bias")

    def value(tokens: Tensor, language: Tensor, *given: Tensor) -> Tensor:
        model.vision.values = tokens
        told = replace(features, language=replace(features.language, values=language))
        return torch.func.functional_call(
            term, dict(zip(names, given, strict=True)), (told, batch, model)
        ).value

    inputs = [values, features.language.values, *(dict(term.named_parameters())[name] for name in names)]
    copies = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(value, copies)


def test_it_learns_to_beat_the_blind_guess() -> None:
    torch.manual_seed(0)
    model = make_model()
    term = MaskedPatchesConfig(width=32, heads=2, downsample=4).build(model, "recon").eval()
    batch = make_batch()
    optimizer = torch.optim.Adam([*model.parameters(), *term.parameters()], lr=3e-3)
    for _ in range(60):
        result = term(model(batch.observation), batch, model)
        optimizer.zero_grad()
        result.value.backward()
        optimizer.step()
    assert result.value.item() < 0.5 * result.metrics["recon/blind_baseline"].item()
    assert result.metrics["recon/text_gain"].item() > 0


def test_half_precision_encoders_are_scored_in_full_precision() -> None:
    model = make_model()
    term = MaskedPatchesConfig(width=16, heads=2).build(model, "recon").eval()
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        result = term(model(batch.observation), batch, model)
    assert result.value.dtype == torch.float32
    exact = term(model(batch.observation), batch, model).value.item()
    assert result.value.item() == pytest.approx(exact, rel=0.02)


def test_sizes_that_clash_name_the_key_and_the_cure() -> None:
    with pytest.raises(UserError, match=r"recon\.ratio is 0\.9, which leaves 0 of a view's 4 patches"):
        fixed_term(ratio=0.9)
    with pytest.raises(UserError, match=r"leaves 4 of .* Choose a ratio between 0\.25 and 0\.75"):
        fixed_term(ratio=0.1)
    with pytest.raises(UserError, match=r"recon\.downsample is 3, but must divide the patch of 4"):
        fixed_term(downsample=3)
    model = make_model()
    model.vision.tokens_per_view = 5
    with pytest.raises(UserError, match=r"objective\.mask needs vision tokens on a square grid"):
        MaskedPatchesConfig().build(model, "mask")
    with pytest.raises(ValidationError, match="not divisible by heads"):
        MaskedPatchesConfig(width=10, heads=4)


def test_the_blind_baseline_is_the_loss_of_predicting_zero() -> None:
    model, term = fixed_term()
    with torch.no_grad():
        term.out.weight.zero_()
        term.out.bias.zero_()
    features, batch = scene()
    result = term(features, batch, model)
    assert result.value.item() == result.metrics["recon/blind_baseline"].item()
    assert masked_mean(result.value, torch.tensor(True)).item() == pytest.approx(1, abs=0.01)
