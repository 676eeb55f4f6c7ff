"""A training on a pretended GPU: nothing lies on the wrong device, and an update makes the host wait once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from test_objectives_every_term import KINDS
from torch import Tensor

from objectives_world import MODEL, SPEC, make_batch
from pretended_card import DEVICE, Card, card
from small_world import NumberedLoader
from tutti.models import language, layers
from tutti.models.decoders import chunk_tokens
from tutti.models.vla import ModelConfig
from tutti.objectives.align import ContrastiveTerm
from tutti.objectives.balancings import BalancingConfig
from tutti.objectives.unified import ObjectiveConfig
from tutti.plugin import CUSTOM
from tutti.training import trainer as trainer_module
from tutti.training.backwards import BackwardConfig
from tutti.training.config import TrainingConfig
from tutti.training.machine import Machine
from tutti.training.snapshot import load_into, snapshot
from tutti.training.strategy import StrategyConfig
from tutti.training.trainer import Trainer
from tutti.training.validation import validated
from tutti.types import Batch

NARROW = {"width": 16, "depth": 1, "heads": 2}
TERMS = {
    "align": {"kind": "contrastive", "width": 16},
    "recon": {"kind": "future_patches", "width": 16, "heads": 2},
    "state": {"kind": "future_states", "offsets": (1, 3), "hidden": 16},
}
EVERY_TERM = {
    kind: {"kind": kind, "weight": 0.3, **options}
    for kind, options in KINDS.items()
    if kind not in ("chunk", CUSTOM)
}
ONCE = {
    "plain": {},
    "every term": {"objective": EVERY_TERM},
    "bf16": {"precision": "bf16"},
    "flow": {"action": {"kind": "flow", **NARROW}},
    "diffusion": {"action": {"kind": "diffusion", "cross_attention": True, **NARROW}},
    "bins": {"action": {"kind": "bins", **NARROW}},
    "fast": {"action": {"kind": "fast", **NARROW}},
    "gripper": {"action": {"kind": "regression", "hidden": 16, "gripper": {"dimension": -1}}},
    **{name: {"balancing": {"kind": name}} for name in ("gradient_share", "uncertainty", "dwa", "rlw")},
    "masked": {"backward": {"kind": "masked", "moves": {"recon": ["vision"]}}},
    "knowledge_insulation": {"backward": {"kind": "knowledge_insulation"}},
    "two_stage_frozen": {"strategy": {"kind": "two_stage_frozen"}},
    "progressive": {"strategy": {"kind": "progressive", "shares": (1, 1, 2)}},
    "muon": {"training": {"optimizer": {"kind": "muon"}}},
    "schedule_free": {
        "training": {
            "optimizer": {"kind": "schedule_free"},
            "ema": "off",
            "schedule": {"kind": "constant", "warmup": 1},
        }
    },
    "clipped and skipped": {"training": {"clip_norm": 1e-3, "gradients": {"non_finite": "skip"}}},
    "recomputed": {"training": {"activation_checkpointing": "block", "accumulation": 2}},
}
"""Settings in which the host waits once: for the numbers of the terms and the gradient's norm."""
OFTEN = {
    "k gradients": {"backward": {"kind": "k_gradients"}},
    "k gradients by part": {
        "backward": {"kind": "k_gradients", "scope": "part", "aggregator": {"kind": "pcgrad"}}
    },
    "famo": {"balancing": {"kind": "famo"}},
    "calibration": {"balancing": {"kind": "gradient_share", "start": 0, "steps": 2}},
    "clipping by part": {"training": {"gradients": {"clip_by": "part", "adaptive": {"kind": "zclip"}}}},
    "diagnostics": {"training": {"diagnostics": {"every": 1}}},
}
"""Settings that look at gradients or at the batch a second time."""


class Data:
    def __init__(self) -> None:
        self.train = NumberedLoader(make_batch)
        self.validation = [make_batch(10_001), make_batch(10_002, 4)]


def make_trainer(run: Path, device: str = "cuda", precision: Any = "fp32", **sections: Any) -> Trainer:
    """A small one; `sections` are those of a config, `action` the model's."""
    torch.manual_seed(0)
    model = ModelConfig.model_validate({**MODEL, "action": sections.get("action", {"hidden": 32})}).build(
        SPEC
    )
    if model.action.needs_fit:
        chunks = torch.randn(64, SPEC.horizon, SPEC.action_dim).cumsum(1)
        chunks[..., -1] = chunks[..., -1].sign()
        model.action.fit(chunks, torch.ones_like(chunks, dtype=torch.bool))
    settings = {
        "steps": 4,
        "threads": 1,
        "schedule": {"kind": "wsd", "warmup": 1},
        "diagnostics": {"every": 0},
        **sections.get("training", {}),
    }
    objective = ObjectiveConfig.model_validate({**TERMS, **sections.get("objective", {})})
    machine = Machine(device=torch.device(device), threads=1, precision=precision, reasons=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "decide", lambda *_: machine)
        return Trainer(
            TrainingConfig.model_validate(settings),
            model,
            objective.build(model, chosen(BalancingConfig, sections, "balancing", "fixed")),
            run,
            strategy=chosen(StrategyConfig, sections, "strategy", "end_to_end"),
            backward=chosen(BackwardConfig, sections, "backward", "one"),
        )


def chosen(union: Any, sections: dict[str, Any], name: str, kind: str) -> Any:
    return TypeAdapter(union).validate_python(sections.get(name, {"kind": kind}))


def updated(trainer: Trainer, first: int, last: int) -> None:
    """Updates on the batches of these numbers, which arrive without a wait."""
    trainer.model.train()
    trainer.objective.train()
    count = trainer.config.accumulation
    numbers = range(first * count, (last + 1) * count)
    stream = (make_batch(n).to(trainer.machine.device, non_blocking=True) for n in numbers)
    for _ in range(first, last + 1):
        trainer._update(stream, report=False)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    found = {**trainer.model.state_dict(), **trainer.objective.state_dict()}
    return {name: value.cpu().clone() for name, value in found.items()}


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


@pytest.mark.parametrize("name", ["every term", "fast", "muon"])
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
        load_into(other, data, saved)
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
