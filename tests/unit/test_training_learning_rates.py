"""Learning rates by part and by layer, for each optimiser."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tutti.config.run_config import load_config
from tutti.training.optim.learning_rates import RatesConfig, layers_of
from tutti.training.optim.optimizers import AdamWConfig, MuonConfig, OptimizerSet, ScheduleFreeConfig
from tutti.types import UserError


def encoder(depth: int) -> nn.Module:
    """A stem, `depth` blocks, a norm."""
    blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(depth))
    return nn.Sequential(
        OrderedDict([("stem", nn.Linear(4, 4, bias=False)), ("blocks", blocks), ("norm", nn.LayerNorm(4))])
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = encoder(3)
        self.language = encoder(2)
        self.action = encoder(2)
        self.language.position = nn.Parameter(torch.zeros(4))


def rates(optimizer: OptimizerSet, model: nn.Module) -> dict[str, float]:
    """The learning rate of every parameter of the model by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for one in optimizer.optimizers.values() for group in one.param_groups]
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"] if id(p) in names}


def test_a_layer_is_the_number_of_blocks_begun() -> None:
    names = ["model.v.position", "model.v.stem.weight", *(f"model.v.blocks.{i}.w" for i in (0, 0, 1))]
    assert layers_of([*names, "model.v.norm.weight"]) == (2, [0, 0, 1, 1, 2, 2])
    assert layers_of(["objective.head.weight"]) == (0, [0])
    assert layers_of(["model.action.trunk.blocks.0.a", "model.action.out.weight"]) == (1, [1, 1])


def test_layer_decay_by_hand_for_a_depth_of_three() -> None:
    """d^3 = 0.125 before the blocks, 0.25, 0.5, 1 in them, 1 behind; the action decoder is left alone."""
    factors = RatesConfig(layer_decay=0.5).factors(Model(), nn.Identity())
    assert {name: value for name, value in factors.items() if name.startswith("model.vision")} == {
        "model.vision.stem.weight": 0.125,
        "model.vision.blocks.0.weight": 0.25,
        "model.vision.blocks.1.weight": 0.5,
        "model.vision.blocks.2.weight": 1.0,
        "model.vision.norm.weight": 1.0,
        "model.vision.norm.bias": 1.0,
    }
    assert factors["model.language.position"] == 0.25  # a parameter of the part itself comes first
    assert {value for name, value in factors.items() if name.startswith("model.action")} == {1.0}


@pytest.mark.parametrize("kind", [AdamWConfig, MuonConfig, ScheduleFreeConfig])
def test_part_and_layer_factors_multiply_and_a_strategy_multiplies_on_top(kind: type[RatesConfig]) -> None:
    model = Model()
    config = kind.model_validate(
        {"lr": 0.01, "learning_rates": {"vision": 0.1}, "layer_decay": {"vision": 0.5, "action": 0.8}}
        | ({"adamw_lr": 0.001} if kind is MuonConfig else {})
    )
    assert isinstance(config, AdamWConfig | MuonConfig | ScheduleFreeConfig)
    optimizer = config.build(model, nn.Identity())
    plain = 0.001 if kind is MuonConfig else 0.01
    found = rates(optimizer, model)
    assert found["vision.stem.weight"] == pytest.approx(0.01 * 0.1 * 0.125)
    assert found["vision.blocks.2.weight"] == pytest.approx(0.01 * 0.1)
    assert found["vision.norm.bias"] == pytest.approx(plain * 0.1)
    assert found["action.blocks.0.weight"] == pytest.approx(0.01 * 0.8)
    assert found["language.stem.weight"] == pytest.approx(0.01)
    optimizer.set_factor(0.5, {"vision": 0.2})
    assert rates(optimizer, model)["vision.stem.weight"] == pytest.approx(0.01 * 0.1 * 0.125 * 0.5 * 0.2)
    assert next(iter(optimizer.learning_rates.values())) == pytest.approx(0.005)  # the base rate is told


def test_without_factors_there_is_one_group_a_part_as_before() -> None:
    optimizer = AdamWConfig().build(Model(), nn.Identity()).optimizers["adamw"]
    assert [(g["name"], g["part"], g["lr"]) for g in optimizer.param_groups] == [
        (name, part, 1e-3) for name in ("matrix", "plain") for part in ("vision", "language", "action")
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RatesConfig(learning_rates={"visoin": 0.1}), "learning_rates names 'visoin'.*mean 'vision'"),
        (RatesConfig(layer_decay={"objective": 0.5}), "'objective', which has no stack of blocks"),
    ],
)
def test_a_part_that_is_not_there_is_refused(config: RatesConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.factors(Model(), nn.Linear(2, 2))


@pytest.mark.parametrize("settings", [{"learning_rates": {"vision": 0.0}}, {"layer_decay": 1.5}])
def test_factors_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RatesConfig.model_validate(settings)


def test_a_wrong_part_is_named_when_the_config_is_read() -> None:
    with pytest.raises(UserError, match=r"no part; there are vision, language.*Did you mean 'language'"):
        load_config(None, ["training.optimizer.learning_rates.langauge=0.1"])
    config = load_config(None, ["training.optimizer.layer_decay.vision=0.8"])
    assert config.training.optimizer.layer_decay == {"vision": 0.8}
