"""The inverse dynamics term: its two looks, its masks, its baseline, its gradient, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fixtures.term_batches import SPEC, as_double, make_batch, make_model
from tutti.models.vla import VLA
from tutti.objectives.term import Model
from tutti.objectives.terms.actions import InverseDynamicsConfig, InverseDynamicsTerm
from tutti.types import Batch, DataNeeds, Future, Tokens, UserError


def real(**config: Any) -> tuple[VLA, InverseDynamicsTerm, Batch]:
    """The small real model, in float64."""
    model = make_model().double()
    given = {"hidden": 16, "channels": 4, "offset": 2, **config}
    return model, InverseDynamicsConfig(**given).build(model, "inverse").double(), as_double(make_batch())


def with_future(batch: Batch, offset: int = 2, **changes: Any) -> Batch:
    """The batch with another future at `offset`: its mask, or parts of its observation."""
    future = batch.futures[offset]
    mask = changes.pop("mask", future.mask)
    changed = Future(observation=replace(future.observation, **changes), mask=mask)
    return replace(batch, futures={**batch.futures, offset: changed})


def constant(term: InverseDynamicsTerm, action: Tensor) -> None:
    """Every action is predicted as this one."""
    with torch.no_grad():
        term.head[2].weight.zero_()
        term.head[2].bias.copy_(action.repeat(term.num_actions))


def test_the_value_worked_out_by_hand() -> None:
    model, term, batch = real()
    constant(term, torch.tensor([0.5, 0.0, -1.0]))
    actions = torch.full((6, 5, 3), 9.0, dtype=torch.float64)  # what comes after k actions is not asked for
    actions[:, 0] = torch.tensor([1.0, 1.0, 1.0])
    actions[:, 1] = torch.tensor([0.0, -2.0, 0.0])
    mask = torch.ones(6, 5, 3, dtype=torch.bool)
    mask[:, 1, 2] = False
    given = replace(batch, actions=actions, action_mask=mask)
    result = term(model(batch.observation), given, model)
    errors = [0.5, 1.0, 2.0, 0.5, 2.0]
    assert result.value.item() == pytest.approx(sum(errors) / 5, rel=1e-12)
    baseline = [1.0, 1.0, 1.0, 0.0, 2.0]
    assert result.metrics["inverse/zero_baseline"].item() == pytest.approx(sum(baseline) / 5, rel=1e-12)


def test_each_of_k_actions_has_a_prediction_of_its_own() -> None:
    model, term, batch = real(offset=4)
    features = model(batch.observation)
    predicted = term.predict(features.vision, term.encode_later(batch.futures[4], model))
    assert predicted.shape == (6, 4, SPEC.action_dim)
    assert not torch.allclose(predicted[:, 0], predicted[:, 1])
    assert term.config.needs("inverse") == DataNeeds(futures=(4,))


def test_order_of_time_matters() -> None:
    model, term, batch = real()
    now, later = model(batch.observation).vision, term.encode_later(batch.futures[2], model)
    assert not torch.allclose(term.predict(now, later), term.predict(later, now))


def test_what_lies_past_the_end_does_not_count_even_if_it_is_nan() -> None:
    model, term, batch = real()
    ended = torch.tensor([True, False, True, True, False, True])
    features = model(batch.observation)
    clean = with_future(batch, mask=ended)
    actions = batch.actions.clone()
    actions[~ended] = float("nan")
    images = model.prepare(batch.futures[2].observation.images).clone()
    images[~ended] = float("nan")
    dirty = with_future(replace(batch, actions=actions), mask=ended, images=images)
    result = term(features, dirty, model)
    torch.testing.assert_close(result.value, term(features, clean, model).value, rtol=1e-12, atol=0)
    baseline = term(features, clean, model).metrics["inverse/zero_baseline"]
    assert result.metrics["inverse/zero_baseline"] == baseline
    result.value.backward()
    gradients = [p.grad for module in (model, term) for p in module.parameters() if p.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_an_absent_view_says_nothing_and_a_window_without_any_does_not_count() -> None:
    model, term, batch = real()
    features = model(batch.observation)
    present = batch.futures[2].observation.image_mask.clone()
    present[0] = torch.tensor([False, True])
    images = batch.futures[2].observation.images.clone()
    images[0, 0] = 255 - images[0, 0]
    first = term(features, with_future(batch, image_mask=present), model)
    assert term(features, with_future(batch, image_mask=present, images=images), model).value == first.value

    present[0] = False  # no view later: the window's actions do not matter any more
    actions = batch.actions.clone()
    actions[0] += 5
    blind = with_future(batch, image_mask=present)
    assert term(features, replace(blind, actions=actions), model).value == term(features, blind, model).value
    gone = torch.zeros_like(features.vision.mask[:1]).expand(1, -1)
    mask = torch.cat([gone, features.vision.mask[1:]])
    unseen = replace(features, vision=replace(features.vision, mask=mask))  # no view now
    assert term(unseen, replace(batch, actions=actions), model).value == term(unseen, batch, model).value


def test_a_token_absent_in_either_look_never_enters_the_head() -> None:
    model, term, batch = real()
    now, later = model(batch.observation).vision, term.encode_later(batch.futures[2], model)
    now_mask, later_mask = now.mask.clone(), later.mask.clone()
    now_mask[1, :4] = False
    later_mask[2, 4:] = False
    absent = ~(now_mask & later_mask)[..., None]

    def predicted(fill: float) -> Tensor:
        first = Tokens(values=now.values.masked_fill(absent, fill), mask=now_mask)
        return term.predict(first, Tokens(values=later.values.masked_fill(absent, fill), mask=later_mask))

    assert torch.equal(predicted(float("nan")), predicted(7.0))


def test_masked_actions_do_not_count() -> None:
    model, term, batch = real()
    features = model(batch.observation)
    mask = batch.action_mask.clone()
    mask[2, 1] = False
    actions = batch.actions.clone()
    actions[2, 1] = float("nan")
    given = replace(batch, action_mask=mask)
    assert term(features, replace(given, actions=actions), model).value == term(features, given, model).value


def test_nothing_left_gives_zero_with_zero_gradient() -> None:
    model, term, batch = real()
    result = term(model(batch.observation), with_future(batch, mask=torch.zeros(6, dtype=torch.bool)), model)
    result.value.backward()
    assert result.value == 0
    assert all(p.grad is None or not p.grad.any() for m in (model, term) for p in m.parameters())


def gradient(**config: Any) -> tuple[float, dict[str, Tensor]]:
    """The value, and the gradient of every parameter of the model that gets one."""
    model, term, batch = real(**config)
    value = term(model(batch.observation), batch, model).value
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return value.item(), found


def test_vision_learns_from_both_looks_and_nothing_else_does() -> None:
    value, both = gradient()
    assert both and all(name.startswith("vision.") for name in both)
    now_value, now_only = gradient(stop_future=True)
    model, term, batch = real()
    vision = model(batch.observation).vision
    still = replace(vision, values=vision.values.detach())
    later_only = term.compute(replace(model(batch.observation), vision=still), batch, model).value
    later_only.backward()
    assert value == now_value == later_only.item()
    for name, parameter in model.named_parameters():
        if name in both:
            assert parameter.grad is not None
            torch.testing.assert_close(now_only[name] + parameter.grad, both[name])
            assert parameter.grad.any() and now_only[name].any()


def test_stop_gradient_at_vision_stops_both_looks() -> None:
    value, found = gradient(stop_gradient=("vision",))
    assert found == {} and value == gradient()[0]


@dataclass
class Fixed:
    """An encoder whose tokens are given and not seen."""

    values: Tensor
    width: int = 4
    tokens_per_view: int = 1

    def __call__(self, images: Tensor, image_mask: Tensor) -> Tokens:
        return Tokens(values=self.values, mask=image_mask)


def test_gradients_are_right() -> None:
    torch.manual_seed(0)
    spec = replace(SPEC, action_dim=2)
    later = Fixed(torch.randn(3, 2, 4, dtype=torch.float64))
    model = SimpleNamespace(
        spec=spec, vision=later, language=later, fusion=later, action=None, prepare=lambda images: images
    )
    config = InverseDynamicsConfig(hidden=5, channels=3, offset=2)
    term = config.build(cast("Model", model), "inverse").double()
    batch = as_double(make_batch(b=3))
    features = make_model().double()(batch.observation)
    batch = replace(batch, actions=batch.actions[..., :2], action_mask=batch.action_mask[..., :2])
    now = Tokens(values=torch.randn(3, 2, 4, dtype=torch.float64), mask=batch.observation.image_mask)
    names = ("narrow.weight", "head.0.bias", "head.2.weight")

    def value(first: Tensor, second: Tensor, *given: Tensor) -> Tensor:
        later.values = second
        seen = replace(features, vision=replace(now, values=first))
        return torch.func.functional_call(
            term, dict(zip(names, given, strict=True)), (seen, batch, model)
        ).value

    inputs = [now.values, later.values, *(dict(term.named_parameters())[name] for name in names)]
    copies = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(value, copies)


def test_it_sees_what_the_robot_did() -> None:
    """A bright square moves by as much as the first action says: only both pictures together tell it."""
    torch.manual_seed(0)
    model = make_model()
    term = InverseDynamicsConfig(offset=1).build(model, "inverse")
    start = torch.randint(4, 20, (64,))
    shift = torch.randint(-4, 5, (64,))

    def look(place: Tensor) -> Tensor:
        columns = torch.arange(32)[None]
        bright = (columns >= place[:, None]) & (columns < place[:, None] + 8)
        return (bright[:, None, None, None, :] * 255).expand(64, 2, 3, 32, 32).to(torch.uint8).contiguous()

    one = make_batch()
    rows = torch.zeros(64, dtype=torch.int64)
    seen = replace(
        one.observation,
        images=look(start),
        image_mask=torch.ones(64, 2, dtype=torch.bool),
        text=one.observation.text[rows],
        text_mask=one.observation.text_mask[rows],
        state=one.observation.state[rows],
    )
    actions = torch.zeros(64, 5, 3)
    actions[:, 0, 0] = shift / 4
    batch = Batch(
        observation=seen,
        actions=actions,
        action_mask=torch.zeros(64, 5, 3, dtype=torch.bool).index_fill(2, torch.tensor([0]), True),
        instruction_id=rows,
        embodiment=rows,
        window=torch.arange(64),
        futures={
            1: Future(
                observation=replace(seen, images=look(start + shift)), mask=torch.ones(64, dtype=torch.bool)
            )
        },
    )
    optimizer = torch.optim.Adam([*model.vision.parameters(), *term.parameters()], lr=3e-3)
    for _ in range(60):
        result = term(model(batch.observation), batch, model)
        optimizer.zero_grad()
        result.value.backward()
        optimizer.step()
    assert result.value.item() < 0.3 * result.metrics["inverse/zero_baseline"].item()


def test_sizes_that_clash_name_the_key_and_the_cure() -> None:
    model, term, batch = real()
    with pytest.raises(UserError, match=r"inverse\.offset is 6, but must lie in 1\.\.5.*raise data\.horizon"):
        InverseDynamicsConfig(offset=6).build(model, "inverse")
    with pytest.raises(UserError, match="needs the observation 2 actions later"):
        term(model(batch.observation), replace(batch, futures={}), model)


def test_the_encoder_stays_the_models() -> None:
    model, term, _ = real()
    mine = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in mine for parameter in term.parameters())
