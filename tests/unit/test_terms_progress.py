"""The progress term: its formula, floor and baseline, its gradient, and a batch that does not know."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch
from torch import Tensor

from fixtures.term_batches import NO_MODEL, make_batch, make_model, plain_batch, plain_features, reached
from tutti.objectives.terms.states import ProgressConfig, ProgressTerm
from tutti.types import Batch, Features, UserError

PROGRESS = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)


def term_of() -> ProgressTerm:
    torch.manual_seed(0)
    return ProgressTerm(ProgressConfig(hidden=8), 5, "progress").double()


def scene() -> tuple[Features, Batch]:
    torch.manual_seed(1)
    tokens = torch.randn(3, 1, 5, dtype=torch.float64)
    return plain_features(tokens, tokens), plain_batch(torch.arange(3), progress=PROGRESS)


def saying(logit: float) -> ProgressTerm:
    """A term whose head gives this for every readout."""
    term = term_of()
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.zero_()
        term.head[2].bias.fill_(logit)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return term


def entropy(y: float) -> float:
    return -y * log(y) - (1 - y) * log(1 - y)


def test_three_windows_by_hand() -> None:
    result = saying(log(3))(*scene(), NO_MODEL)  # y^ = 3/4
    expected = (-log(1 / 4) + (-0.25 * log(3 / 4) - 0.75 * log(1 / 4)) - log(3 / 4)) / 3
    assert result.value.item() == pytest.approx(expected, rel=1e-12)
    assert result.metrics["progress/l1"].item() == pytest.approx((0.75 + 0.5 + 0.25) / 3, rel=1e-12)
    assert result.metrics["progress/floor"].item() == pytest.approx(entropy(0.25) / 3, rel=1e-12)


def test_the_baseline_is_the_loss_of_the_mean() -> None:
    mean = 1.25 / 3
    result = saying(log(mean / (1 - mean)))(*scene(), NO_MODEL)
    assert result.metrics["progress/mean_baseline"].item() == pytest.approx(entropy(mean), rel=1e-12)
    assert result.value.item() == pytest.approx(entropy(mean), rel=1e-12)


def test_it_learns_down_to_its_floor() -> None:
    features, batch = scene()
    term = term_of()
    optimizer = torch.optim.Adam(term.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        term(features, batch, NO_MODEL).value.backward()
        optimizer.step()
    result = term(features, batch, NO_MODEL)
    assert result.value.item() == pytest.approx(result.metrics["progress/floor"].item(), abs=0.01)
    assert result.metrics["progress/l1"] < 0.01


def test_a_confident_mistake_still_has_a_gradient() -> None:
    term = saying(-40.0)
    features, batch = scene()
    term(features, batch, NO_MODEL).value.backward()
    bias = term.head[2].bias
    assert isinstance(bias, Tensor) and bias.grad is not None
    assert bias.grad.item() == pytest.approx(-PROGRESS.mean().item(), rel=1e-9)


def test_gradients_are_right() -> None:
    term = term_of()
    features, batch = scene()

    def value(readout: Tensor, weight: Tensor) -> Tensor:
        arguments = (replace(features, readout=readout), batch, NO_MODEL)
        return torch.func.functional_call(term, {"head.0.weight": weight}, arguments).value

    weight = dict(term.named_parameters())["head.0.weight"].detach()
    assert torch.autograd.gradcheck(
        value, tuple(x.clone().requires_grad_() for x in (features.readout, weight))
    )


def test_a_batch_without_progress_is_refused_with_the_cure() -> None:
    features, batch = scene()
    with pytest.raises(UserError, match=r"objective\.progress needs batch\.progress.*WindowIndex"):
        term_of()(features, replace(batch, progress=None), NO_MODEL)


def test_it_moves_what_leads_to_the_readout() -> None:
    model = make_model()
    term = ProgressConfig(hidden=8).build(model, "progress")
    assert reached(model, term, make_batch()) == {"vision", "language", "fusion", "head"}
    stopped = ProgressConfig(hidden=8, stop_gradient=("fused",)).build(model, "progress")
    assert reached(model, stopped, make_batch()) == {"head"}
