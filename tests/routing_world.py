"""Terms that are linear in their parameters, so that every gradient is known; and a small real model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from test_models_parts import SPEC, observation
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.objectives.terms.future_states import FutureStatesConfig
from tutti.objectives.unified import ObjectiveConfig, UnifiedLoss
from tutti.types import Batch, Future, LaterStates, LossTerms, Observation, StateLabel

SIZES = {
    "model.vision.a": 2,
    "model.vision.b": 3,
    "model.fusion.a": 4,
    "model.action.a": 2,
    "objective.recon.a": 2,
    "objective.align.a": 1,
}
REACH = {
    "align": ("model.vision.a", "model.vision.b", "objective.align.a"),
    "action": ("model.vision.a", "model.vision.b", "model.fusion.a", "model.action.a"),
    "recon": ("model.vision.a", "model.fusion.a", "objective.recon.a"),
}
LAMBDAS = {"align": 0.5, "action": 1.0, "recon": 2.0}
SHARED = ("model.vision.a", "model.vision.b", "model.fusion.a")
Rows = dict[str, dict[str, Tensor]]


def parameters() -> dict[str, Parameter]:
    return {name: Parameter(torch.zeros(size, dtype=torch.float64)) for name, size in SIZES.items()}


def rows(seed: int) -> Rows:
    """d L_i / d p of each raw term, drawn from `seed`."""
    g = torch.Generator().manual_seed(seed)
    return {
        term: {name: torch.randn(SIZES[name], generator=g, dtype=torch.float64) for name in names}
        for term, names in REACH.items()
    }


def terms(given: dict[str, Parameter], gradients: Rows) -> LossTerms:
    """L_i = sum over its parameters of <row, p>, so that its gradient is the rows."""
    values = {
        term: sum(((row * given[name]).sum() for name, row in own.items()), torch.zeros(()).double())
        for term, own in gradients.items()
    }
    lambdas = {term: torch.tensor(LAMBDAS[term], dtype=torch.float64) for term in values}
    total = sum((lambdas[term] * value for term, value in values.items()), torch.zeros(()).double())
    return LossTerms(values=values, lambdas=lambdas, total=total, metrics={})


def plain_sum(gradients: Rows) -> dict[str, Tensor]:
    """sum_i lambda_i row_i for every parameter."""
    found = {name: torch.zeros(size, dtype=torch.float64) for name, size in SIZES.items()}
    for term, own in gradients.items():
        for name, row in own.items():
            found[name] = found[name] + LAMBDAS[term] * row
    return found


def jacobian(gradients: Rows, names: tuple[str, ...] = SHARED) -> Tensor:
    """The weighted gradients over `names` as rows, action first, then the others in their order."""
    order = ["action", *(term for term in gradients if term != "action")]
    return torch.stack(
        [
            torch.cat(
                [
                    LAMBDAS[term] * gradients[term].get(name, torch.zeros(SIZES[name], dtype=torch.float64))
                    for name in names
                ]
            )
            for term in order
        ]
    )


def split(vector: Tensor, names: tuple[str, ...] = SHARED) -> dict[str, Tensor]:
    """A vector over `names` as the gradient of each."""
    return dict(zip(names, vector.split([SIZES[name] for name in names]), strict=True))


def small_model(**objective: Any) -> tuple[VLA, UnifiedLoss, dict[str, Parameter]]:
    """A small model and its four terms in float64."""
    torch.manual_seed(0)
    sizes = {
        "vision": {"stem": {"channels": (8, 16, 16)}, "width": 16},
        "language": {"width": 16},
        "fusion": {"width": 32, "depth": 2},
        "action": {"hidden": 32},
    }
    model = ModelConfig.model_validate(sizes).build(SPEC).double()
    loss = ObjectiveConfig.model_validate({"align": {"weight": 0.3}, **objective}).build(model).double()
    modules: list[tuple[str, nn.Module]] = [("model", model), ("objective", loss)]
    named = {f"{root}.{name}": p for root, module in modules for name, p in module.named_parameters()}
    return model, loss, named


def small_batch(seed: int = 0) -> Batch:
    """A batch of four windows with whatever the default terms need."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([0, 1, 0, 2])
    labels: tuple[StateLabel, ...] = ("last", *FutureStatesConfig().offsets)

    def look(number: int) -> Observation:
        found = observation(seed=number)
        return replace(found, state=found.state.double())

    return Batch(
        observation=look(seed),
        actions=torch.randn(4, SPEC.horizon, SPEC.action_dim, generator=g, dtype=torch.float64),
        action_mask=torch.ones(4, SPEC.horizon, SPEC.action_dim, dtype=torch.bool),
        instruction_id=ids,
        embodiment=ids * 0,
        window=torch.arange(4),
        futures={4: Future(observation=look(seed + 4), mask=torch.ones(4, dtype=torch.bool))},
        later_states=LaterStates(
            labels=labels,
            values=torch.randn(4, len(labels), SPEC.state_dim, generator=g, dtype=torch.float64),
            mask=torch.ones(4, len(labels), dtype=torch.bool),
        ),
    )
