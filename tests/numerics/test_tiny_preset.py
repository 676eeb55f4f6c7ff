"""The tiny preset under every term, decoder, balancing, backward and strategy: it trains, and its gradient
is the sum that is said, in float64: grad_p = sum_i w_i lambda_i dL_i / dp, w_i = 1 unless the backward says
else.

A new kind needs one line in its list; without it the first test fails.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fixtures.small_model import NumberedLoader
from fixtures.term_batches import SPEC, as_double, make_batch
from tutti.config.run_config import RunConfig
from tutti.models.config import ActionDecoderConfig
from tutti.objectives.config import BalancingConfig, TermConfig
from tutti.plugin import CUSTOM
from tutti.training.backward.aggregators import AggregatorConfig
from tutti.training.backward.config import BackwardConfig
from tutti.training.backward.masked import OBJECTIVE
from tutti.training.backward.term_gradients import Gradients, term_gradients
from tutti.training.records import read_records
from tutti.training.strategy import StrategyConfig
from tutti.training.trainer import Trainer
from tutti.types import LossTerms

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 3
WINDOWS = 4
TERMS: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "sigmoid": {},
    "state_contrastive": {},
    "recoverable_language": {},
    "future_latent": {"offsets": [2]},
    "progress": {},
    "chunk": {},
    "future_patches": {},
    "changed_patches": {},
    "masked_patches": {},
    "inverse_dynamics": {"offset": 2},
    "future_states": {"offsets": [1, 3]},
    "own_term:StateChange": {"options": {"offset": 2}},
}
DECODERS = ("regression", "flow", "diffusion", "bins", "fast", "own_decoder:Laplace")
BALANCINGS: dict[str, dict[str, Any]] = {
    "shares": {"start": 1, "steps": 2},
    "uncertainty": {"learning_rate": 0.1},
    "dwa": {"every": 1},
    "rlw": {},
    "famo": {},
    "own_balancing:EqualLosses": {},
}
AGGREGATORS = (
    *("sum", "mean", "random", "pcgrad", "imtl_g", "upgrad", "dualproj", "cagrad", "mgda", "aligned_mtl"),
    *("fairgrad", "gradvac", "pcd", "cosine_gate"),
)
BACKWARDS: dict[str, dict[str, Any]] = {
    "one": {"kind": "one"},
    "masked": {"kind": "masked", "may_train": {"recon": ["vision"], "action": ["fusion", "action"]}},
    "knowledge_insulation": {"kind": "knowledge_insulation"},
    **{f"k_gradients {kind}": {"kind": "k_gradients", "aggregator": {"kind": kind}} for kind in AGGREGATORS},
    "k_gradients by part": {"kind": "k_gradients", "scope": "part", "may_train": {"state": ["fusion"]}},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("end_to_end", "action_only", "two_stage", "two_stage_frozen", "progressive")},
    "warmup_then_joint": {"first_share": 0.4, "encoder_factor": 0.5},
    "phases": {
        "list": [{"name": "a", "share": 1, "exclude_terms": ["align"], "learning_rates": {"vision": 0}}]
    },
}
STRATEGIES["progressive"] = {"shares": [1, 1, 1]}


def tags(union: Any) -> set[str]:
    """The kinds of a union; a class of the user's own is `CUSTOM`."""
    found: set[str] = set()
    for member in get_args(get_args(union)[0]):
        marks = [mark.tag for mark in get_args(member)[1:] if hasattr(mark, "tag")]
        found |= set(marks) if marks else set(get_args(member.model_fields["kind"].annotation))
    return found


def named(kinds: Any) -> set[str]:
    return {CUSTOM if ":" in kind else kind for kind in kinds}


class Data:
    def __init__(self) -> None:
        self.train = NumberedLoader(lambda number: make_batch(number, WINDOWS))
        self.validation = [make_batch(10_001, WINDOWS)]


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("own_term", "own_decoder", "own_balancing"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def trained(run: Path, **sections: Any) -> Trainer:
    """The tiny preset after `STEPS` updates, which must have left finite records of all that counted."""
    objective = {
        "align": {"weight": 0.3},
        "recon": {"weight": 0.2},
        "state": {"weight": 1.0, "offsets": [1, 3]},
        **sections.pop("objective", {}),
    }
    training = {
        **{"steps": STEPS, "threads": 1, "device": "cpu", "log_every": 1, "ema": "off"},
        **{"validation": {"every": 0}, "checkpoints": {"every": 0}, "diagnostics": {"every": 0}},
        "schedule": {"kind": "wsd", "warmup": 0},
    }
    config = RunConfig.model_validate({"objective": objective, "training": training, **sections})
    torch.manual_seed(0)
    model = config.model.build(SPEC)
    if model.action.needs_fit:
        model.action.fit(make_batch(7).actions, make_batch(7).action_mask)
    built = Trainer(
        config.training,
        model,
        config.objective.build(model, config.balancing),
        run,
        strategy=config.strategy,
        backward=config.backward,
    )
    built.fit(Data())
    records = [record for record in read_records(run) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for record in records for name, value in record.items() if "/" in name)
    assert config.model.size == "tiny" and 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    return built


def check_gradient(trainer: Trainer, step: int, parts: Mapping[str, set[str]] | None = None) -> LossTerms:
    """The identity in update `step`, in float64. `parts`: what a masked term may move of the model."""
    trainer.model.double()
    trainer.objective.double()
    moment = trainer.strategy.enter(step, trainer.parameters)
    active_terms = moment.phase.active_terms(trainer.objective.names)
    batch = as_double(make_batch(3, WINDOWS))
    model = trainer.model
    terms = trainer.objective(model(batch.observation), batch, model, moment.progress, active_terms)
    assert set(terms.values) == set(active_terms) and terms.total.dtype == torch.float64
    assert not any(weight.requires_grad for weight in terms.lambdas.values())
    total = sum(terms.lambdas[name].item() * value.item() for name, value in terms.values.items())
    assert terms.total.item() == pytest.approx(total, rel=1e-14)
    single = masked(term_gradients(terms.values, list(trainer.parameters.values())), trainer, parts or {})
    for parameter in trainer.parameters.values():
        parameter.grad = None
    trainer.backward.add(terms, 1)
    weights = trainer.backward.finish()
    for number, (name, parameter) in enumerate(trainer.parameters.items()):
        rows = {term: own[number] for term, own in single.items()}
        expected = combined(rows, terms.lambdas, weights, name)
        if parameter.grad is None or expected is None:
            assert expected is None or not expected.any(), name
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12, msg=name)
    return terms


def masked(gradients: Gradients, trainer: Trainer, parts: Mapping[str, set[str]]) -> Gradients:
    where = [name.split(".")[1] if name.startswith("model.") else OBJECTIVE for name in trainer.parameters]
    found: Gradients = {}
    for term, own in gradients.items():
        allowed = {*parts.get(term, where), OBJECTIVE}
        found[term] = [g if at in allowed else None for g, at in zip(own, where, strict=True)]
    return found


def combined(
    rows: Mapping[str, Tensor | None], lambdas: Mapping[str, Tensor], weights: Mapping[str, float], name: str
) -> Tensor | None:
    """sum_i w_i lambda_i g_i; w_i is 1 where the action or every other term does not move the parameter."""
    moving = {term: row for term, row in rows.items() if row is not None}
    if not moving:
        return None
    shared = {term for term, row in moving.items() if row.any()}
    part = name.split(".")[1]
    result = torch.zeros_like(next(iter(moving.values())))
    for term, row in moving.items():
        weight = 1.0
        if "action" in shared and len(shared) > 1:
            general = weights.get(f"backward/weight/{term}", 1.0)
            weight = weights.get(f"backward/weight/{part}/{term}", general)
        result += weight * lambdas[term] * row
    return result


def test_every_kind_is_tried_here() -> None:
    # Recordings have no answers: tests/integration/test_cotraining.py trains next_token.
    assert named(TERMS) == tags(TermConfig) - {"next_token"}
    # pi0's expert needs a VLM: tests/unit/test_decoders_pi0.py.
    assert named(DECODERS) == tags(ActionDecoderConfig) - {"pi0"}
    assert named(BALANCINGS) == tags(BalancingConfig)
    assert named(found["kind"] for found in BACKWARDS.values()) == tags(BackwardConfig) - {CUSTOM}
    assert set(AGGREGATORS) == tags(AggregatorConfig)
    assert set(STRATEGIES) == tags(StrategyConfig)


@pytest.mark.parametrize("kind", TERMS)
def test_every_term(kind: str, tmp_path: Path) -> None:
    extra = {"extra": {"kind": kind, "weight": 0.7, **TERMS[kind]}}
    trainer = trained(tmp_path, objective={"align": None, "recon": None, "state": None, **extra})
    terms = check_gradient(trainer, STEPS)
    assert set(terms.values) == {"action", "extra"} and terms.values["extra"].item() != 0


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder(kind: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, model={"action": {"kind": kind}})
    check_gradient(trainer, STEPS)
    decoder = [p for name, p in trainer.parameters.items() if name.startswith("model.action.")]
    assert any(p.grad is not None and bool(p.grad.any()) for p in decoder)


@pytest.mark.parametrize("kind", BALANCINGS)
def test_every_balancing(kind: str, tmp_path: Path) -> None:
    configured = {"align": 0.3, "action": 1.0, "recon": 0.2, "state": 1.0}
    key = "share" if kind == "shares" else "weight"
    objective = {name: {key: own} for name, own in configured.items() if name != "action"}
    objective["state"]["offsets"] = [1, 3]  # type: ignore[assignment]
    trainer = trained(tmp_path, balancing={"kind": kind, **BALANCINGS[kind]}, objective=objective)
    terms = check_gradient(trainer, STEPS)
    learned = any(terms.lambdas[name].item() != pytest.approx(own) for name, own in configured.items())
    assert learned


@pytest.mark.parametrize("kind", BACKWARDS)
def test_every_backward(kind: str, tmp_path: Path) -> None:
    moves = BACKWARDS[kind].get("may_train", {})
    if kind == "knowledge_insulation":
        moves = {"action": ["fusion", "action"]}
    trainer = trained(tmp_path, backward=BACKWARDS[kind])
    check_gradient(trainer, STEPS, {term: set(parts) for term, parts in moves.items()})


@pytest.mark.parametrize("kind", STRATEGIES)
def test_every_strategy_in_each_of_its_phases(kind: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, strategy={"kind": kind, **STRATEGIES[kind]})
    for end, phase in zip(trainer.strategy.ends, trainer.strategy.phases, strict=True):
        check_gradient(trainer, end - 1)
        moved = {name.split(".")[1] for name, p in trainer.parameters.items() if p.grad is not None}
        assert not moved & set(phase.frozen)
