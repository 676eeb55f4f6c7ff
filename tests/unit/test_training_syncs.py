"""Host and device: how often an update asks for a number, which on a GPU is how often the host waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vla_world
from small_world import NumberedLoader
from tutti.models import layers
from tutti.models.decoders import fast_tokens as chunk_tokens
from tutti.models.language import transformer as language
from tutti.models.sockets import ActionDecoder
from tutti.training.faults.non_finite import NonFiniteError
from tutti.types import Batch
from vla_world import make_batch, make_trainer

END_TO_END = {"kind": "end_to_end"}
WAITS = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "unique_dim", "masked_select", "is_nonzero")
"""Operations whose result the host must know: each waits for the device."""


class Waits(TorchDispatchMode):
    """Counts them. A tensor that becomes a list of numbers is one transfer, however long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No look at values that would be on a device; the sizes of the lists that tensors became."""
    for module in (layers, language, chunk_tokens):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    fetched: list[int] = []
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        fetched.append(tensor.numel())
        return plain(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return fetched


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_update_fetches_its_numbers_once(
    accumulation: int, as_on_a_gpu: list[int], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, END_TO_END, accumulation=accumulation, clip_norm=1e-3)
    stream = iter(NumberedLoader(make_batch))
    trainer._update(stream, report=False)  # the first one makes the optimiser's state
    as_on_a_gpu.clear()
    with Waits() as waits:
        trainer._update(stream, report=False)
    assert len(as_on_a_gpu) == 1
    assert waits.seen.count("_local_scalar_dense") in (0, as_on_a_gpu[0])  # inside that one list
    assert [name for name in waits.seen if name != "_local_scalar_dense"] == []


@pytest.mark.parametrize("kind", ["flow", "diffusion", "bins", "fast", "regression"])
def test_no_decoder_waits_in_a_step(
    kind: str, as_on_a_gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action: dict[str, Any] = {"kind": kind, "width": 16, "depth": 1, "heads": 2}
    if kind == "regression":
        action = {"kind": kind, "hidden": 16, "gripper": {"dimension": -1}}
    monkeypatch.setattr(vla_world, "MODEL", {**vla_world.MODEL, "action": action})
    trainer = make_trainer(tmp_path, END_TO_END)
    chunks = torch.randn(64, 5, 3)
    chunks[..., -1] = chunks[..., -1].sign()
    decoder = trainer.model.action
    assert isinstance(decoder, ActionDecoder)
    if decoder.needs_fit:
        decoder.fit(chunks, torch.ones_like(chunks, dtype=torch.bool))
    stream = iter(NumberedLoader(make_batch))
    trainer._update(stream, report=False)
    as_on_a_gpu.clear()
    with Waits() as waits:
        trainer._update(stream, report=False)
    assert len(as_on_a_gpu) == 1
    assert waits.seen.count("_local_scalar_dense") in (0, as_on_a_gpu[0])
    assert [name for name in waits.seen if name != "_local_scalar_dense"] == []


def test_what_is_recorded_is_what_was_fetched_micro_batch_by_micro_batch(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "a", END_TO_END, accumulation=2)
    whole._update(iter(NumberedLoader(make_batch)), report=False)
    single = make_trainer(tmp_path / "b", END_TO_END)
    losses: list[float] = []
    for number in (1, 2):
        batch = make_batch(number)
        losses.append(single.objective(single.model(batch.observation), batch, 0.0).total.item())
    assert whole.meter.take()["loss/total"] == sum(losses) / 2


@pytest.mark.parametrize("bad", [1, 2])
def test_nothing_moves_where_a_micro_batch_is_not_finite(bad: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, END_TO_END, accumulation=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def stream() -> Any:
        for number in (1, 2):
            batch = make_batch(number)
            yield spoiled(batch) if number == bad else batch

    with pytest.raises(NonFiniteError) as raised:
        trainer._update(stream(), report=False)
    assert raised.value.windows == [int(w) for n in range(1, bad + 1) for w in make_batch(n).window]
    assert raised.value.term == "action"
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.step == 0


def spoiled(batch: Batch) -> Batch:
    """Actions that are not finite."""
    batch.actions.fill_(float("nan"))
    return batch
