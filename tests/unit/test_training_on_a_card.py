"""A training on a pretended GPU: nothing lies on the wrong device, and an update makes the host wait once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from card_world import EVERY_TERM, NARROW, OFTEN, ONCE, Data, make_trainer, snapshot, updated, weights
from pretended_card import DEVICE, Card, card
from tutti.models import layers
from tutti.models.decoders import fast_tokens as chunk_tokens
from tutti.models.language import transformer as language
from tutti.objectives.terms.contrastive import ContrastiveTerm
from tutti.objectives.terms.union import TermConfig
from tutti.plugin import CUSTOM
from tutti.training.validation import validated
from tutti.types import Batch


def test_every_term_is_tried() -> None:
    kinds = {get_args(member)[1].tag for member in get_args(get_args(TermConfig)[0])}
    assert kinds == {*EVERY_TERM, "chunk", CUSTOM}


@pytest.mark.parametrize("sections", ONCE.values(), ids=ONCE.keys())
def test_an_update_on_a_card_waits_once(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with card(monkeypatch) as pretended:
        trainer = make_trainer(tmp_path, **sections)
        updated(trainer, 0, 0)  # the first one makes the optimiser's state
        pretended.waits.clear()
        updated(trainer, 1, 1)
        assert pretended.waits == ["tolist"]
        places = [p for p in trainer.parameters.values() if not pretended.holds(p)]
    assert places == []


@pytest.mark.parametrize("sections", OFTEN.values(), ids=OFTEN.keys())
def test_what_looks_twice_lies_on_the_card_too(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with card(monkeypatch) as pretended:
        updated(make_trainer(tmp_path, **sections), 0, 1)
    assert pretended.waits


@pytest.mark.parametrize("name", ["every term", "fast", "schedule_free"])
def test_the_pretended_card_computes_what_the_cpu_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (layers, language, chunk_tokens):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    plain = make_trainer(tmp_path / "plain", "cpu", **ONCE[name])
    updated(plain, 0, 1)
    with card(monkeypatch):
        trainer = make_trainer(tmp_path / "card", **ONCE[name])
        updated(trainer, 0, 1)
        found = weights(trainer)
    for key, value in weights(plain).items():
        assert torch.equal(value, found[key]), key


@pytest.mark.parametrize("kind", ["regression", "flow", "diffusion", "bins", "fast"])
def test_validation_and_checkpoint_on_a_card(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"objective": EVERY_TERM}
    if kind != "regression":
        sections = {"action": {"kind": kind, **NARROW}}
    with card(monkeypatch):
        data = Data()
        trainer, other = (make_trainer(tmp_path / name, **sections) for name in ("one", "other"))
        updated(trainer, 0, 0)
        values = validated(trainer, data)
        saved = snapshot(trainer, data)
        updated(trainer, 1, 1)
        other.state.parts["loader"] = data.train
        other.state.load(saved)
        updated(other, 1, 1)
        one, two = weights(trainer), weights(other)
    assert "valid/action" in values
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_tensor_of_the_host_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ContrastiveTerm.compute

    def planted(term: ContrastiveTerm, features: Any, batch: Batch) -> Any:
        result = plain(term, features, batch)
        return replace(result, value=(result.value * torch.ones(3)).sum())

    monkeypatch.setattr(ContrastiveTerm, "compute", planted)
    with card(monkeypatch), pytest.raises(RuntimeError, match=r"mul of tensors on the card .* host: \(3,\)"):
        updated(make_trainer(tmp_path), 0, 0)


def test_a_look_at_a_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ContrastiveTerm.compute

    def planted(term: ContrastiveTerm, features: Any, batch: Batch) -> Any:
        assert float(term.log_scale.detach()) > 0
        return plain(term, features, batch)

    monkeypatch.setattr(ContrastiveTerm, "compute", planted)
    with card(monkeypatch) as pretended:
        updated(make_trainer(tmp_path), 0, 0)
    assert pretended.waits.count("_local_scalar_dense") == 1


def test_the_pretended_card_says_what_a_card_would() -> None:
    with Card() as pretended:
        here, there = torch.ones(3), torch.ones(3, device="cuda", requires_grad=True)
        assert (here.device.type, there.device) == ("cpu", DEVICE)
        (there * 2.0).sum().backward()
        assert there.grad is not None and there.grad.is_cuda and not pretended.waits
        for mixed in (lambda: here + there, lambda: torch.stack([here.sum(), there.sum()])):
            with pytest.raises(RuntimeError, match="tensors of the host"):
                mixed()
        assert there.detach()[there > 0].shape == (3,) and there.detach()[[0, 1]].is_cuda
        assert (
            here.to("cuda", non_blocking=True).is_cuda and here.to(there).is_cuda and not there.cpu().is_cuda
        )
        with pytest.raises(AssertionError, match="no numpy array"):
            there.detach().numpy()
    assert pretended.waits == ["index by a mask", "index by numbers of the host", "to", "to"]
