"""Schedule-free AdamW: the paper's recursion, the switch between y and x, resume, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fixtures.checkpoints import load_latest
from fixtures.run_equality import differing, killed_and_resumed
from fixtures.toy_training import Data, config, make_trainer
from tutti.training.optim.schedule_free import ScheduleFreeAdamW
from tutti.training.records import read_records
from tutti.training.strategy import Phase, PhasesConfig

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


def test_a_look_at_x_gives_y_back_to_the_last_bit() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50))
    optimizer = ScheduleFreeAdamW([parameter], lr=0.3)
    for _ in range(4):
        parameter.grad = torch.randn(50)
        optimizer.step()
    own = parameter.detach().clone()
    with optimizer.averaged():
        assert not torch.equal(parameter, own)
    assert torch.equal(parameter, own)


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


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    settings = SETTINGS | {"optimizer": {"kind": "schedule_free", "lr": 0.03}}
    make_trainer(tmp_path, steps=80, **settings).fit(Data())
    train = [r for r in read_records(tmp_path) if r["kind"] == "train"]
    assert train[-1]["loss/action/raw"] < 0.6 * train[0]["loss/action/raw"]
    assert train[-1]["optim/lr"] == pytest.approx(0.03)


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
