"""Optimisers: which parameter goes where, and Muon's mathematics."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from fixtures.toy_training import Model, TwoTerms, make_batch
from tutti.training.optim.muon import Muon, orthogonalised
from tutti.training.optim.optimizers import AdamWConfig, MuonConfig, group_parameters, trainable
from tutti.types import UserError


def newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Five rounds for one stack of matrices, wide or tall."""
    tall = matrices.shape[1] > matrices.shape[2]
    (result,) = orthogonalised([matrices.mT if tall else matrices], rounds=5)
    return result.mT if tall else result


def test_muon_takes_the_trunk_matrices_and_adamw_the_rest() -> None:
    model = Model()
    groups = group_parameters(model, TwoTerms())
    assert set(groups["matrix"]) == {"model.stem.weight", "model.state.weight", "model.action.hidden.weight"}
    assert set(groups["head"]) == {"model.action.out.weight", "objective.head.weight"}
    assert {"model.token.weight", "model.position", "model.norm.weight", "objective.scale"} < set(
        groups["plain"]
    )
    total = len(groups["matrix"]) + len(groups["head"]) + len(groups["plain"])
    assert total == len(list(model.parameters())) + len(list(TwoTerms().parameters()))


def test_named_modules_go_to_adamw_and_an_unknown_name_is_refused() -> None:
    model = Model()
    assert "model.state.weight" in group_parameters(model, TwoTerms(), ("state",))["head"]
    with pytest.raises(UserError, match="'statte', which is no submodule"):
        group_parameters(model, TwoTerms(), ("statte",))


def test_adamw_decays_matrices_only() -> None:
    model = Model()
    optimizer = AdamWConfig(weight_decay=0.1).build(model, TwoTerms()).optimizers["adamw"]
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"matrix": 0.1, "plain": 0.0}
    matrices = [p for group in optimizer.param_groups if group["name"] == "matrix" for p in group["params"]]
    assert {id(p) for p in matrices} >= {id(model.stem.weight), id(model.action.out.weight)}
    assert id(model.token.weight) not in {id(p) for p in matrices}


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig()])
def test_every_parameter_is_moved_by_both_choices(config: AdamWConfig | MuonConfig) -> None:
    model, objective = Model(dropout=0.0), TwoTerms()
    optimizer = config.build(model, objective)
    before = {name: p.detach().clone() for name, p in trainable(model, objective).items()}
    batch = make_batch(0)
    objective(model(batch.observation), batch, model, 0.0).total.backward()
    optimizer.step()
    assert [n for n, p in trainable(model, objective).items() if torch.equal(before[n], p)] == []


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (8, 64), (64, 8)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, *shape)
    result = newton_schulz(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.mT @ result @ v.mT
    diagonal = rotated.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.3) & (diagonal < 1.3)).all()
    assert torch.allclose(rotated, torch.diag_embed(diagonal), atol=1e-4)


def test_the_gram_shortcut_equals_the_plain_iteration() -> None:
    torch.manual_seed(0)
    wide = torch.randn(1, 8, 40, dtype=torch.float64)
    x = wide / torch.linalg.vector_norm(wide)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    assert torch.allclose(newton_schulz(wide), x, atol=1e-6)
    assert torch.allclose(newton_schulz(wide.float()).double(), x, atol=1e-3)
    rough = newton_schulz(wide.bfloat16())  # as on CUDA: another iteration, the same direction
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(x.flatten(), rough.double().flatten(), dim=0) > 0.99


def test_muon_batches_shapes_without_mixing_them() -> None:
    torch.manual_seed(0)
    shapes = [(8, 6), (6, 8), (8, 6), (8, 2, 3, 1), (5, 30)]
    together = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    for p, q in zip(together, alone, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    Muon(together, lr=0.1, weight_decay=0.1).step()
    for p, q in zip(together, alone, strict=True):
        before = q.detach().clone()
        Muon([q], lr=0.1, weight_decay=0.1).step()
        assert torch.allclose(p, q, atol=1e-12)
        matrix = q.grad.reshape(len(q), -1) * (1 - 0.95**2)  # the first step: momentum starts at 0
        scale = 0.1 * 0.2 * max(matrix.shape) ** 0.5
        expected = before * (1 - 0.1 * 0.1) - scale * newton_schulz(matrix[None])[0].view_as(q)
        assert torch.allclose(q, expected, atol=1e-6)


def test_muon_s_second_step_looks_ahead_along_its_momentum() -> None:
    """m <- mu m + (1 - mu) g; u = mu m + (1 - mu) g, by hand over two gradients that differ."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    before, gradients = weight.detach().clone(), torch.randn(2, 4, 6, dtype=torch.float64)
    optimizer, momentum = Muon([weight], lr=0.1, momentum=0.8, weight_decay=0.5), torch.zeros(4, 6).double()
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.8 * momentum + 0.2 * gradient
        direction = newton_schulz((0.8 * momentum + 0.2 * gradient)[None])[0]
        before = (1 - 0.1 * 0.5) * before - 0.1 * 0.2 * 6**0.5 * direction
    assert torch.allclose(weight.detach(), before, atol=1e-9)


def test_a_copy_of_muon_moves_as_the_original_does() -> None:
    """torch copies an optimizer's groups and state, and nothing that a constructor has set beside them."""
    weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    copied = deepcopy(Muon([weight]))
    (other,) = copied.param_groups[0]["params"]
    for parameter, optimizer in ((weight, Muon([weight])), (other, copied)):
        parameter.grad = torch.ones(3, 4)
        optimizer.step()
    assert torch.equal(weight, other) and not torch.equal(weight, torch.arange(12.0).view(3, 4))


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\); give it to AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_optimizer_state_of_another_kind_is_refused() -> None:
    model = Model()
    saved = AdamWConfig().build(model, TwoTerms()).state_dict()
    with pytest.raises(UserError, match=r"is for \['adamw'\], this run uses \['adamw', 'muon'\]"):
        MuonConfig().build(model, TwoTerms()).load_state_dict(saved)


def test_schedule_scales_every_group_from_its_own_base() -> None:
    model = Model()
    optimizer = MuonConfig(lr=0.02, adamw_lr=0.001).build(model, TwoTerms())
    optimizer.set_factor(0.5)
    optimizer.set_factor(0.25)
    assert optimizer.learning_rates == {"muon": 0.005, "adamw": 0.00025}
