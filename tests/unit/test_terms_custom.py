"""Terms of the user's own: the documented example works and is short; errors name the target."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fixtures.term_batches import make_batch, make_model
from tutti.models.vla import VLA
from tutti.objectives.config import ObjectiveConfig
from tutti.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> VLA:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_term", raising=False)
    return make_model()


def objective(target: str, **options: object) -> ObjectiveConfig:
    mine = {"kind": target, "options": options, "weight": 0.5}
    return ObjectiveConfig.model_validate({"align": None, "recon": None, "state": None, "state_change": mine})


def test_the_example_is_short_and_trains_like_a_built_in_term(model: VLA) -> None:
    lines = (EXAMPLES / "own_term.py").read_text().rstrip().splitlines()
    assert len(lines) <= 30
    config = objective("own_term:StateChange", offset=3)
    loss = config.build(model)
    assert config.needs().futures == (3,)
    given = make_batch()
    terms = loss(model(given.observation), given, model)
    torch.testing.assert_close(terms.total, terms.values["action"] + 0.5 * terms.values["state_change"])
    terms.values["state_change"].backward()
    head = dict(loss.named_parameters())["terms.state_change.head.weight"]
    assert head.grad is not None and head.grad.any()
    assert any(p.grad is not None and p.grad.any() for p in model.fusion.parameters())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("own_term:Nothing", {}, r"state_change\.kind is 'own_term:Nothing'.*no such name.*StateChange"),
        ("own_term:StateChange", {"ofset": 3}, r"own_term:StateChange does not accept.*ofset"),
    ],
)
def test_errors_name_the_target(model: VLA, target: str, options: dict[str, object], message: str) -> None:
    config = objective(target, **options)
    with pytest.raises(UserError, match=message):
        config.build(model)
    with pytest.raises(UserError, match=message):
        config.needs()


def test_a_malformed_class_or_name_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match=r"own_term\.StateChange"):
        objective("own_term.StateChange")
    with pytest.raises(ValueError, match="cannot be a term's name"):
        ObjectiveConfig.model_validate({"Mine!": {"kind": "own_term:StateChange"}})


def test_a_built_in_place_takes_a_class_of_the_users_own(model: VLA) -> None:
    objective = ObjectiveConfig.model_validate({"recon": {"kind": "own_term:StateChange"}, "state": None})
    assert type(objective.build(model).terms["recon"]).__name__ == "StateChange"


def test_several_terms_may_want_different_futures(model: VLA) -> None:
    mine = {"kind": "own_term:StateChange", "options": {"offset": 2}}
    assert ObjectiveConfig.model_validate({"mine": mine}).needs().futures == (2, 4)
