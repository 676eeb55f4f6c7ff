"""One small real training in float64 on any number of ranks, for the tests: what it records and saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fixtures.checkpoints import load_latest
from objectives_world import as_double
from tutti.config.run_config import RunConfig
from tutti.models.config import ModelConfig
from tutti.objectives.unified import ObjectiveConfig
from tutti.training.records import read_records
from tutti.training.trainer import Trainer
from tutti.types import Batch
from vla_world import MODEL, SPEC, make_batch

SIZE = 8
OBJECTIVE = {
    "align": {"width": 16, "weight": 0.3},
    "recon": {"width": 16, "heads": 2, "downsample": 2},
    "state": {"hidden": 16, "offsets": [1, 3], "gripper": {"dimension": -1}},
}
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
    "schedule": {"kind": "wsd", "warmup": 2},
    "log_every": 1,
    "validate_every": 3,
    "checkpoint_every": 3,
    "diagnostics": {"every": 0},
}


class Stream:
    """Endless whole batches; batch i is made of i alone, but for the row that `poison` (i, row) blackens."""

    def __init__(self, poison: tuple[int, int] | None = None) -> None:
        self.position = 0
        self.poison = poison

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.position
            self.position += 1
            batch = as_double(make_batch(number, SIZE))
            if self.poison is not None and number == self.poison[0]:
                batch.actions[self.poison[1]] = torch.nan
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Data:
    def __init__(self, poison: tuple[int, int] | None = None) -> None:
        self.train = Stream(poison)
        self.validation = [as_double(make_batch(10_001 + n, size)) for n, size in enumerate((6, 6, 3))]


def trainer_of(run: Path, changes: dict[str, Any], **sections: Any) -> Trainer:
    """A trainer of a fresh model; `sections` are those of a run's config besides training."""
    given = {"objective": OBJECTIVE, "training": {**SETTINGS, **changes}, **sections}
    config = RunConfig.model_validate(given)
    torch.manual_seed(0)
    model = ModelConfig.model_validate(given.get("model", MODEL)).build(SPEC).double()
    loss = ObjectiveConfig.model_validate(given["objective"]).build(model, config.balancing).double()
    return Trainer(config.training, model, loss, run, strategy=config.strategy, backward=config.backward)


def train(
    run: str, changes: dict[str, Any], sections: dict[str, Any] | None = None, poison: Any = None
) -> dict[str, Any]:
    """Records without times, and the last checkpoint, of a training on these ranks."""
    trainer = trainer_of(Path(run), changes, **(sections or {}))
    trainer.fit(Data(poison))
    saved = load_latest(Path(run))
    assert saved is not None
    records = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read_records(Path(run))]
    return {"records": records, "tensors": saved.tensors, "optimizer": saved.optimizer, "rng": saved.rng}
