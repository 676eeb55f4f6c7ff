"""The inverse dynamics term: its two looks, its masks, its baseline, and that it sees what the robot did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.term_batches import SPEC, as_double, make_batch, make_model
from tutti.models.vla import VLA
from tutti.objectives.terms.actions import InverseDynamicsConfig, InverseDynamicsTerm
from tutti.types import Batch, Future, Tokens


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


def test_order_of_time_matters() -> None:
    model, term, batch = real()
    now, later = model(batch.observation).vision, term.encode_later(batch.futures[2], model)
    assert not torch.allclose(term.predict(now, later), term.predict(later, now))


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
