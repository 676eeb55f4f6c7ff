"""Terms of the user's own: the documented example works and is short; errors name the target."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_models_parts import SPEC, observation

from tutti.models.vla import VLA, ModelConfig
from tutti.objectives.unified import ObjectiveConfig
from tutti.types import Batch, UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> VLA:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_term", raising=False)
    torch.manual_seed(0)
    return ModelConfig().build(SPEC)


def objective(target: str, **options: object) -> ObjectiveConfig:
    extra = {"state_change": {"target": target, "options": options, "weight": 0.5}}
    return ObjectiveConfig.model_validate({"align": None, "recon": None, "state": None, "extra": extra})


def batch() -> Batch:
    ids = torch.arange(4)
    return Batch(
        observation=observation(),
        actions=torch.randn(4, 5, 3),
        action_mask=torch.ones(4, 5, 3, dtype=torch.bool),
        instruction_id=ids,
        embodiment=ids * 0,
        window=ids,
        future=observation(seed=1),
        future_mask=torch.tensor([True, True, True, False]),
    )


def test_the_example_is_short_and_trains_like_a_built_in_term(model: VLA) -> None:
    lines = (EXAMPLES / "own_term.py").read_text().rstrip().splitlines()
    assert len(lines) <= 30
    loss = objective("own_term:StateChange", offset=3).build(model)
    assert loss.needs_future == 3
    given = batch()
    terms = loss(model(given.observation), given)
    torch.testing.assert_close(terms.total, terms.values["action"] + 0.5 * terms.values["state_change"])
    terms.values["state_change"].backward()
    head = dict(loss.named_parameters())["terms.state_change.head.weight"]
    assert head.grad is not None and head.grad.any()
    assert any(p.grad is not None and p.grad.any() for p in model.fusion.parameters())


def test_the_example_masks_what_lies_past_the_episode(model: VLA) -> None:
    loss = objective("own_term:StateChange").build(model)
    given = batch()
    assert given.future is not None
    state = given.future.state.clone()
    state[3] += 100
    other = replace(given, future=replace(given.future, state=state))
    features = model(given.observation)
    assert loss(features, given).total == loss(features, other).total


def test_stop_gradient_works_for_custom_terms(model: VLA) -> None:
    extra = {"mine": {"target": "own_term:StateChange", "stop_gradient": ["fused"]}}
    loss = ObjectiveConfig.model_validate({"state": None, "extra": extra}).build(model)
    given = batch()
    loss(model(given.observation), given).values["mine"].backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "no_such_module:Term",
            {},
            r"extra\.state_change\.target is 'no_such_module:Term'.*cannot be imported",
        ),
        ("own_term:Nothing", {}, r"own_term:Nothing.*no such name.*StateChange"),
        ("own_term:Any", {}, r"own_term:Any.*expected a subclass"),
        ("own_term:StateChange", {"ofset": 3}, r"own_term:StateChange does not accept.*ofset"),
    ],
)
def test_errors_name_the_target(model: VLA, target: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective(target, **options).build(model)


def test_a_malformed_target_or_a_taken_name_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="target"):
        objective("own_term.StateChange")
    with pytest.raises(ValueError, match="belongs to a built-in term"):
        ObjectiveConfig.model_validate({"extra": {"align": {"target": "a:B"}}})


def test_two_futures_in_one_batch_are_refused(model: VLA) -> None:
    extra = {"mine": {"target": "own_term:StateChange", "options": {"offset": 2}}}
    with pytest.raises(UserError, match="recon wants 4, mine wants 2"):
        ObjectiveConfig.model_validate({"extra": extra}).build(model)
