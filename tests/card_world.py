"""Small trainings of every kind for a GPU, real (tests/gpu) or pretended (pretended_card.py).

Run by torchrun as a program it trains on one GPU for each process: card_world.py KIND OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from objectives_world import MODEL, SPEC, make_batch
from small_world import NumberedLoader
from tutti.distributed.world import joined
from tutti.models.config import ModelConfig
from tutti.objectives.balancing.union import BalancingConfig
from tutti.objectives.unified import ObjectiveConfig
from tutti.storage.checkpoint import Checkpoint
from tutti.training import trainer as trainer_module
from tutti.training.backward.union import BackwardConfig
from tutti.training.config import TrainingConfig
from tutti.training.device import Machine
from tutti.training.records import read_records
from tutti.training.strategy import StrategyConfig
from tutti.training.trainer import Trainer

NARROW = {"width": 16, "depth": 1, "heads": 2}
TERMS = {
    "align": {"kind": "contrastive", "width": 16},
    "recon": {"kind": "future_patches", "width": 16, "heads": 2},
    "state": {"kind": "future_states", "offsets": (1, 3), "hidden": 16, "gripper": {"dimension": -1}},
}
EVERY_TERM: dict[str, dict[str, Any]] = {
    "contrastive": {"width": 16},
    "sigmoid": {"width": 16},
    "state_contrastive": {"width": 16, "read": "vision"},
    "recoverable_language": {"width": 16},
    "future_latent": {"hidden": 32},
    "progress": {"hidden": 16},
    "future_patches": {"width": 16, "heads": 2},
    "changed_patches": {"width": 16, "heads": 2},
    "masked_patches": {"width": 16, "heads": 2},
    "inverse_dynamics": {"hidden": 16, "channels": 4, "offset": 2},
    "future_states": {"offsets": (1, 3), "hidden": 16},
}
EVERY_TERM = {kind: {"kind": kind, "weight": 0.3, **options} for kind, options in EVERY_TERM.items()}
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


def snapshot(trainer: Trainer, data: Data) -> Checkpoint:
    """What `Trainer.fit` would save now, the loader being that of `data`."""
    trainer.state.parts["loader"] = data.train
    return trainer.state.checkpoint(trainer.saver.taken, trainer.settings.to_dict(), {})


def weights(trainer: Trainer) -> dict[str, Tensor]:
    found = {**trainer.model.state_dict(), **trainer.objective.state_dict()}
    return {name: value.cpu().clone() for name, value in found.items()}


def main(kind: str, run: Path) -> None:
    """Trains on as many GPUs as there are processes, and prints the last total."""
    given = {"parallel": {"kind": kind}} if kind != "single" else {}
    with joined(TrainingConfig.model_validate(given).parallel.count, torch.device("cuda"), 120.0) as ranks:
        make_trainer(run, training={**given, "log_every": 1}).fit(Data())
        if ranks.first:
            print([record["loss/total"] for record in read_records(run) if record["kind"] == "train"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
