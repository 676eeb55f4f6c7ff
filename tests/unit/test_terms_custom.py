"""Terms of the user's own: the documented example works and is short; errors name the target."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from fixtures.term_batches import make_batch, make_model
from tutti.config.run_config import RunConfig
from tutti.models.vla import VLA
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.term import Model, Term, TermValue
from tutti.types import Batch, Features, UserError

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


TAKEN = sorted({*dir(nn.Module()), *dir(nn.ModuleDict()), "total"})
FREE = (
    "lr",
    "step",
    "time",
    "loss",
    "weight",
    "lambda",
    "class",
    "copy",
    "json",
    "terms",
    "weights",
    "needs",
)
FREE += ("build", "model_config", "model_fields", "model_dump", "schema", "raw", "own", "all", "fused", "x2")


def test_no_name_of_a_term_breaks_anything(model: VLA) -> None:
    """Those that torch or the records use are refused with the rule; all others work."""
    config = {"kind": "own_term:StateChange", "weight": 0.1}
    for name in (*TAKEN, "a.b", "a/b", "a b", "", "\u00e9", "x\n", "1x", "_x", "A"):
        with pytest.raises(ValueError, match="cannot be a term's name"):
            ObjectiveConfig.model_validate({name: config})
    objective = ObjectiveConfig.model_validate({"recon": None, "state": None} | dict.fromkeys(FREE, config))
    loss, given = objective.build(model), make_batch()
    terms = loss(model(given.observation), given, model)
    assert set(terms.values) == {"align", "action", *FREE} == set(loss.names)
    loss.load_state_dict(loss.state_dict())
    assert ObjectiveConfig.model_validate(objective.model_dump(mode="json")).terms() == objective.terms()


class Reporting(Term):
    """Reports under a name of its own and under that of another term."""

    def __init__(self, model: Model, **term: Any) -> None:
        super().__init__(**term)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        value = self.mean(features.readout.square(), batch)
        return TermValue(value=value, metrics={"size": value, "action/l1": value, "mine/known": value})


def test_metrics_of_a_term_stand_under_its_name(model: VLA) -> None:
    mine = {"kind": f"{__name__}:Reporting"}
    config = ObjectiveConfig.model_validate({"align": None, "recon": None, "state": None, "mine": mine})
    given = make_batch()
    terms = config.build(model)(model(given.observation), given, model)
    assert {name for name in terms.metrics if name.startswith("mine")} == {
        *("mine/size", "mine/action/l1", "mine/known")
    }


def test_the_page_about_own_classes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files, written as the page says, do what it says."""
    page = (EXAMPLES.parent / "docs" / "how-to" / "own-classes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", page, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["foresight.yaml", "foresight.py", "try_foresight.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = runpy.run_path(str(tmp_path / "try_foresight.py"))
    loss, terms, model = (found[name] for name in ("objective", "terms", "model"))
    assert "'foresight': " in (said := capsys.readouterr().out) and "foresight/copy_baseline" in said
    term = loss.terms["foresight"]
    assert term.head.weight.grad.any() and term.goal.weight.grad.any() and term.needed.states == ("last",)
    first = terms.values["foresight"].item()
    for _ in range(200):
        loss.update_targets(model)
    assert float(loss.state_dict()["terms.foresight.updates"]) == 200
    batch = found["batch"]
    later = loss(model(batch.observation), batch, model).values["foresight"]
    assert later.item() == pytest.approx(100 * first, rel=1e-4)  # it has faded in
    for line in re.findall(r"```yaml\n(\w+: .*)\n", page):
        RunConfig.model_validate(yaml.safe_load(line))


def test_a_built_in_place_takes_a_class_of_the_users_own(model: VLA) -> None:
    objective = ObjectiveConfig.model_validate({"recon": {"kind": "own_term:StateChange"}, "state": None})
    assert type(objective.build(model).terms["recon"]).__name__ == "StateChange"


def test_several_terms_may_want_different_futures(model: VLA) -> None:
    mine = {"kind": "own_term:StateChange", "options": {"offset": 2}}
    assert ObjectiveConfig.model_validate({"mine": mine}).needs().futures == (2, 4)
