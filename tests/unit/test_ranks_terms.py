"""Every term and every decoder on two ranks: value, metrics and gradient are those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.ranks import on_ranks
from fixtures.term_batches import MODEL, SPEC, as_double, make_batch, make_loss
from tutti.distributed.ranks import current_ranks, gathered, mean_over_ranks, sample_whole_batch, shared_mean
from tutti.models.config import ModelConfig
from tutti.objectives.objective import Objective
from tutti.training.backward.term_gradients import averaged_gradients, term_gradients
from tutti.types import masked_mean

TERMS: dict[str, dict[str, Any]] = {
    "align": {"kind": "contrastive", "width": 16},
    "sigmoid": {"kind": "sigmoid", "width": 16},
    "goal": {"kind": "contrastive", "width": 16, "positives": "soft", "pictures": "goal"},
    "change": {"kind": "sigmoid", "width": 16, "positives": "instruction", "pictures": "change", "offset": 2},
    "near": {"kind": "state_contrastive", "width": 16},
    "views": {"kind": "state_contrastive", "width": 16, "read": "vision"},
    "told": {"kind": "recoverable_language", "width": 16},
    "readout": {"kind": "recoverable_language", "width": 16, "action": "readout"},
    "latent": {"kind": "future_latent", "hidden": 32, "decay": 0.9},
    "progress": {"kind": "progress", "hidden": 16},
    "chunk": {"kind": "chunk"},
    "recon": {"kind": "future_patches", "width": 16, "heads": 2},
    "uniform": {"kind": "future_patches", "width": 16, "heads": 2, "weighting": "uniform"},
    "changed": {"kind": "changed_patches", "width": 16, "heads": 2},
    "masked": {"kind": "masked_patches", "width": 16, "heads": 2},
    "inverse": {"kind": "inverse_dynamics", "hidden": 16, "channels": 4, "offset": 2},
    "state": {"kind": "future_states", "offsets": (1, 3), "hidden": 16},
}
NARROW = {"width": 16, "depth": 1, "heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "regression": {"hidden": 32},
    "flow": {**NARROW, "draws": 3},
    "diffusion": {**NARROW, "draws": 3},
    "bins": {**NARROW, "bins": 8},
    "fast": NARROW,
}
TOLERANCE = 1e-10
B = 8


def evaluated(action: dict[str, Any], terms: dict[str, dict[str, Any]], dropout: float) -> dict[str, Any]:
    """Terms, metrics, gradients and the random state after it, of this rank's rows of one batch, averaged."""
    torch.manual_seed(0)
    sizes = {**MODEL, "action": action, "fusion": {**MODEL["fusion"], "state_dropout": dropout}}
    model = ModelConfig.model_validate(sizes).build(SPEC)
    loss: Objective = make_loss(model, **{name: {"weight": 0.7, **term} for name, term in terms.items()})
    model, loss = model.double(), loss.double()
    batch = as_double(make_batch(b=B))
    batch = replace(batch, task_id=batch.instruction_id // 2)
    if model.action.needs_fit:
        model.action.fit(batch.actions, batch.action_mask)
    rows = current_ranks().rows(B)
    own = batch.apply(lambda value: value[rows])
    torch.manual_seed(1)
    found = loss(model(own.observation), own, model)
    named = dict((*model.named_parameters(), *((f"loss.{n}", p) for n, p in loss.named_parameters())))
    gradients = term_gradients({**found.values, "total": found.total}, list(named.values()))
    values = {
        name: mean_over_ranks(value.detach()) for name, value in {**found.values, **found.metrics}.items()
    }
    return {
        "values": {name: value.item() for name, value in values.items()},
        "gradients": {
            f"{term} {name}": gradient
            for term, own in gradients.items()
            for name, gradient in zip(named, own, strict=True)
            if gradient is not None
        },
        "buffers": {name: value for name, value in loss.named_buffers()},
        "random": torch.get_rng_state(),
    }


def compare(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    for found in several:
        assert found["values"].keys() == one["values"].keys()
        for name, value in one["values"].items():
            assert found["values"][name] == pytest.approx(value, abs=TOLERANCE), name
        assert found["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            assert (found["gradients"][name] - gradient).abs().max() <= TOLERANCE, name
        for name, buffer in one["buffers"].items():
            assert torch.allclose(found["buffers"][name].double(), buffer.double(), atol=TOLERANCE, rtol=0), (
                name
            )
        assert torch.equal(found["random"], one["random"])


def test_every_term_is_that_of_one_process() -> None:
    arguments = ({"hidden": 32}, TERMS, 0.5)
    (alone,) = on_ranks(1, evaluated, *arguments)
    assert {name.split()[0] for name in alone["gradients"]} == {"action", "total", *TERMS}
    compare(alone, on_ranks(2, evaluated, *arguments))


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_is_that_of_one_process(kind: str) -> None:
    arguments = ({"kind": kind, **DECODERS[kind]}, {}, 0.0)
    (alone,) = on_ranks(1, evaluated, *arguments)
    compare(alone, on_ranks(2, evaluated, *arguments))


def pieces() -> dict[str, Any]:
    """Hand-worked: rank r of 4 has the rows 2 r and 2 r + 1 of x = 0 ... 7, of which the first 3 count."""
    rank, count = current_ranks().rank, current_ranks().count
    x = torch.arange(8, dtype=torch.float64)[current_ranks().rows(8)].requires_grad_()
    mask = torch.arange(8)[current_ranks().rows(8)] < 3
    mean = masked_mean(x, mask)
    (gradient,) = torch.autograd.grad(mean, x)
    every = gathered(x)
    (back,) = torch.autograd.grad((every * torch.arange(8.0)).sum() * (rank + 1), x)
    torch.manual_seed(3)
    return {
        "mean": float(mean_over_ranks(mean.detach())),
        "gradient": (gradient / count).tolist(),
        "every": every.tolist(),
        "flags": gathered(mask).tolist(),
        "back": (back / sum(range(1, count + 1))).tolist(),
        "drawn": sample_whole_batch(lambda rows: torch.rand(3, rows), 8 // count, dim=1),
        "next": torch.rand(1).item(),
        "none": float(shared_mean(torch.zeros(()), torch.zeros((), dtype=torch.int64))),
    }


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_pieces_by_hand(count: int) -> None:
    found = on_ranks(count, pieces)
    torch.manual_seed(3)
    whole, after = torch.rand(3, 8), torch.rand(1).item()
    assert [g for one in found for g in one["gradient"]] == [1 / 3] * 3 + [0.0] * 5
    assert [g for one in found for g in one["back"]] == pytest.approx(list(range(8)))
    assert torch.equal(torch.cat([one["drawn"] for one in found], dim=1), whole)
    for one in found:
        assert one["mean"] == pytest.approx(1.0, abs=1e-15)  # (0 + 1 + 2) / 3
        assert one["every"] == list(range(8)) and one["flags"] == [True] * 3 + [False] * 5
        assert one["next"] == after and one["none"] == 0.0


def gradients_of_ranks() -> list[Any]:
    rank = float(current_ranks().rank)
    given = {
        "a": [torch.full((2,), rank), None, torch.full((3,), rank, dtype=torch.float64)],
        "b": [None] * 3,
    }
    found = averaged_gradients(given)
    return [None if value is None else value.tolist() for own in found.values() for value in own]


def test_gradients_of_terms_are_averaged_and_absent_ones_stay_absent() -> None:
    for found in on_ranks(2, gradients_of_ranks):
        assert found == [[0.5, 0.5], None, [0.5, 0.5, 0.5], None, None, None]


def test_alone_nothing_is_copied() -> None:
    x = torch.ones(3, requires_grad=True)
    given: dict[str, list[Tensor | None]] = {"a": [x]}
    assert gathered(x) is x and mean_over_ranks(x) is x and averaged_gradients(given) is given
