"""The inverse dynamics term: its two looks, its masks, its baseline, and that it sees what the robot did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.small_model import batch_of
from fixtures.term_batches import SPEC, as_double, make_batch, make_model
from tutti.models.vla import VLA
from tutti.objectives.terms.actions import InverseDynamicsConfig, InverseDynamicsTerm
from tutti.types import Batch, Future, Tokens


def real(**config: Any) -> tuple[VLA, InverseDynamicsTerm, Batch]:
    """The small real model, in float64."""
    model = make_model().double()
    given = {"hidden": 16, "channels": 4, "offset": 2, **config}
    return model, InverseDynamicsConfig(**given).build(model, "inverse").double(), as_double(make_batch())


def test_the_value_worked_out_by_hand() -> None:
    model, term, batch = real()
    with torch.no_grad():  # every action is predicted as this one
        term.head[2].weight.zero_()
        term.head[2].bias.copy_(torch.tensor([0.5, 0.0, -1.0]).repeat(2))
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


def test_each_of_k_actions_has_a_prediction_of_its_own_and_the_order_of_time_matters() -> None:
    model, term, batch = real(offset=4)
    now, later = model(batch.observation).vision, term.encode_later(batch.futures[4], model)
    predicted = term.predict(now, later)
    assert predicted.shape == (6, 4, SPEC.action_dim)
    assert not torch.allclose(predicted[:, 0], predicted[:, 1])
    assert not torch.allclose(predicted, term.predict(later, now))


def test_a_window_without_a_view_at_both_moments_does_not_count() -> None:
    model, term, batch = real()
    features = model(batch.observation)
    actions = batch.actions.clone()
    actions[0] += 5
    seen = batch.futures[2].observation.image_mask.clone()
    seen[0] = False
    future = batch.futures[2]
    blind = replace(future, observation=replace(future.observation, image_mask=seen))
    later = replace(batch, futures={**batch.futures, 2: blind})  # no view later
    assert term(features, replace(later, actions=actions), model).value == term(features, later, model).value
    mask = features.vision.mask.clone()
    mask[0] = False
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

    actions = torch.zeros(64, 5, 3)
    actions[:, 0, 0] = shift / 4
    mask = torch.zeros(64, 5, 3, dtype=torch.bool).index_fill(2, torch.tensor([0]), True)
    batch = batch_of(actions, mask)
    seen, later = (replace(batch.observation, images=look(place)) for place in (start, start + shift))
    future = Future(observation=later, mask=torch.ones(64, dtype=torch.bool))
    batch = replace(batch, observation=seen, futures={1: future})
    optimizer = torch.optim.Adam([*model.vision.parameters(), *term.parameters()], lr=3e-3)
    for _ in range(60):
        result = term(model(batch.observation), batch, model)
        optimizer.zero_grad()
        result.value.backward()
        optimizer.step()
    assert result.value.item() < 0.3 * result.metrics["inverse/zero_baseline"].item()
