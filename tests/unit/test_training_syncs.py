"""How often an update asks for a number of the device: on a GPU that is how often the host synchronises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.gpu_trainings import EVERY_TERM, ONCE, updated
from fixtures.gpu_trainings import make_trainer as any_trainer
from fixtures.small_model import NumberedLoader
from fixtures.vla_training import make_batch, make_trainer
from tutti.data.augmentation import PictureJitter, raw_batch
from tutti.data.mixture import Stream
from tutti.models import layers
from tutti.models.decoders import fast_tokens as chunk_tokens
from tutti.models.language import transformer as language
from tutti.objectives.config import TermConfig
from tutti.objectives.terms import next_token
from tutti.objectives.terms.alignment import ContrastiveTerm
from tutti.plugin import CUSTOM
from tutti.training.faults.non_finite import NonFiniteError

END_TO_END = {"kind": "end_to_end"}
WAITS = (
    *("nonzero", "unique", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal", "bincount"),
    "_local_scalar_dense",
)
"""Operations whose result, or its size, the host must know: each waits for the device."""
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


class Waits(TorchDispatchMode):
    """Counts them. A tensor that becomes a list of numbers is one transfer, however long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.seen.append(name)
        elif name in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1]):
            one_number = name != "index" and len(args[1]) == 1 and args[2].ndim == 0
            self.seen += [] if one_number else [f"{name} by a mask"]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No look at values that would be on a device; the sizes of the lists that tensors became."""
    for module in (layers, language, chunk_tokens, next_token):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    fetched: list[int] = []
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        fetched.append(tensor.numel())
        return plain(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return fetched


def test_every_term_is_tried() -> None:
    kinds = {get_args(member)[1].tag for member in get_args(get_args(TermConfig)[0])}
    assert kinds == {*EVERY_TERM, "chunk", CUSTOM}


@pytest.mark.parametrize("sections", ONCE.values(), ids=ONCE.keys())
def test_an_update_fetches_its_numbers_once(
    sections: dict[str, Any], as_on_a_gpu: list[int], tmp_path: Path
) -> None:
    trainer = any_trainer(tmp_path, "cpu", **sections)
    trainer.optimizer.ahead = True
    updated(trainer, 0, 0)  # the first one makes the optimiser's state
    as_on_a_gpu.clear()
    with Waits() as waits:
        updated(trainer, 1, 1)
    assert len(as_on_a_gpu) == 1
    assert waits.seen.count("_local_scalar_dense") in (0, as_on_a_gpu[0])  # inside that one list
    assert [name for name in waits.seen if name != "_local_scalar_dense"] == []


def test_the_losses_of_sources_come_in_the_same_transfer(as_on_a_gpu: list[int], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, END_TO_END, accumulation=2)
    batches = [make_batch(number) for number in range(4)]
    of_two = torch.arange(len(batches[0].window))[:, None] % 2 == torch.arange(2)
    stream = iter([replace(batch, source=of_two) for batch in batches])
    trainer.update(stream)
    trainer.meter.take()
    as_on_a_gpu.clear()
    with Waits() as waits:
        trainer.update(stream)
    assert len(as_on_a_gpu) == 1
    assert [name for name in waits.seen if name != "_local_scalar_dense"] == []
    found = trainer.meter.take()
    both = (found["loss/action/raw@0"] + found["loss/action/raw@1"]) / 2  # as many rows of each
    assert both == pytest.approx(found["loss/action/raw"], rel=1e-6)


def test_shares_that_are_known_are_not_read_again_in_the_warm_up(
    as_on_a_gpu: list[int], tmp_path: Path
) -> None:
    training = {"schedule": {"kind": "wsd", "warmup": 4}, "steps": 8}
    objective = {"align": {"share": 0.1, "width": 16}}
    trainer = any_trainer(tmp_path, "cpu", training=training, objective=objective)
    updated(trainer, 0, 1)
    as_on_a_gpu.clear()
    updated(trainer, 2, 2)
    assert len(as_on_a_gpu) == 1
    trainer.objective.load_state_dict(trainer.objective.state_dict())  # what is loaded may be of earlier
    assert trainer.objective.hooks.unmeasured(3) == () and len(as_on_a_gpu) == 2


def test_a_look_at_a_number_is_found(
    as_on_a_gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ContrastiveTerm.compute

    def planted(term: ContrastiveTerm, *given: Any) -> Any:
        assert float(term.log_scale.detach()) > 0
        return plain(term, *given)

    trainer = any_trainer(tmp_path, "cpu")
    updated(trainer, 0, 0)
    monkeypatch.setattr(ContrastiveTerm, "compute", planted)
    as_on_a_gpu.clear()
    with Waits() as waits:
        updated(trainer, 1, 1)
    assert waits.seen.count("_local_scalar_dense") in (1, as_on_a_gpu[0] + 1)


def test_pictures_are_changed_on_a_device_without_a_look_at_a_number() -> None:
    every = {"probability": 0.5}
    config = PictureJitter.model_validate(
        dict.fromkeys(("hue", "blur", "crop", "rotation", "shift", "view_drop"), every)
    )
    raw = raw_batch(make_batch(1), config, 0, 1, [Stream((), slice(None), 0, len(make_batch(1).window))])
    assert len(raw.changes.warped) and len(raw.changes.blurred)
    there = raw.to("meta")  # looks at masks before it moves them
    with Waits() as waits:
        images = there.augmented().observation.images
    assert images.shape == raw.batch.observation.images.shape and images.dtype == torch.uint8
    assert waits.seen == []


def test_what_is_recorded_is_what_was_fetched_micro_batch_by_micro_batch(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "a", END_TO_END, accumulation=2)
    whole.update(iter(NumberedLoader(make_batch)))
    single = make_trainer(tmp_path / "b", END_TO_END)
    model, losses = single.model, 0.0
    for batch in (make_batch(1), make_batch(2)):
        losses += single.objective(model(batch.observation), batch, model, 0.0).total.item()
    assert whole.meter.take()["loss/total"] == losses / 2


@pytest.mark.parametrize("bad", [1, 2])
def test_nothing_moves_where_a_micro_batch_is_not_finite(bad: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, END_TO_END, accumulation=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def stream() -> Any:
        for number in (1, 2):
            batch = make_batch(number)
            if number == bad:
                batch.actions.fill_(float("nan"))
            yield batch

    with pytest.raises(NonFiniteError) as raised:
        trainer.update(stream())
    assert raised.value.windows == [int(w) for n in range(1, bad + 1) for w in make_batch(n).window]
    assert raised.value.term == "action"
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.step == 0
