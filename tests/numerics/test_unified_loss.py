"""The unified loss in float64: total = sum lambda_i L_i, the same for gradients, and who reaches whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures import small_model
from fixtures.term_batches import SPEC, as_double, make_batch
from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.unified import UnifiedLoss
from tutti.types import DataNeeds, LossTerms

MODEL = {**small_model.MODEL, "fusion": {"width": 32, "depth": 2}}
REACH = {
    "align": {"vision", "language", "align head"},
    "action": {"vision", "language", "fusion", "action"},
    "recon": {"vision", "language", "fusion", "recon head"},
    "state": {"vision", "language", "fusion", "state head"},
}


def build(**objective: Any) -> tuple[VLA, UnifiedLoss]:
    torch.manual_seed(0)
    model = ModelConfig.model_validate(MODEL).build(SPEC)
    loss = config(**objective).build(model)
    return model.double(), loss.double()


def config(**objective: Any) -> ObjectiveConfig:
    given = {
        "align": {"weight": 0.3},
        "action": {"weight": 1.25},
        "recon": {"weight": 0.7},
        "state": {"weight": 2.5, "offsets": (1, 3)},
        **objective,
    }
    return ObjectiveConfig.model_validate(given)


def evaluate(model: VLA, loss: UnifiedLoss, progress: float = 0.0) -> LossTerms:
    given = as_double(make_batch())
    return loss(model(given.observation), given, model, progress)


def parts(model: VLA, loss: UnifiedLoss) -> dict[str, nn.Module]:
    heads = {f"{name} head": term for name, term in loss.terms.items() if name != "action"}
    return {**dict(model.named_children()), **heads}


def gradients(model: VLA, loss: UnifiedLoss, value: Tensor) -> dict[str, Tensor | None]:
    named = {
        f"{part}.{name}": parameter
        for part, module in parts(model, loss).items()
        for name, parameter in module.named_parameters()
    }
    got = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, got, strict=True))


def reached(model: VLA, loss: UnifiedLoss, value: Tensor) -> dict[str, list[str]]:
    """For each part: its parameters that get a gradient other than zero."""
    found: dict[str, list[str]] = {part: [] for part in parts(model, loss)}
    for name, gradient in gradients(model, loss, value).items():
        if gradient is not None and gradient.any():
            found[name.split(".")[0]].append(name)
    return found


def test_total_is_the_weighted_sum() -> None:
    terms = evaluate(*build())
    assert list(terms.values) == ["align", "action", "recon", "state"]
    assert {name: weight.item() for name, weight in terms.lambdas.items()} == {
        "align": 0.3,
        "action": 1.25,
        "recon": 0.7,
        "state": 2.5,
    }
    expected = 0.3 * terms.values["align"] + 1.25 * terms.values["action"]
    expected = expected + 0.7 * terms.values["recon"] + 2.5 * terms.values["state"]
    assert terms.total.dtype == torch.float64
    assert terms.total.item() == expected.item()
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in terms.metrics.values())


def test_gradient_of_the_total_is_the_weighted_sum_of_gradients() -> None:
    model, loss = build()
    terms = evaluate(model, loss)
    total = gradients(model, loss, terms.total)
    single = {name: gradients(model, loss, value) for name, value in terms.values.items()}
    for key, gradient in total.items():
        assert gradient is not None, f"{key} is reached by no term"
        expected = torch.zeros_like(gradient)
        for name, weight in terms.lambdas.items():
            part = single[name][key]
            expected += 0 if part is None else weight * part
        assert (gradient - expected).abs().max() <= 1e-10, key


def test_the_total_moves_every_parameter() -> None:
    model, loss = build()
    found = reached(model, loss, evaluate(model, loss).total)
    named = {part: len(list(module.parameters())) for part, module in parts(model, loss).items()}
    assert {part: len(names) for part, names in found.items()} == named


@pytest.mark.parametrize(
    ("term", "stop", "lost"),
    [
        ("align", ["vision"], {"vision"}),
        ("align", ["language"], {"language"}),
        ("action", ["fused"], {"vision", "language", "fusion"}),
        ("recon", ["fused"], {"vision", "language", "fusion"}),
        ("state", ["fused"], {"vision", "language", "fusion"}),
    ],
)
def test_stop_gradient_stops_it_and_nothing_else(term: str, stop: list[str], lost: set[str]) -> None:
    offsets = {"offsets": (1, 3)} if term == "state" else {}
    model, loss = build(**{term: {"weight": 1.0, "stop_gradient": stop, **offsets}})
    terms = evaluate(model, loss)
    for name, expected in REACH.items():
        found = {part for part, names in reached(model, loss, terms.values[name]).items() if names}
        assert found == (expected - lost if name == term else expected)
    assert terms.values[term].item() == evaluate(*build()).values[term].item()


def test_a_term_that_has_ended_costs_nothing_and_is_absent() -> None:
    recon = {"weight": {"start": 0.2, "end": 0.0, "schedule": "linear", "end_at": 0.5}}
    model, loss = build(recon=recon)
    early, late = evaluate(model, loss, 0.25), evaluate(model, loss, 0.5)
    assert early.lambdas["recon"].item() == pytest.approx(0.1)
    assert list(late.values) == list(late.lambdas) == ["align", "action", "state"]
    assert not any(key.startswith("recon/") for key in late.metrics)
    expected = 0.3 * late.values["align"] + 1.25 * late.values["action"] + 2.5 * late.values["state"]
    assert late.total.item() == expected.item()
    assert config(recon=recon).needs().futures == (4,)
    bare = replace(as_double(make_batch()), futures={})
    loss(model(bare.observation), bare, model, 0.5)


def test_a_weight_of_zero_is_the_same_as_no_term() -> None:
    zero = {name: {"weight": 0.0} for name in ("align", "recon", "state")}
    model, loss = build(**zero)
    terms = evaluate(model, loss)
    assert list(terms.values) == ["action"]
    assert config(**zero).needs() == DataNeeds(labels=("actions",))
    _, alone = build(align=None, recon=None, state=None)
    assert evaluate(model, alone).total.item() == terms.total.item()


def test_first_l1_is_the_error_of_the_first_action_alone() -> None:
    model, loss = build()
    given = as_double(make_batch())
    mask = given.action_mask.clone()
    mask[1, 0] = False
    given = replace(given, action_mask=mask)
    features = model(given.observation)
    error = (model.action.predict(features)[:, 0] - given.actions[:, 0]).abs()
    expected = error[mask[:, 0]].mean()
    assert "action/first_l1" not in loss(features, given, model).metrics, (
        "in training a generative decoder would sample"
    )
    metrics = loss.eval()(features, given, model).metrics
    torch.testing.assert_close(metrics["action/first_l1"], expected.detach())


def test_float32_follows_float64() -> None:
    model, loss = build()
    exact = evaluate(model, loss)
    model, loss = model.float(), loss.float()
    given = make_batch()
    terms = loss(model(given.observation), given, model)
    for name, value in terms.values.items():
        assert value.item() == pytest.approx(exact.values[name].item(), rel=1e-4)
