"""Each term's part of the optimiser's step: the parts sum to what really moves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from fixtures.small_model import NumberedLoader
from fixtures.term_batches import as_double
from fixtures.vla_training import make_batch, modules
from tutti.nested_dicts import merge
from tutti.training.backward import BackwardConfig
from tutti.training.backward.term_gradients import Gradients, added, term_gradients
from tutti.training.config import TrainingConfig
from tutti.training.diagnostics.measures import weighted_sum
from tutti.training.optim.learning_rates import part_of
from tutti.training.optim.update_parts import MomentumParts
from tutti.training.records import read_records
from tutti.training.trainer import Trainer
from tutti.training.update import Observer, Update
from tutti.types import Features, LossTerms

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "weight_decay": 0.1, "layer_decay": 0.8},
    "muon": {"kind": "muon", "weight_decay": 0.1, "learning_rates": {"vision": 0.5}},
    "schedule_free": {"kind": "schedule_free", "weight_decay": 0.1},
}
MASKED = {"kind": "masked", "may_train": {"action": ["fusion", "action", "language"], "recon": ["vision"]}}


class Data:
    def __init__(self, dtype: torch.dtype) -> None:
        cast = as_double if dtype == torch.float64 else lambda batch: batch
        self.train = NumberedLoader(lambda number: cast(make_batch(number)))
        self.validation = []


class Follow(Observer):
    """Adds up every update's parts and compares them with what the optimiser moved."""

    def __init__(self, trainer: Trainer, *, start: int = 0, raw: bool = False) -> None:
        self.trainer, self.start, self.raw = trainer, start, raw
        self.parameters = list(trainer.parameters.values())
        self.momenta = MomentumParts(trainer.optimizer, trainer.parameters)
        self.gradients: Gradients = {}
        self.lambdas: dict[str, float] = {}
        self.before: list[Tensor] = []
        self.parts: list[Gradients] = []
        self.errors: list[float] = []
        self.unattributed: list[float] = []
        self.clips: list[dict[str, float]] = []

    def after_forward(self, update: Update, features: Features, terms: LossTerms) -> None:
        self.lambdas = {name: float(value) for name, value in terms.lambdas.items()}
        scale = {name: 1.0 if self.raw else value for name, value in self.lambdas.items()}
        values = {name: scale[name] * value / len(update.batches) for name, value in terms.values.items()}
        gradients = self.trainer.backward.masked(term_gradients(values, self.parameters))
        self.gradients = added(self.gradients, gradients) if update.number else gradients

    def after_clipping(self, update: Update) -> None:
        self.clips.append(update.clip)
        if update.step >= self.start:
            self.momenta.add(self.gradients, update.clip)
            self.parts.append(self.momenta.parts())
            self.before = [self._moved(n).clone() for n in range(len(self.parameters))]
            self.decayed = [p.detach().clone() for p in self.parameters]

    def _moved(self, number: int) -> Tensor:
        """What the optimiser's step moves: the parameter, or z of a schedule-free one."""
        parameter = self.parameters[number]
        state = self.optimizer_of[id(parameter)][0].state.get(parameter, {})
        return state.get("z", parameter).detach()

    @property
    def optimizer_of(self) -> dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]]:
        return {
            id(p): (one, group)
            for one in self.trainer.optimizer.optimizers.values()
            for group in one.param_groups
            for p in group["params"]
        }

    def after_step(self, update: Update) -> None:
        if update.step < self.start:
            return
        weights = {term: self.lambdas[term] if self.raw else 1.0 for term in self.parts[-1]}
        summed = weighted_sum(self.parts[-1], weights)
        differences, sizes = [], []
        for number, parameter in enumerate(self.parameters):
            _, group = self.optimizer_of[id(parameter)]
            part = summed[number]
            step = self._moved(number) - self.before[number]
            if part is not None:
                step = step + group["lr"] * group["weight_decay"] * self.decayed[number]
            expected = torch.zeros_like(step) if part is None else part
            differences.append((step - expected).norm())
            sizes.append(step.norm())
        self.errors.append(float(torch.stack(differences).norm() / torch.stack(sizes).norm()))
        self.unattributed.append(self.momenta.unattributed)


def follow(
    run: Path,
    optimizer: str,
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 4,
    start: int = 0,
    **given: Any,
) -> Follow:
    changing = {"recon": {"weight": {"start": 0.4, "end": 0.1, "schedule": "linear"}}}
    model, objective = modules(**given.pop("objective", changing))
    settings = {
        "steps": steps,
        "threads": 1,
        "device": "cpu",
        "accumulation": 2,
        "optimizer": OPTIMIZERS[optimizer],
        "schedule": {"kind": "constant", "warmup": 1},
        "gradients": {"clip_norm": 0.3},
        "validation": {"every": 0},
        "checkpoints": {"every": 0},
        "diagnostics": {"every": 0},
        "ema": "off",
    }
    raw, backward = given.pop("raw", False), given.pop("backward", {"kind": "one"})
    trainer = Trainer(
        TrainingConfig.model_validate(merge(settings, given)),
        model.to(dtype),
        objective.to(dtype),
        run,
        backward=TypeAdapter(BackwardConfig).validate_python(backward),
    )
    watch = Follow(trainer, start=start, raw=raw)
    trainer.observers = (*trainer.observers, watch)

    class Data:
        def __init__(self) -> None:
            self.train = NumberedLoader(
                lambda n: as_double(make_batch(n)) if dtype == torch.float64 else make_batch(n)
            )
            self.validation = []

    trainer.fit(Data())
    return watch


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backward", [{"kind": "one"}, MASKED], ids=["all", "masked"])
def test_parts_sum_to_the_step_of_the_optimizer(
    tmp_path: Path, optimizer: str, backward: dict[str, Any]
) -> None:
    """Over updates with clipping of each part by itself and a weight that changes, in float64."""
    by = "part" if backward is MASKED else "global"
    found = follow(tmp_path, optimizer, backward=backward, gradients={"clip_by": by})
    assert len(found.errors) == 4 and max(found.errors) < 1e-9
    clipped = [factor for update in found.clips for factor in update.values()]
    assert min(clipped) < 0.9, "nothing was clipped"
    moved = {term for term, own in found.parts[-1].items() if any(p is not None and p.any() for p in own)}
    assert moved == {"align", "action", "recon", "state"}


def test_raw_gradients_give_parts_to_be_weighted_and_float32_agrees(tmp_path: Path) -> None:
    """Under constant weights lambda times the raw part is the weighted part; Muon in its own precision."""
    found = follow(tmp_path, "muon", dtype=torch.float32, raw=True, objective={"recon": {"weight": 0.2}})
    assert max(found.errors) < 1e-3


@pytest.mark.parametrize(("optimizer", "beta"), [("adamw", 0.9), ("muon", 0.95), ("schedule_free", 0.0)])
def test_a_window_that_begins_later_lacks_only_the_momentum_from_before(
    tmp_path: Path, optimizer: str, beta: float
) -> None:
    whole = follow(tmp_path / "whole", optimizer, steps=5)
    late = follow(tmp_path / "late", optimizer, steps=5, start=2)
    assert late.unattributed == pytest.approx([beta, beta**2, beta**3])
    if optimizer == "schedule_free":
        assert max(late.errors) < 1e-9
    # What is missing of each term is its momentum of two updates, which fades by beta with every update.
    assert late.parts[-1].keys() == whole.parts[-1].keys()
    assert (late.errors[-1] > 1e-3) == (beta > 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_saved_window_continues_to_the_last_bit(tmp_path: Path, optimizer: str) -> None:
    found = follow(tmp_path, optimizer, steps=2, dtype=torch.float32)
    trainer = found.trainer
    again = MomentumParts(trainer.optimizer, trainer.parameters)
    again.load_state_dict(copy.deepcopy(found.momenta.state_dict()))
    for number, parameter in enumerate(found.parameters):
        parameter.grad = torch.full_like(parameter, 0.01) if number % 3 else None
    for momenta in (found.momenta, again):
        momenta.add(found.gradients, {"all": 0.5})
    one, other = found.momenta.parts(), again.parts()
    assert again.updates == 3 and one.keys() == other.keys()
    for term, own in one.items():
        for a, b in zip(own, other[term], strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


def length(gradients: list[Tensor | None]) -> float:
    return float(torch.nn.utils.get_total_norm([one for one in gradients if one is not None]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recorded_shares_are_those_of_the_parts(tmp_path: Path, optimizer: str) -> None:
    """At share 1 a window that begins with the training sees every gradient of it."""
    settings: dict[str, Any] = {"diagnostics": {"every": 2, "share": 1.0}, "accumulation": 1}
    found = follow(tmp_path, optimizer, dtype=torch.float32, **settings)
    (record,) = [one for one in read_records(tmp_path) if "diag/update_share/action/vision" in one]
    assert record["step"] == len(found.parts) == 4
    for part in ("vision", "language", "fusion", "action"):
        numbers = [n for n, name in enumerate(found.momenta.names) if part_of(name) == part]
        norms = {term: length([own[number] for number in numbers]) for term, own in found.parts[-1].items()}
        for term, size in norms.items():
            share = size / sum(norms.values())
            assert record[f"diag/update_share/{term}/{part}"] == pytest.approx(share, abs=1e-3)
