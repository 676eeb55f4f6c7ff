"""What a GPU has to do while the host waits for an update's numbers: the same bits, in the order wanted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.vla_training import make_batch, make_trainer
from tutti.training.optim.muon import Muon
from tutti.training.trainer import Trainer
from tutti.types import Batch

MUON = {"kind": "muon", "weight_decay": 0.1, "adamw_weight_decay": 0.1}
BAD, STEPS = 8, 14
"""The step whose loss is not finite."""


def stream() -> Iterator[Batch]:
    for number in range(STEPS):
        batch = make_batch(number)
        if number == BAD:
            batch.actions.fill_(float("nan"))
        yield batch


def trained(run: Path, *, ahead: bool) -> tuple[Trainer, list[dict[str, float]]]:
    gradients = {"non_finite": "skip", "zclip": {"warmup": 2, "z_threshold": 1.0}}
    trainer = make_trainer(run, {"kind": "end_to_end"}, optimizer=MUON, gradients=gradients, ema=0.9)
    trainer.optimizer.ahead = ahead
    batches, seen = stream(), []
    for _ in range(STEPS):
        trainer.update(batches)
        seen.append(trainer.meter.take())
    return trainer, seen


def test_directions_made_before_the_host_decides_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    for name in ("prepare", "step_prepared", "step"):
        plain = getattr(Muon, name)

        def told(self: Muon, *given: Any, plain: Any = plain, name: str = name) -> Any:
            begun.append(name)
            return plain(self, *given)

        monkeypatch.setattr(Muon, name, told)
    direct, numbers = trained(tmp_path / "plain", ahead=False)
    assert begun == ["step"] * (STEPS - 1)
    begun.clear()
    ahead, same = trained(tmp_path / "ahead", ahead=True)
    # A clipped step is made anew from what is left of its gradient; behind it nothing is begun; what is not
    # finite is dropped.
    expected, clipped = list[str](), False
    for number, one in enumerate(same):
        prepared = not clipped
        expected += ["prepare"] * prepared
        clipped = one.get("optim/clip_share", 0) > 0
        if number != BAD:
            expected.append("step_prepared" if prepared and not clipped else "step")
    assert begun == expected
    assert numbers == same and min(begun.count(name) for name in ("step", "step_prepared")) > 2
    for one, other in zip(states(direct), states(ahead), strict=True):
        assert one.keys() == other.keys()
        assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def states(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    yield trainer.model.state_dict()
    yield trainer.averages["ema"].shadow
    for optimizer in trainer.optimizer.optimizers.values():
        for number, state in optimizer.state_dict()["state"].items():
            yield {f"{number} {key}": torch.as_tensor(value) for key, value in state.items()}


class Order(TorchDispatchMode):
    """What is queued and waited for, without repetitions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, what: str) -> None:
        if self.seen[-1:] != [what]:
            self.seen.append(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("baddbmm", "_foreach_add_", "_fused_adamw_"):
            self.note({"baddbmm": "directions", "_foreach_add_": "moves"}.get(name, "adamw"))
        return func(*args, **(kwargs or {}))


def test_all_matrix_products_of_a_step_are_queued_before_the_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, {"kind": "end_to_end"}, optimizer=MUON)
    trainer.optimizer.ahead = True
    trainer.update(iter([make_batch(0)]))
    order = Order()

    class Event:
        def record(self) -> None:
            order.note("sent")

        def synchronize(self) -> None:
            order.note("wait")

    plain = torch.empty_like

    def empty_like(tensor: Tensor, *, pin_memory: bool = False, **given: Any) -> Tensor:
        return plain(tensor, **given)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "is_cuda", True)  # Muon iterates in bfloat16, numbers come by events
    with order:
        trainer.update(iter([make_batch(1)]))
    assert order.seen[:4] == ["sent", "directions", "wait", "moves"]
    assert {*order.seen[4:]} == {"moves", "adamw"}
