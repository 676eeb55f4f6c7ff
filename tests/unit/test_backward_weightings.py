"""Weightings by themselves: parity with torchjd on random Gramians, the smoothed gate by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

from tutti.training.backward.aggregators import AggregatorConfig, Weighting
from tutti.training.rng import own_randomness

PROJECTOR = QuadprogProjector(norm_eps=0.0, reg_eps=1e-4)
THEIRS: dict[str, tuple[dict[str, Any], Any]] = {
    "sum": ({}, aggregation.SumWeighting()),
    "mean": ({}, aggregation.MeanWeighting()),
    "random": ({}, aggregation.RandomWeighting()),
    "pcgrad": ({}, aggregation.PCGradWeighting()),
    "imtl_g": ({}, aggregation.IMTLGWeighting()),
    "upgrad": ({"regularization": 1e-4}, aggregation.UPGradWeighting(projector=PROJECTOR)),
    "dualproj": ({"regularization": 1e-4}, aggregation.DualProjWeighting(projector=PROJECTOR)),
    "cagrad": ({"c": 0.5}, aggregation.CAGradWeighting(c=0.5)),
    "mgda": ({"epsilon": 1e-5, "iterations": 30}, aggregation.MGDAWeighting(1e-5, 30)),
    "aligned_mtl": ({"scale": "rmse"}, aggregation.AlignedMTLWeighting(scale_mode="rmse")),
    "fairgrad": ({"alpha": 2.0}, aggregation.FairGradWeighting(alpha=2.0)),
    "gradvac": ({"decay": 0.2}, aggregation.GradVacWeighting(beta=0.2)),
    "pcd": ({"tau": 0.3, "decay": 0.9}, aggregation.PCDWeighting(tau=0.3, beta=0.9)),
}
TERMS = ("action", "align", "recon", "state")


def build(kind: str, rescaled: bool = False, **options: Any) -> Weighting:
    return TypeAdapter(AggregatorConfig).validate_python({"kind": kind, **options}).build(rescaled=rescaled)


def gramian(seed: int, k: int = 4) -> Tensor:
    matrix = torch.randn(k, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix @ matrix.T


@pytest.mark.parametrize("kind", THEIRS)
def test_unscaled_weights_are_torchjds_over_several_updates(kind: str) -> None:
    options, theirs = THEIRS[kind]
    ours = build(kind, **options)
    for seed in range(6):
        for k in (2, 3, 4):  # the number of rows may change: a state by row starts anew
            with own_randomness(seed, k):
                expected = theirs(gramian(seed, k))
            with own_randomness(seed, k):
                found = ours.weights(gramian(seed, k), TERMS[:k])
            loose = kind in ("fairgrad", "cagrad")  # solvers that stop at a tolerance
            torch.testing.assert_close(found, expected, rtol=1e-4 if loose else 1e-9, atol=1e-7)


@pytest.mark.parametrize("kind", [*THEIRS, "cosine_gate"])
def test_without_a_conflict_rescaled_weights_are_those_of_the_sum(kind: str) -> None:
    """Orthogonal gradients of one length: every method but CAGrad (which lengthens), PCD (which only helps as
    much as tau asks) and the gate (whose cosine is 0) has weights 1."""
    weights = build(kind, rescaled=True).weights(2.5 * torch.eye(3, dtype=torch.float64), TERMS[:3])
    if kind == "cagrad":
        assert weights.tolist() == pytest.approx([1.4] * 3, rel=1e-3)
    elif kind == "pcd":
        # d = n_1 + tau (n_2 + n_3), rescaled to the length of g_1
        length = (1 + 2 * 0.02**2) ** 0.5
        assert weights.tolist() == pytest.approx([1 / length, 0.02 / length, 0.02 / length], rel=1e-6)
    elif kind == "cosine_gate":
        assert weights.tolist() == [1.0, 0.0, 0.0]
    elif kind == "random":
        assert weights.sum().item() == pytest.approx(3)
    else:
        assert weights.tolist() == pytest.approx([1.0] * 3, rel=1e-5)


def test_scale_of_the_gradients_changes_no_weight_of_the_scale_free() -> None:
    for kind, (options, _) in THEIRS.items():
        # FairGrad's weights grow as gradients shrink; PCD and GradVac have absolute constants of 1e-8.
        small = 1.0 if kind in ("fairgrad", "pcd", "gradvac") else 1e-9
        large = 1.0 if kind == "fairgrad" else 1e6
        found: list[Tensor] = []
        for factor in (small, 1.0, large):
            with own_randomness(0):
                found.append(build(kind, **options).weights(factor * gramian(0), TERMS))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=1e-6)


def two(cosine: float) -> Tensor:
    """The Gramian of gradients of length 2 and 3 with this cosine."""
    return torch.tensor([[4.0, 6 * cosine], [6 * cosine, 9.0]], dtype=torch.float64)


def test_the_gate_is_the_cosine_or_nothing() -> None:
    gate = build("cosine_gate", smoothing=0.0)
    for cosine, weight in {0.5: 0.5, -0.5: 0.0, 1.0: 1.0}.items():
        assert gate.weights(two(cosine), TERMS[:2]).tolist() == pytest.approx([1.0, weight])


def test_the_smoothed_gate_is_a_running_mean_without_the_bias_of_its_start() -> None:
    """Smoothing 1/2: 0.8; then (0.8/4 + (-0.2)/2) / (3/4) = 2/15; a zero gradient counts for nothing."""
    gate = build("cosine_gate", smoothing=0.5)
    assert gate.weights(two(0.8), TERMS[:2])[1].item() == pytest.approx(0.8)
    assert gate.weights(two(-0.2), TERMS[:2])[1].item() == pytest.approx(2 / 15)
    still = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert gate.weights(still, TERMS[:2])[1].item() == pytest.approx(2 / 15)
    assert gate.weights(two(-0.9), ("action", "align"))[1].item() == 0.0
    assert gate.weights(two(0.4), ("action", "late"))[1].item() == pytest.approx(0.4)  # each has a memory
    assert build("cosine_gate").weights(still, TERMS[:2]).tolist() == [1.0, 0.0]
