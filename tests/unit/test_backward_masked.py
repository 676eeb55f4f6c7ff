"""The masked sum: exact zeros where a term may not move, the plain sum elsewhere, and no pass too far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.parameter import Parameter

from fixtures.linear_terms import LAMBDAS, parameters, plain_sum, rows, small_batch, small_model, terms
from fixtures.toy_training import Data, config
from tutti.config.run_config import RunConfig
from tutti.training.backward.config import BackwardConfig
from tutti.training.backward.interface import Backward, OneBackward
from tutti.training.optim.learning_rates import part_of
from tutti.training.trainer import Trainer
from tutti.types import UserError


def build(given: dict[str, Parameter], names: Any = tuple(LAMBDAS), **settings: Any) -> Backward:
    return TypeAdapter(BackwardConfig).validate_python(settings).build(given, names)


def test_a_term_moves_only_the_parts_that_are_named_and_its_own_head() -> None:
    given, first = parameters(), rows(0)
    backward = build(given, kind="masked", may_train={"action": ["fusion"], "recon": []})
    backward.add(terms(given, first), 1)
    assert backward.finish() == {}
    expected = {
        "model.vision.a": LAMBDAS["align"] * first["align"]["model.vision.a"],
        "model.vision.b": LAMBDAS["align"] * first["align"]["model.vision.b"],
        "model.fusion.a": LAMBDAS["action"] * first["action"]["model.fusion.a"],
        "model.action.a": None,
        "objective.recon.a": LAMBDAS["recon"] * first["recon"]["objective.recon.a"],
        "objective.align.a": LAMBDAS["align"] * first["align"]["objective.align.a"],
    }
    for name, wanted in expected.items():
        gradient = given[name].grad
        assert (gradient is None) == (wanted is None), name
        assert gradient is None or torch.equal(gradient, wanted), name


def test_a_mask_that_forbids_nothing_is_the_plain_sum_to_the_last_bit() -> None:
    model, loss, named = small_model()
    batches = [small_batch(seed) for seed in (0, 1)]
    found: list[dict[str, Tensor | None]] = []
    everything = ["vision", "language", "fusion", "action"]
    for backward in (
        OneBackward(),
        build(named, loss.names, kind="masked", may_train=dict.fromkeys(loss.names, everything)),
    ):
        for batch in batches:
            backward.add(loss(model(batch.observation), batch, model), len(batches))
        backward.finish()
        found.append({name: p.grad for name, p in named.items()})
        for parameter in named.values():
            parameter.grad = None
    assert all(gradient is not None for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert torch.equal(torch.as_tensor(gradient), torch.as_tensor(found[1][name])), name


def test_knowledge_insulation_keeps_action_from_the_encoders_alone() -> None:
    model, loss, named = small_model()
    batch = small_batch()
    values = loss(model(batch.observation), batch, model)
    names = list(named)
    without = sum(values.lambdas[n] * v for n, v in values.values.items() if n != "action")
    whole = torch.autograd.grad(values.total, list(named.values()), retain_graph=True)
    rest = torch.autograd.grad(
        torch.as_tensor(without), list(named.values()), retain_graph=True, allow_unused=True
    )
    backward = build(named, loss.names, kind="knowledge_insulation")
    backward.add(values, 1)
    backward.finish()
    for name, all_terms, others in zip(names, whole, rest, strict=True):
        insulated = part_of(name) in ("vision", "language")
        expected = others if insulated else all_terms
        gradient = named[name].grad
        assert expected is not None and gradient is not None, name
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
        assert insulated == (not torch.allclose(gradient, all_terms, rtol=1e-9, atol=1e-15)), name


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"kind": "knowledge_insulation"}, 1),
        ({"kind": "masked", "may_train": {"action": ["fusion", "action", "language"]}}, 1),
        ({"kind": "masked", "may_train": {"action": ["vision", "action"]}}, 2),
        ({"kind": "masked", "may_train": {"action": ["vision"], "recon": ["vision"]}}, 2),
    ],
)
def test_terms_with_one_mask_share_a_pass_and_it_ends_where_they_may_not_move(
    settings: dict[str, Any], passes: int
) -> None:
    """Counted at the vision tokens, which every term's gradient crosses on its way to the encoder."""
    model, loss, named = small_model()
    batch = small_batch()
    features = model(batch.observation)
    crossed: list[int] = []
    features.vision.values.register_hook(lambda gradient: crossed.append(1))
    build(named, loss.names, **settings).add(loss(features, batch, model), 1)
    assert len(crossed) == passes


def test_micro_batches_add_up_and_frozen_parts_stay_still() -> None:
    given = parameters()
    given["model.vision.a"].requires_grad_(False)
    backward = build(given, kind="masked", may_train={"recon": ["vision", "fusion"]})
    for seed in (0, 1):
        backward.add(terms(given, rows(seed)), 2)
    backward.finish()
    for name, parameter in given.items():
        if name == "model.vision.a":
            assert parameter.grad is None
        else:
            mean = (plain_sum(rows(0))[name] + plain_sum(rows(1))[name]) / 2
            torch.testing.assert_close(torch.as_tensor(parameter.grad), mean, rtol=1e-14, atol=1e-15)


def test_a_parameter_under_two_names_is_moved_once() -> None:
    given, first = parameters(), rows(0)
    twice = {**given, "model.fusion.again": given["model.fusion.a"]}
    for settings in ({"kind": "masked", "may_train": {"align": ["vision"]}}, {"kind": "k_gradients"}):
        backward = build(twice, **settings)
        backward.add(terms(given, first), 1)
        backward.finish()
        head = given["objective.recon.a"].grad
        assert head is not None
        torch.testing.assert_close(head, plain_sum(first)["objective.recon.a"])
        if settings["kind"] == "masked":
            fused = given["model.fusion.a"].grad
            assert fused is not None
            torch.testing.assert_close(fused, plain_sum(first)["model.fusion.a"])
        for parameter in given.values():
            parameter.grad = None


def test_what_reaches_nothing_is_no_error() -> None:
    given, first = parameters(), {"action": rows(0)["action"]}
    for parameter in given.values():
        parameter.requires_grad_(False)
    for settings in ({"kind": "masked", "may_train": {"align": []}}, {"kind": "k_gradients"}):
        backward = build(given, **settings)
        backward.add(terms(given, first), 1)
        assert backward.finish() == {}
        assert all(parameter.grad is None for parameter in given.values())


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    given = parameters()
    with pytest.raises(UserError, match=r"names the term actoin; there are align, action, recon\."):
        build(given, kind="masked", may_train={"actoin": ["fusion"]})
    with pytest.raises(UserError, match=r"names the part encoder; there are vision, fusion, action\."):
        build(given, kind="k_gradients", may_train={"action": ["fusion", "encoder"]})


def test_gradients_are_in_the_parameters_own_layout_so_that_clipping_may_scale_them() -> None:
    """The gradient of a plain sum is an expanded view, of which no number may be written."""
    weight = Parameter(torch.zeros(3, 2))
    loss = terms(parameters(), {"action": rows(0)["action"]})
    total = weight.sum()
    values = type(loss)(values={"action": total}, lambdas={"action": torch.ones(())}, total=total, metrics={})
    for settings in ({"kind": "masked", "may_train": {"recon": []}}, {"kind": "k_gradients"}):
        weight.grad = None
        backward = build({"model.fusion.a": weight}, **settings)
        backward.add(values, 1)
        backward.finish()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        assert weight.grad is not None and weight.grad.is_contiguous()
        torch.testing.assert_close(weight.grad, torch.full((3, 2), 6**-0.5))


def test_it_trains_the_small_model_without_moving_a_shielded_encoder(tmp_path: Path) -> None:
    """With action as the only computed term of the phase the insulated encoders keep their weights."""
    model, loss, _ = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [small_batch(seed) for seed in range(3)]

    class Small(Data):
        def __init__(self) -> None:
            super().__init__(lambda number, _: batches[number % 3])
            self.validation = []

    strategy = RunConfig.model_validate({"strategy": {"kind": "action_only"}}).strategy
    backward = TypeAdapter(BackwardConfig).validate_python({"kind": "knowledge_insulation"})
    run = Trainer(config(steps=4), model, loss, tmp_path, strategy=strategy, backward=backward)
    run.fit(Small())
    moved = {part_of(f"model.{n}") for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"fusion", "action"}
