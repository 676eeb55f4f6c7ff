"""Three terms on the tiny world of training_world.py, under any balancing and backward, cut and resumed.

Run as a program it compares a compiled training with a plain one: python balancing_world.py RUN BACKWARD.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from fixtures.checkpoints import load_latest
from training_world import STATE, TEXT, WIDTH, Data, Model, config
from tutti.objectives.balancing.union import BalancingConfig
from tutti.objectives.term import Term, TermValue
from tutti.objectives.terms.action import ChunkTerm
from tutti.objectives.unified import UnifiedLoss
from tutti.objectives.weight_schedule import WeightSchedule, schedule_of
from tutti.training.backward.union import BackwardConfig
from tutti.training.metrics import describe_metric
from tutti.training.records import read_records
from tutti.training.trainer import Trainer
from tutti.types import Batch, Features

STEPS, CUT = 12, 5
SCHEDULES = {
    "align": schedule_of(0.3),
    "action": schedule_of(1.0),
    "recon": WeightSchedule(start=0.5, end=0.0, schedule="linear", finish=0.8),
}


class Read(Term):
    """mean (head(mean of some tokens) - target)^2; `recon` reads the state off the vision tokens, `align` the
    text's numbers off vision and language together."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.head = nn.Linear(WIDTH, STATE if name == "recon" else TEXT)

    def compute(self, features: Features, batch: Batch) -> TermValue:
        tokens = features.vision.mean()
        target = batch.observation.state
        if self.name == "align":
            tokens, target = tokens * features.language.mean(), batch.observation.text.float() / 9
        return TermValue(value=(self.head(tokens) - target).square().mean(), metrics={})


def trainer(
    run: Path, balancing: dict[str, Any], backward: dict[str, Any], progress: Any = None, **settings: Any
) -> Trainer:
    torch.manual_seed(0)
    model = Model()
    terms = {"align": Read("align"), "action": ChunkTerm(model.action), "recon": Read("recon")}
    chosen = TypeAdapter(BalancingConfig).validate_python(balancing).build(SCHEDULES)
    return Trainer(
        config(**{"steps": STEPS, "accumulation": 2, "checkpoint_every": 0, **settings}),
        model,
        UnifiedLoss(terms, chosen),
        run,
        backward=TypeAdapter(BackwardConfig).validate_python(backward),
        progress=progress,
    )


def interrupt(step: int, steps: int, metrics: dict[str, float]) -> None:
    if step == CUT:
        signal.raise_signal(signal.SIGINT)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in leaves(item, f"{name}/{key}").items()}
    return {name: value}


def resumes(run: Path, balancing: dict[str, Any], backward: dict[str, Any]) -> Trainer:
    """Trains straight and in two parts, and compares everything that the two leave behind."""
    straight = trainer(run / "straight", balancing, backward)
    straight.fit(Data())
    with pytest.raises(KeyboardInterrupt):
        trainer(run / "cut", balancing, backward, interrupt).fit(Data())
    trainer(run / "cut", balancing, backward).fit(Data())
    one, other = load_latest(run / "straight"), load_latest(run / "cut")
    assert one is not None and other is not None and other.step == STEPS
    # The shape checks of the tests draw from Python's own random numbers, so those are left out.
    kept = [
        leaves({"tensors": c.tensors, "optimizer": c.optimizer, "rng": c.rng["torch"]}) for c in (one, other)
    ]
    assert kept[0].keys() == kept[1].keys()
    for name, value in kept[0].items():
        equal = (
            torch.equal(value.nan_to_num(-1), kept[1][name].nan_to_num(-1))
            if isinstance(value, Tensor)
            else value == kept[1][name]
        )
        assert equal, name
    for name, parameter in straight.parameters.items():
        assert parameter.isfinite().all(), name
    records = [
        [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read_records(run / name)]
        for name in ("straight", "cut")
    ]
    assert records[0] == records[1]
    names = {name for record in records[0] for name in record} - {"step", "kind"}
    assert all(describe_metric(name) for name in names)
    return straight


def compiled_and_eager(run: Path, kind: str) -> float:
    """The largest difference in a weight after the same training with and without torch.compile."""
    share = {"kind": "gradient_share", "start": 2, "steps": 3}
    weights: list[dict[str, Tensor]] = []
    for name in ("compiled", "eager"):
        one = trainer(run / name, share, {"kind": kind}, compile=name == "compiled", validate_every=0)
        for module in one.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # a compiled model draws other numbers
        one.fit(Data())
        weights.append(one.model.state_dict())
    return max((value - weights[1][name]).abs().max().item() for name, value in weights[0].items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(compiled_and_eager(Path(sys.argv[1]), sys.argv[2]))
