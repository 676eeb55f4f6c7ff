"""Averages of the weights, which are served: the EMA by its formula, schedule-free AdamW by the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fixtures.checkpoints import load_latest
from fixtures.run_equality import differing, killed_and_resumed
from fixtures.toy_training import Data, config, make_trainer
from tutti.training.optim.averages import Ema, ScheduleFreeAdamW, ema_decay
from tutti.training.records import read_records
from tutti.training.strategy import Phase, PhasesConfig


class Parts(nn.Module):
    """A parameter, one that is used under two names, one of whole numbers, and two buffers."""

    mean: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.first = nn.Linear(2, 1).double()
        self.second = self.first
        self.places = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
        self.register_buffer("mean", torch.tensor(0.5))
        self.register_buffer("count", torch.tensor(7))


@pytest.mark.parametrize(
    ("decay", "updates", "expected"),
    [(0.9, 0, 0.1), (0.9, 1, 2 / 11), (0.9, 79, 80 / 89), (0.9, 80, 0.9), (0.999, 80, 0.9), (0.05, 0, 0.05)],
)
def test_the_decay_rises_to_its_value(decay: float, updates: int, expected: float) -> None:
    assert ema_decay(decay, updates) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.9, 0.13])
def test_the_average_is_that_of_the_formula(decay: float) -> None:
    """Far from one half, so that the old and the new weights cannot be swapped."""
    module = Parts()
    average = Ema(module, decay)
    expected = module.weight.detach().clone()
    shared = module.first.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            module.weight.add_(torch.tensor([0.25 * (step + 1), -1.0]))
            module.first.weight.add_(1.0)
        average.update()
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * module.weight.detach()
        shared = d * shared + (1 - d) * module.first.weight.detach()
    assert torch.allclose(average.shadow["weight"], expected, rtol=1e-12, atol=0)
    for name in ("first.weight", "second.weight"):  # one parameter under two names
        assert torch.allclose(average.shadow[name], shared, rtol=1e-12, atol=0)
    assert average.updates == 5
    assert not torch.allclose(average.shadow["weight"], module.weight.detach(), rtol=1e-3)


def test_what_is_no_number_of_the_model_is_copied_and_no_view_of_it() -> None:
    module = Parts()
    average = Ema(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(9.0)
        module.places.add_(10)
        module.mean.add_(1.0)
        module.count.add_(1)
    assert average.shadow["weight"].tolist() == [1.0, -2.0] and float(average.shadow["mean"]) == 0.5
    average.update()
    for name in ("places", "mean", "count"):
        assert torch.equal(average.shadow[name], module.state_dict()[name])


def test_inside_the_block_the_module_has_the_average_and_afterwards_its_own() -> None:
    module = Parts()
    average = Ema(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update()
    own = {name: value.clone() for name, value in module.state_dict().items()}
    kept = {name: value.clone() for name, value in average.shadow.items()}
    with pytest.raises(KeyError), average.applied():
        assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
        assert not torch.equal(module.weight, own["weight"])
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in average.shadow.items())


def test_a_saved_average_goes_on_where_it_was() -> None:
    module = Parts()
    first, second = Ema(module, 0.9), Ema(module, 0.9)
    for _ in range(3):
        with torch.no_grad():
            module.weight.mul_(1.5)
        first.update()
    second.load({name: value.clone() for name, value in first.shadow.items()}, first.updates)
    for average in (first, second):
        with torch.no_grad():
            module.weight.copy_(torch.tensor([5.0, 6.0]))
        average.update()
    assert torch.equal(first.shadow["weight"], second.shadow["weight"])
    assert first.updates == second.updates == 4


SETTINGS: dict[str, Any] = {
    "optimizer": {"kind": "schedule_free"},
    "schedule": {"kind": "constant", "warmup": 3},
    "ema": "off",
}


def test_it_follows_the_recursion_of_the_paper() -> None:
    """On f(w) = |A w - b|^2 / 2 in float64, with a warm-up; x and y as the paper writes them."""
    torch.manual_seed(0)
    matrix, target = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([parameter], betas=(0.8, 0.99), weight_decay=0.1)
    x, z = parameter.detach().clone(), parameter.detach().clone()
    square, weights = torch.zeros_like(x), 0.0
    for step in range(1, 30):
        rate = 0.1 * min(1.0, step / 5)
        y = (1 - 0.8) * z + 0.8 * x
        assert torch.allclose(parameter, y, rtol=0, atol=1e-13)
        g = matrix.T @ (matrix @ y - target)
        square = 0.99 * square + 0.01 * g**2
        z = z - rate * (g / ((square / (1 - 0.99**step)).sqrt() + 1e-8) + 0.1 * y)
        weights += rate**2
        c = rate**2 / weights
        x = (1 - c) * x + c * z
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (matrix @ parameter - target).square().sum().div(2).backward()
        optimizer.step()
        with optimizer.averaged():
            assert torch.allclose(parameter, x, rtol=0, atol=1e-13)
    assert float((matrix.T @ (matrix @ x - target)).norm()) < 0.5 * float((matrix.T @ target).norm())


def test_at_a_constant_rate_x_is_the_mean_of_the_iterates() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([parameter], lr=0.1)
    seen: list[torch.Tensor] = []
    for step in range(6):
        parameter.grad = torch.tensor([1.0, (-1.0) ** step], dtype=torch.float64)
        optimizer.step()
        seen.append(optimizer.state[parameter]["z"].clone())
    assert torch.allclose(optimizer.state[parameter]["x"], torch.stack(seen).mean(0), atol=1e-12)


def test_a_checkpoint_holds_x_and_validation_measures_it(tmp_path: Path) -> None:
    often = make_trainer(tmp_path / "a", validation={"every": 1, "raw": True}, **SETTINGS)
    never = make_trainer(tmp_path / "b", validation={"every": 0}, **SETTINGS)
    often.fit(Data())
    never.fit(Data())
    saved = load_latest(tmp_path / "a")
    assert saved is not None and set(saved.tensors) == {"model", "objective"}
    state = often.optimizer.optimizers["schedule_free"].state
    for name, parameter in often.model.named_parameters():
        assert torch.equal(saved.tensors["model"][name], state[parameter]["x"]), name
        assert torch.equal(parameter, never.model.get_parameter(name)), name  # looks change nothing
    assert any(not torch.equal(saved.tensors["model"][n], p) for n, p in often.model.named_parameters())
    last = [r for r in read_records(tmp_path / "a") if r["kind"] == "validation"][-1]
    assert last["valid/total"] != last["valid_raw/total"]


@pytest.mark.parametrize("freezing", [False, True])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, freezing: bool) -> None:
    """Also where a part (the test model's state encoder) has no state yet at the checkpoint."""
    settings: dict[str, Any] = dict(SETTINGS)
    if freezing:
        phases = (Phase(name="first", share=3, learning_rates={"action": 0.0}), Phase(name="all", share=1))
        settings["strategy"] = PhasesConfig(list=phases)
    make_trainer(tmp_path / "straight", **settings).fit(Data())
    killed_and_resumed(tmp_path / "killed", (13,), **settings)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []


@pytest.mark.parametrize("changes", [{"ema": 0.99}, {"schedule": {"kind": "wsd", "warmup": 3}}])
def test_an_average_or_a_decay_besides_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"Set training\.ema=off and training\.schedule\.kind=constant"):
        config(**(SETTINGS | changes))
