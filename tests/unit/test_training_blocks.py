"""Blocks: compiled as one graph each, recomputed to the same bits, in bf16 beside float32 weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from fixtures.compiled_losses import every_way, one_block, one_stem
from fixtures.ranks import on_ranks
from fixtures.run_equality import leaves
from fixtures.vla_training import Data, make_batch, make_trainer, modules
from tutti.models.layers import Stem, TransformerBlock, blocks_of
from tutti.training.backward.config import BackwardConfig
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.config import TrainingConfig
from tutti.training.parallel.ddp import LossModule, compiled
from tutti.training.trainer import Trainer
from tutti.types import UserError

END_TO_END = {"kind": "end_to_end"}


@pytest.fixture(scope="module")
def regression() -> dict[str, dict[str, Any]]:
    return on_ranks(1, every_way, "regression", ("off", "blocks", "model"))[0]


def test_blocks_and_stem_are_what_is_compiled() -> None:
    model, _ = modules()
    compiled(model, "blocks", backend="eager")
    found = [type(one) for one in model.modules() if one._compiled_call_impl is not None]
    assert found.count(Stem) == 1 and len(found) == 1 + len(blocks_of(model))
    assert model.to_floats is not modules()[0].to_floats


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["regression", "flow"])
def test_compiled_blocks_have_no_graph_break_and_the_eager_losses(decoder: str, regression: Any) -> None:
    """Seven blocks (vision 1, language 2, fusion 3 in `regression`; 2 more in `flow`), fewer graphs; and one
    that makes floats of bytes."""
    found = regression if decoder == "regression" else on_ranks(1, every_way, decoder, ("off", "blocks"))[0]
    eager, blocks = found["off"], found["blocks"]
    assert blocks["breaks"] == 0 and 0 < blocks["graphs"] <= 5 + (decoder == "flow")
    assert blocks["names"]
    assert blocks["totals"] == pytest.approx(eager["totals"], rel=1e-6)
    assert blocks["norm"] == pytest.approx(eager["norm"], rel=1e-6)


@pytest.mark.slow
def test_the_whole_model_compiles_to_one_graph_with_the_eager_losses(regression: Any) -> None:
    eager, model = regression["off"], regression["model"]
    assert (model["breaks"], model["graphs"]) == (0, 1)
    assert model["totals"] == pytest.approx(eager["totals"], rel=1e-6)
    assert model["norm"] == pytest.approx(eager["norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_blocks_compile_with_inductor() -> None:
    ((eager, found),) = on_ranks(1, one_block, "inductor")
    assert found == pytest.approx(eager, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_stem_compiles_with_inductor_once_for_each_size() -> None:
    """Sizes stay numbers: with symbols for them inductor of torch 2.11 fails at the second size."""
    ((eager, found, graphs),) = on_ranks(1, one_stem, "inductor")
    assert found == pytest.approx(eager, rel=1e-4)
    assert graphs == 2


@pytest.mark.parametrize(
    ("given", "mode"), [(True, "blocks"), (False, "off"), ("off", "off"), ("model", "model")]
)
def test_compile_takes_a_mode_or_a_truth_value(given: Any, mode: str) -> None:
    assert TrainingConfig(compile=given).compile == mode


def test_compile_refuses_another_mode() -> None:
    with pytest.raises(ValueError, match="'off', 'model' or 'blocks'"):
        TrainingConfig(compile="layers")  # pyright: ignore[reportArgumentType]


def kept_bytes(on: bool) -> tuple[int, dict[str, Tensor], dict[str, list[Tensor | None]]]:
    """Bytes that the forward pass keeps for the backward pass, the losses, and each term's gradient."""
    model, objective = modules()
    for block in blocks_of(model):
        block.recompute = on
    batch = make_batch(0)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *objective.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = objective(model(batch.observation), batch, model)
    found = term_gradients(terms.values, [*model.parameters(), *objective.parameters()])
    return sum(kept.values()), terms.values, found


def test_recomputed_blocks_give_the_same_losses_and_k_gradients_and_keep_less() -> None:
    plain, values, gradients = kept_bytes(False)
    less, same_values, same_gradients = kept_bytes(True)
    assert all(torch.equal(value, same_values[name]) for name, value in values.items())
    for name, own in gradients.items():
        for one, other in zip(own, same_gradients[name], strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)
    assert less < 0.7 * plain


class Dropping(TransformerBlock):
    """A block that draws random numbers."""

    def compute(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.nn.functional.dropout(x * x, 0.5)


def test_a_recomputed_block_draws_the_same_random_numbers_again() -> None:
    gradients: list[Tensor] = []
    for on in (False, True):
        torch.manual_seed(3)
        x = torch.ones(64, requires_grad=True)
        block = Dropping()
        block.recompute = on
        y = block(x)
        torch.rand(5)  # what comes between forward and backward
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad != 0, y != 0)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def tensors_in(value: Any) -> list[Tensor]:
    return [one for one in leaves(value).values() if isinstance(one, Tensor)]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {**trainer.model.state_dict(), **trainer.objective.state_dict()}


@pytest.mark.parametrize("kind", ["one", "k_gradients"])
def test_a_training_with_recomputation_ends_at_the_same_bits(kind: str, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for number, choice in enumerate(("off", "block")):
        trainer = make_trainer(tmp_path / str(number), END_TO_END, steps=4, activation_checkpointing=choice)
        config: Any = TypeAdapter(BackwardConfig).validate_python({"kind": kind})
        backward = config.build(trainer.parameters, trainer.objective.names)
        trainer.backward = trainer.state.backward = backward
        trainer.fit(Data())
        found.append(weights(trainer))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_under_bf16_weights_gradients_and_optimizer_stay_float32(optimizer: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, END_TO_END, steps=3, precision="bf16", optimizer={"kind": optimizer}, log_every=1
    )
    seen: list[torch.dtype] = []
    trainer.model.fusion.blocks[0].mlp_in.register_forward_hook(lambda *found: seen.append(found[2].dtype))  # pyright: ignore
    trainer.fit(Data())
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in weights(trainer).values() if value.is_floating_point()} == {
        torch.float32
    }
    kept = [trainer.optimizer.state_dict(), *(average.shadow for average in trainer.averages.values())]
    kept = [one for one in tensors_in(kept) if one.is_floating_point()]
    assert kept and {value.dtype for value in kept} == {torch.float32}
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert trainer.counters.latest["loss/total"] < 100


def test_the_residual_sum_is_in_bf16_where_products_are_and_nowhere_else() -> None:
    found: dict[Any, Any] = {}
    for residual in (None, torch.bfloat16):
        model, objective = modules()
        LossModule(model, objective, residual=residual)
        batch, sums = make_batch(0), []
        blocks_of(model.fusion)[-1].register_forward_hook(
            lambda *found, sums=sums: sums.append(found[2].dtype)
        )
        with torch.autocast("cpu", torch.bfloat16):
            terms = objective(model(batch.observation), batch, model)
        terms.total.backward()
        model(batch.observation)
        assert sums == [residual or torch.float32, torch.float32]
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        found[residual] = {name: value.item() for name, value in terms.values.items()}
    assert found[None] == pytest.approx(found[torch.bfloat16], rel=0.02)
    assert found[None] != found[torch.bfloat16]


def test_a_residual_sum_of_fewer_bits_than_its_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.residual is bf16, but training\.precision is fp32"):
        make_trainer(tmp_path, END_TO_END, residual="bf16", precision="fp32")
