"""What every action decoder promises, checked for each kind of the union."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load, save
from test_models_vla import METAWORLD

from fixtures.small_decoders import (
    ACTION,
    HORIZON,
    SMALL,
    batch,
    build,
    chunks,
    features,
    fitted,
    gradients,
    holes,
    loss,
    narrow_model,
)
from tutti.config.run_config import load_config
from tutti.models.config import ActionDecoderConfig, CustomDecoderConfig, ModelConfig
from tutti.models.describe import describe
from tutti.objectives.terms.actions import ChunkTerm
from tutti.training.optim.averages import Ema
from tutti.training.optim.optimizers import output_heads
from tutti.types import Tokens, UserError, masked_mean

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
PLAIN = ("regression", "flow", "diffusion", "bins", "fast")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in PLAIN},
    "regression with gripper": ("regression", {"gripper": {"weight": 0.5}}),
    "regression, smooth l1": ("regression", {"loss": "smooth_l1", "beta": 0.5}),
    **{f"{kind} with cross-attention": (kind, {"cross_attention": True}) for kind in PLAIN[1:]},
    "diffusion of velocity": ("diffusion", {"prediction": "velocity"}),
    "diffusion of noise": ("diffusion", {"prediction": "noise"}),
    "bins by expectation": ("bins", {"estimate": "expectation"}),
}
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS.keys())
OVERFITS = {  # steps of AdamW at 3e-3, and the mean L1 (of actions about 1 in size) that predict must reach
    "regression": (100, 0.03),
    "regression with gripper": (100, 0.03),
    "flow": (200, 0.12),
    "diffusion": (150, 0.12),
    "bins": (100, 0.05),
    "fast": (100, 0.05),
}


def test_every_kind_of_the_union_is_tested_here() -> None:
    members = get_args(get_args(ActionDecoderConfig)[0])
    configs = [get_args(member)[0] for member in members]
    named = [c.model_fields["kind"].annotation for c in configs if c is not CustomDecoderConfig]
    kinds = {kind for one in named for kind in get_args(one)}
    assert kinds - {"pi0"} == set(PLAIN) == {kind for kind, _ in KINDS.values()}


@pytest.mark.parametrize(("name", "bounds"), OVERFITS.items(), ids=OVERFITS.keys())
def test_one_batch_is_learned(name: str, bounds: tuple[int, float]) -> None:
    kind, options = KINDS[name]
    model, given = narrow_model(kind, **options), batch(8)
    term = ChunkTerm(name="action")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)

    def mean_loss() -> float:
        """Over 32 fixed seeds of whatever the decoder draws."""
        with torch.no_grad():
            seen = model(given.observation)
            return sum(loss(model.action, seen, given, seed).item() for seed in range(32)) / 32

    first = mean_loss()
    steps, largest = bounds
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        term(model(given.observation), given, model).value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert mean_loss() < 0.05 * first
    assert masked_mean((model.predict(given.observation) - given.actions).abs(), given.action_mask) < largest


@every_kind
def test_shapes_and_finite_gradients(kind: str, options: dict[str, Any]) -> None:
    decoder, seen = fitted(kind, **options), features()
    error = decoder(seen, batch())
    assert error.shape == (4, HORIZON, ACTION) and bool(error.isfinite().all()) and bool((error >= 0).all())
    assert decoder.predict(seen).shape == (4, HORIZON, ACTION)
    found = gradients(decoder, error.mean())
    assert found and all(bool(gradient.isfinite().all()) for gradient in found)


@every_kind
def test_masked_steps_change_neither_value_nor_gradient(kind: str, options: dict[str, Any]) -> None:
    decoder, seen, mask = fitted(kind, **options), features(), holes()
    given = batch(mask=mask)
    assert not mask.all()
    results = []
    for filler in (0.0, 37.5, float("nan")):
        filled = replace(given, actions=torch.where(mask, given.actions, torch.tensor(filler)))
        value = loss(decoder, seen, filled)
        results.append((value, gradients(decoder, value)))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradient, results[0][1], strict=True))


@every_kind
def test_predict_is_a_function_of_the_features_alone(kind: str, options: dict[str, Any]) -> None:
    decoder, seen = fitted(kind, **options), features()
    torch.manual_seed(1)
    first = decoder.predict(seen)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(decoder.predict(seen), first)
    assert torch.equal(torch.get_rng_state(), before)
    decoder(seen, batch())
    assert torch.equal(decoder.train().predict(seen), first)
    assert torch.equal(decoder.eval().predict(seen), first)


@every_kind
def test_samples_of_a_batch_do_not_see_each_other(kind: str, options: dict[str, Any]) -> None:
    decoder = fitted(kind, **options).double()
    seen, other = features(dtype=torch.float64), features(seed=9, dtype=torch.float64)
    mixed = replace(
        seen,
        readout=torch.cat([seen.readout[:1], other.readout[1:]]),
        fused_vision=replace(
            seen.fused_vision,
            values=torch.cat([seen.fused_vision.values[:1], other.fused_vision.values[1:]]),
        ),
    )
    torch.testing.assert_close(decoder.predict(mixed)[0], decoder.predict(seen)[0], rtol=0, atol=1e-12)


@every_kind
def test_saved_weights_act_the_same_in_a_fresh_decoder_that_was_never_fitted(
    kind: str, options: dict[str, Any]
) -> None:
    decoder, seen = fitted(kind, **options), features()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.manual_seed(99)
    fresh = build(kind, **options)
    fresh.load_state_dict(load(save(decoder.state_dict())), strict=True)
    assert torch.equal(fresh.predict(seen), decoder.predict(seen))
    assert torch.equal(loss(fresh, seen, batch()), loss(decoder, seen, batch()))


@every_kind
def test_the_moving_average_carries_what_was_fitted(kind: str, options: dict[str, Any]) -> None:
    decoder, seen = fitted(kind, **options), features()
    average = Ema(decoder, 0.5)
    average.update()
    with average.applied():
        torch.testing.assert_close(decoder.predict(seen), fitted(kind, **options).predict(seen))
        assert loss(decoder, seen, batch()).isfinite()


@pytest.mark.parametrize("name", [name for name, (kind, _) in KINDS.items() if build(kind).needs_fit])
def test_training_before_fit_is_refused(name: str) -> None:
    kind, options = KINDS[name]
    decoder = build(kind, **options)
    assert decoder.needs_fit
    with pytest.raises(UserError, match=rf"model\.action\.kind is '{kind}'.*has seen none.*fit"):
        decoder(features(), batch())
    assert decoder.predict(features()).isfinite().all()


@every_kind
def test_actions_that_are_not_finite_are_refused_by_fit(kind: str, options: dict[str, Any]) -> None:
    decoder = build(kind, **options)
    actions, mask = chunks(8, seed=7)
    actions[2, 1, -1] = float("inf")
    if decoder.needs_fit:
        with pytest.raises(UserError, match="no finite numbers in action dimension"):
            decoder.fit(actions, mask)
    mask[2, 1, -1] = False
    decoder.fit(actions, mask)
    assert loss(decoder, features(), batch()).isfinite()


@pytest.mark.parametrize("kind", PLAIN[1:])
def test_cross_attention_looks_at_present_vision_tokens_only(kind: str) -> None:
    decoder, seen = fitted(kind, cross_attention=True), features()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    mask = seen.fused_vision.mask
    values = seen.fused_vision.values
    hidden = torch.where(mask[..., None], values, torch.full_like(values, 50.0))
    unseen = replace(seen, fused_vision=Tokens(values=hidden, mask=mask))
    assert torch.equal(loss(decoder, unseen, batch()), loss(decoder, seen, batch()))
    changed = replace(seen, fused_vision=Tokens(values=values + 1.0, mask=mask))
    assert not torch.equal(loss(decoder, changed, batch()), loss(decoder, seen, batch()))
    blind = replace(seen, fused_vision=Tokens(values=values, mask=torch.zeros_like(mask)))
    assert loss(decoder, blind, batch()).isfinite()


@every_kind
def test_low_precision_around_it_is_no_trouble(kind: str, options: dict[str, Any]) -> None:
    decoder, seen, given = fitted(kind, **options), features(), batch()
    exact = loss(decoder, seen, given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss(decoder, seen, given)
        assert decoder.predict(seen).isfinite().all()
    rough.backward()
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)


@every_kind
def test_the_output_head_is_the_layer_that_gives_the_actions(kind: str, options: dict[str, Any]) -> None:
    decoder = build(kind, **options)
    (head,) = output_heads(decoder)
    names = [name for name, module in decoder.named_modules() if module is head]
    assert names in (["out"], ["denoiser.out"])
    assert isinstance(head, torch.nn.Linear) and head.bias is not None and not head.bias.any()


@pytest.mark.parametrize("kind", PLAIN)
def test_another_kind_takes_nothing_of_the_first_ones(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {action: {kind: regression, hidden: 64}}")
    config = load_config(path, [f"model.action.kind={kind}"]).model.action
    assert config.kind == kind
    assert config == type(config)() or kind == "regression"
    path.write_text(f"model: {{action: {{kind: {kind}}}}}")
    plain = load_config(path).model
    assert plain.action.kind == kind
    assert ModelConfig.model_validate(plain.model_dump(mode="json")) == plain


def test_a_key_of_another_kind_is_a_mistake_with_its_name() -> None:
    with pytest.raises(UserError, match=r"model\.action\.hidden is not a key"):
        load_config(DEMO, ["model.action.kind=flow", "model.action.hidden=64"])
    with pytest.raises(UserError, match=r"model\.action\.kind: expected .*'flow'.*found 'flwo'"):
        load_config(DEMO, ["model.action.kind=flwo"])


@pytest.mark.parametrize("kind", PLAIN)
def test_the_tiny_model_stays_tiny_and_its_description_adds_up(kind: str) -> None:
    model = ModelConfig.model_validate({"action": {"kind": kind}}).build(METAWORLD)
    description = describe(model)
    decoder = next(row for row in description.modules if row.name == "action")
    assert 1e6 < description.parameters < 3e6
    assert decoder.parameters < 0.4e6
    assert sum(row.flops for row in description.modules if row.depth == 1) == description.flops
    parts = sum(row.flops for row in description.modules if row.name.startswith("action."))
    assert 0 < parts <= decoder.flops


@pytest.mark.parametrize("kind", PLAIN)
def test_every_decoder_grows_with_the_size_of_the_model(kind: str) -> None:
    shares = []
    for size in ("tiny", "small", "base", "large"):
        config = ModelConfig.model_validate({"size": size, "action": {"kind": kind}})
        with torch.device("meta"):
            model = config.build(METAWORLD)
        own, all_of_it = (sum(p.numel() for p in part.parameters()) for part in (model.action, model))
        shares.append(own / all_of_it)
    assert all(0.005 < share < 0.35 for share in shares), shares
    wider = ModelConfig.model_validate({"size": "small", "action": {"kind": "flow", "width": 128}}).action
    assert (wider.width, wider.depth) == (128, 4)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("kind", PLAIN)
def test_a_large_model_with_it_can_be_described_without_its_memory(kind: str) -> None:
    with torch.device("meta"):
        model = ModelConfig.model_validate({"size": "base", "action": {"kind": kind}}).build(SMALL)
    assert describe(model).flops > 1e8
