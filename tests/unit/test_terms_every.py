"""Every kind of term: it trains beside the action, resumes to the same bits, its metrics are documented.

A new kind needs one line in KINDS; without it the first test fails.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor

from fixtures.term_batches import make_batch, make_loss, make_model
from tutti.models.vla import VLA
from tutti.objectives.config import DEFAULT_KINDS, ObjectiveConfig, TermConfig
from tutti.objectives.unified import UnifiedLoss
from tutti.plugin import CUSTOM
from tutti.training.metric_names import METRICS, describe_metric
from tutti.training.optim.averages import Ema
from tutti.training.optim.optimizers import AdamWConfig
from tutti.types import Batch

ROOT = Path(__file__).parents[2]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs" / "terms.md"

# What stands in the config of each kind besides its `kind`: sizes that suit the small model, nothing more.
KINDS: dict[str, dict[str, Any]] = {
    "contrastive": {"width": 16},
    "sigmoid": {"width": 16},
    "state_contrastive": {"width": 16},
    "recoverable_language": {"width": 16},
    "future_latent": {"hidden": 32, "decay": 0.9},
    "progress": {"hidden": 16},
    "chunk": {},
    "future_patches": {"width": 16, "heads": 2},
    "changed_patches": {"width": 16, "heads": 2},
    "masked_patches": {"width": 16, "heads": 2},
    "inverse_dynamics": {"hidden": 16, "channels": 4, "offset": 2},
    "future_states": {"offsets": (1, 3), "hidden": 16, "gripper": {"dimension": -1}},
    CUSTOM: {"kind": "own_term:StateChange", "options": {"offset": 2}},
}
STEPS = 3


@pytest.fixture(autouse=True)
def _own_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_term", raising=False)


def tags() -> set[str]:
    """The tags of the union of all terms."""
    union = get_args(TermConfig)[0]
    return {get_args(member)[1].tag for member in get_args(union)}


def build(kind: str, weight: float = 0.7) -> tuple[VLA, UnifiedLoss]:
    model = make_model()
    return model, make_loss(model, extra={"kind": kind, "weight": weight, **KINDS[kind]})


def steps(model: VLA, loss: UnifiedLoss, optimizer: Any, batches: list[Batch]) -> list[Tensor]:
    """Updates as the trainer makes them; gives the totals."""
    totals: list[Tensor] = []
    for batch in batches:
        terms = loss(model(batch.observation), batch, model)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.update_targets(model)
        loss.hooks.after_step({name: value.item() for name, value in terms.values.items()})
        totals.append(terms.total.detach())
    return totals


def state(*modules: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{k}": v for n, module in enumerate(modules) for k, v in module.state_dict().items()}


def test_every_kind_of_the_union_is_tried_here() -> None:
    assert set(KINDS) == tags()


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_beside_the_action(kind: str) -> None:
    model, loss = build(kind)
    before = {key: value.clone() for key, value in state(model, loss).items()}
    optimizer = AdamWConfig(lr=1e-3).build(model, loss)
    totals = steps(model, loss, optimizer, [make_batch(seed) for seed in range(STEPS)])
    assert all(math.isfinite(total.item()) for total in totals)
    after = state(model, loss)
    assert all(value.isfinite().all() for value in after.values())
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    trained = {f"0.{name}" for name, _ in model.named_parameters()}
    trained |= {f"1.{name}" for name, value in loss.named_parameters() if value.requires_grad}
    assert trained <= moved, f"never moved: {sorted(trained - moved)}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_term_goes_on_to_the_same_bits(kind: str) -> None:
    batches = [make_batch(seed) for seed in range(4)]
    model, loss = build(kind)
    optimizer = AdamWConfig().build(model, loss)
    steps(model, loss, optimizer, batches[:2])
    saved = copy.deepcopy((model.state_dict(), loss.state_dict(), optimizer.state_dict()))
    random = torch.get_rng_state()
    expected = steps(model, loss, optimizer, batches[2:])

    torch.manual_seed(9)
    other, other_loss = build(kind)
    other_optimizer = AdamWConfig().build(other, other_loss)
    for module, values in zip((other, other_loss, other_optimizer), saved, strict=True):
        module.load_state_dict(values)
    torch.set_rng_state(random)
    found = steps(other, other_loss, other_optimizer, batches[2:])
    assert torch.equal(torch.stack(found), torch.stack(expected))
    ours, theirs = state(model, loss), state(other, other_loss)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_evaluated_with_averaged_weights_and_leaves_no_trace(kind: str) -> None:
    model, loss = build(kind)
    averages = [Ema(model, 0.9), Ema(loss, 0.9)]
    optimizer = AdamWConfig().build(model, loss)
    steps(model, loss, optimizer, [make_batch(0)])
    for average in averages:
        average.update()
    before = copy.deepcopy(state(model, loss))
    batch = make_batch(5)
    with averages[0].applied(), averages[1].applied(), torch.no_grad():
        terms = loss.eval()(model.eval()(batch.observation), batch, model)
        assert terms.total.isfinite()
    assert all(torch.equal(value, before[key]) for key, value in state(model, loss).items())


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {CUSTOM}))
def test_its_metrics_are_scalars_with_a_line_of_their_own(kind: str) -> None:
    usual = {used: name for name, used in DEFAULT_KINDS.items()}
    name = usual.get(kind, "extra")
    model = make_model()
    loss = make_loss(model, **{name: {"kind": kind, **KINDS[kind]}})
    batch = make_batch()
    features = model(batch.observation)
    found = {**loss(features, batch, model).metrics, **loss.eval()(features, batch, model).metrics}
    assert all(value.ndim == 0 and not value.requires_grad for value in found.values())
    bare = [metric for metric in found if describe_metric(f"metric/{metric}") == METRICS["metric/*"]]
    assert bare == [], f"training/metric_names.py and docs/metrics.md need a line metric/*/... for {bare}"


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {CUSTOM}))
def test_it_has_a_row_in_the_docs(kind: str) -> None:
    assert f"\n| `{kind}` |" in DOCS.read_text(encoding="utf-8")


def test_the_configs_in_the_docs_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    shown = [yaml.safe_load(block)["objective"] for block in blocks]
    assert len(shown) >= 4
    for objective in shown:
        ObjectiveConfig.model_validate(objective)
