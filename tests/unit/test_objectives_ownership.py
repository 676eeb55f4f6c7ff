"""What the model owns no term, balancing or objective may own as well; what two terms share counts once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import Parameter

from fixtures.term_batches import make_batch, make_loss, make_model
from tutti.models.vla import VLA
from tutti.objectives.balancing.shares import SharesBalancing, SharesBalancingConfig
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.term import Model, Term, TermValue
from tutti.objectives.unified import UnifiedLoss
from tutti.objectives.weight_schedule import schedule_of
from tutti.training.config import TrainingConfig
from tutti.training.optim.optimizers import OptimizerSet, trainable
from tutti.training.trainer import Trainer
from tutti.types import Batch, DataNeeds, Features, UserError


class Watching(Term):
    """Looks at the later pictures with the model's encoder, and may keep a part of it, in several ways."""

    def __init__(self, model: Model, *, way: str, **term: Any) -> None:
        super().__init__(**term)
        vla: VLA = model  # type: ignore[assignment]
        self.head = nn.Linear(model.vision.width, 1)
        match way:
            case "part":
                self.see = vla.vision
            case "nested":
                self.see = nn.Sequential(vla.vision)  # type: ignore[arg-type]
            case "inner":
                self.see = next(m for m in vla.fusion.modules() if isinstance(m, nn.Linear))
            case "parameter":
                self.weight = next(vla.language.parameters())
            case "buffer":
                self.register_buffer("table", next(vla.buffers()))
            case "whole":
                self.model = vla
            case "copy":
                self.see = copy.deepcopy(vla.vision)

    @classmethod
    def needs(cls, *, way: str) -> DataNeeds:
        return DataNeeds(futures=(2,))

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        later = self.future(batch, 2).observation
        tokens = model.vision(model.prepare(later.images), later.image_mask)
        return TermValue(value=self.head(tokens.mean()).square().mean(), metrics={})


def with_buffer() -> VLA:
    model = make_model()
    model.fusion.register_buffer("table", torch.zeros(3))
    return model


def build(way: str) -> UnifiedLoss:
    kind = f"{__name__}:Watching"
    return make_loss(with_buffer(), inverse={"kind": kind, "options": {"way": way}})


@pytest.mark.parametrize("way", ["tuple", "copy"])
def test_what_is_used_or_copied_is_no_ones_twice(way: str) -> None:
    assert build(way).names == ("action", "inverse")


@pytest.mark.parametrize(
    ("way", "place", "part"),
    [
        ("part", "objective.inverse: the attribute `see`", "model.vision"),
        ("nested", "objective.inverse.see: the attribute `0`", "model.vision"),
        ("inner", "objective.inverse: the attribute `see`", "model.fusion."),
        ("parameter", "objective.inverse: the attribute `weight`", "model.language."),
        ("buffer", "objective.inverse: the attribute `table`", "model.fusion.table"),
        ("whole", "objective.inverse: the attribute `model`", "the model itself"),
    ],
)
def test_a_term_that_registers_a_part_of_the_model_is_refused(way: str, place: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        build(way)
    said = str(caught.value)
    assert said.startswith(f"{place} is {part}") and "argument `model` of `compute`" in said
    assert len(said.splitlines()) <= 4


class Holding(SharesBalancing):
    """A balancing that keeps the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__({"action": schedule_of(1.0)}, SharesBalancingConfig())
        self.kept = model


def test_a_balancing_or_an_objective_of_ones_own_is_refused_by_the_trainer(tmp_path: Path) -> None:
    config = TrainingConfig.model_validate({"steps": 2, "schedule": {"kind": "constant", "warmup": 1}})
    for hold in (hold_by_balancing, hold_by_objective):
        model = make_model()
        with pytest.raises(UserError, match=r"is the model itself|is model\.vision"):
            Trainer(config, model, hold(model), tmp_path)


def hold_by_balancing(model: VLA) -> UnifiedLoss:
    terms = {"action": ObjectiveConfig().terms()["action"].build(model, "action")}
    return UnifiedLoss(terms, Holding(model))


def hold_by_objective(model: VLA) -> UnifiedLoss:
    loss = make_loss(model)
    loss.encoder = model.vision  # type: ignore[assignment]
    return loss


def test_what_two_terms_share_counts_once() -> None:
    model = make_model()
    loss = make_loss(model, a={"kind": "progress", "hidden": 8}, b={"kind": "progress", "hidden": 8})
    loss.terms["b"].head = loss.terms["a"].head  # type: ignore[union-attr]
    parameters = trainable(model, loss)
    assert len({id(parameter) for parameter in parameters.values()}) == len(parameters)
    batch = make_batch()
    loss(model(batch.observation), batch, model).total.backward()
    assert any(name.startswith("objective.terms.a.head") for name in parameters)
    assert not any(name.startswith("objective.terms.b.head") for name in parameters)


def groups(*members: list[Parameter]) -> dict[str, torch.optim.Optimizer]:
    return {str(number): torch.optim.SGD(own, lr=0.1) for number, own in enumerate(members)}


def test_no_parameter_is_moved_by_two_optimisers() -> None:
    one, other = (Parameter(torch.zeros(2, 3)) for _ in range(2))
    assert OptimizerSet(groups([one], [other])).parameters == [one, other]
    with pytest.raises(UserError, match=r"shape \(2, 3\) twice in each step"):
        OptimizerSet(groups([one], [other, one]))
