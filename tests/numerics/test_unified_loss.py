"""The unified loss in float64: total = sum lambda_i L_i, the same for gradients, and who reaches whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures import small_model
from fixtures.small_model import SPEC
from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.unified import UnifiedLoss
from tutti.types import Batch, DataNeeds, Future, LaterStates, LossTerms, Observation

MODEL = {**small_model.MODEL, "fusion": {"width": 32, "depth": 2}}
MODULES = ("vision", "language", "fusion", "action", "align head", "recon head", "state head")
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


def batch(b: int = 6) -> Batch:
    random = torch.Generator().manual_seed(1)
    ids = torch.tensor([0, 1, 0, 2, 1, 0])[:b]
    texts = torch.randint(0, SPEC.vocab_size, (3, SPEC.text_length), generator=random)

    def look() -> Observation:
        return Observation(
            images=torch.randint(0, 256, (b, 2, 3, 32, 32), dtype=torch.uint8, generator=random),
            image_mask=torch.tensor([[True, True]] * (b - 1) + [[True, False]]),
            text=texts[ids],
            text_mask=torch.ones(b, SPEC.text_length, dtype=torch.bool),
            state=torch.randn(b, 4, generator=random, dtype=torch.float64),
        )

    mask = torch.ones(b, 5, 3, dtype=torch.bool)
    mask[0, 3:] = False
    return Batch(
        observation=look(),
        actions=torch.randn(b, 5, 3, generator=random, dtype=torch.float64),
        action_mask=mask,
        instruction_id=ids,
        embodiment=torch.zeros(b, dtype=torch.int64),
        window=torch.arange(b),
        futures={4: Future(observation=look(), mask=torch.tensor([True] * (b - 2) + [False, True]))},
        later_states=LaterStates(
            labels=("next_key", "last", 1, 3),
            values=torch.randn(b, 4, 4, generator=random, dtype=torch.float64),
            mask=torch.tensor([[True, True, True, True]] * (b - 1) + [[True, True, True, False]]),
        ),
    )


def evaluate(model: VLA, loss: UnifiedLoss, progress: float = 0.0) -> LossTerms:
    given = batch()
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


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("term", REACH)
def test_reach(term: str, module: str) -> None:
    model, loss = build()
    found = reached(model, loss, evaluate(model, loss).values[term])
    assert bool(found[module]) == (module in REACH[term]), f"{term} -> {module}: {found[module]}"


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


def test_the_reach_table_notices_a_silent_detach(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = build()
    forward = type(model.language).forward

    def detached(self: Any, text: Tensor, text_mask: Tensor) -> Any:
        tokens = forward(self, text, text_mask)
        return replace(tokens, values=tokens.values.detach())

    monkeypatch.setattr(type(model.language), "forward", detached)
    terms = evaluate(model, loss)
    assert not any(reached(model, loss, value)["language"] for value in terms.values.values())


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
    bare = replace(batch(), futures={})
    loss(model(bare.observation), bare, model, 0.5)


def test_a_weight_of_zero_is_the_same_as_no_term() -> None:
    zero = {name: {"weight": 0.0} for name in ("align", "recon", "state")}
    model, loss = build(**zero)
    terms = evaluate(model, loss)
    assert list(terms.values) == ["action"]
    assert config(**zero).needs() == DataNeeds()
    _, alone = build(align=None, recon=None, state=None)
    assert evaluate(model, alone).total.item() == terms.total.item()


def test_the_decoder_belongs_to_the_model_alone() -> None:
    model, loss = build()
    mine = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in mine for parameter in loss.parameters())
    assert not list(loss.terms["action"].parameters())


def test_first_l1_is_the_error_of_the_first_action_alone() -> None:
    model, loss = build()
    given = batch()
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
    given = batch()
    assert given.later_states is not None
    rough = replace(
        given,
        later_states=replace(given.later_states, values=given.later_states.values.float()),
        actions=given.actions.float(),
        observation=replace(given.observation, state=given.observation.state.float()),
    )
    terms = loss(model(rough.observation), rough, model)
    for name, value in terms.values.items():
        assert value.item() == pytest.approx(exact.values[name].item(), rel=1e-4)
