"""The doctor: a healthy run passes, and each of five planted faults is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from fixtures import squares_data as world
from fixtures.small_model import relist
from tutti import pipeline
from tutti.cli.app import app
from tutti.config.run_config import RunConfig, to_yaml
from tutti.data.checks.ridge import leak_findings, measure_leak
from tutti.debug import doctor
from tutti.debug.doctor import Diagnosis, examine, run_doctor
from tutti.models.interfaces import VisionEncoder
from tutti.runs.build import build_data, build_training
from tutti.types import Tokens, UserError

UPDATES = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the healthy data set, and the run's folder beside it."""
    folder = tmp_path_factory.mktemp("checkup")
    world.write(folder / "set")
    return folder


@pytest.fixture(scope="module")
def healthy(home: Path) -> Diagnosis:
    return run_doctor(world.config(home / "set"), home / "run", updates=UPDATES)


def command(home: Path, config: RunConfig, name: str) -> tuple[int, str]:
    path = home / f"{name}.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    arguments = ["doctor", str(path), "--run", str(home / name), "--updates", "2"]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def about(found: Diagnosis, word: str) -> list[str]:
    return [finding.text for finding in found.problems if finding.kind == word]


def test_healthy_run_has_no_problem_and_ends_with_0(
    healthy: Diagnosis, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert healthy.problems == ()
    assert healthy.text is not None and healthy.text.accuracy > 0.75
    assert not (home / "run").exists(), "it leaves nothing there"
    assert 0.4 < healthy.text.by_chance < 0.6
    monkeypatch.setattr(doctor, "run_doctor", lambda *given, **options: healthy)
    code, said = command(home, world.config(home / "set"), "healthy")
    assert (code, "Nothing is wrong." in said) == (0, True), said


def test_every_part_is_reached_and_shares_are_read_at_the_training_s_start_and_end(
    healthy: Diagnosis,
) -> None:
    ((phase, table),) = healthy.reach
    assert phase == "joint"
    assert {"vision", "language", "fusion", "action"} <= set.union(*(table.reached(t) for t in table.terms))
    for shares in healthy.shares:
        for kind in ("update_share", "share"):
            assert all(sum(own.values()) == pytest.approx(1) for own in shares.by_part(kind).values())
    start, end = healthy.shares
    assert start.lambdas == pytest.approx({"align": 0.1, "action": 1.0, "recon": 0.1, "state": 0.3})
    assert set(end.lambdas) == {"action", "recon", "state"}, "align has ended"
    assert f"after {UPDATES} updates" in end.when


class Detached(VisionEncoder):
    """The planted fault: its output is cut off from what made it."""

    def __init__(self, inner: VisionEncoder) -> None:
        super().__init__()
        self.inner = inner
        self.width, self.tokens_per_view = inner.width, inner.tokens_per_view

    def forward(self, images: Tensor, image_mask: Tensor) -> Tokens:
        tokens = self.inner(images, image_mask)
        return Tokens(values=tokens.values.detach(), mask=tokens.mask)


def test_detached_vision_is_named(home: Path) -> None:
    config = world.config(home / "set")
    training = build_training(config, home / "run", output=home / "trial")
    training.model.vision = Detached(training.model.vision)
    found = examine(training, updates=0)
    (text,) = about(found, "reach")
    assert text.startswith("Vision gets no gradient from any term")


def test_term_that_moves_nothing_is_named(home: Path) -> None:
    config = world.config(home / "set", objective={"align": {"stop_gradient": ["vision", "language"]}})
    training = build_training(config, home / "run", output=home / "trial")
    found = examine(training, updates=0)
    (text,) = about(found, "reach")
    assert text.startswith("Term 'align' moves only its own head")


def shuffled(seed: int) -> list[Any]:
    made = world.episodes()
    order = np.random.default_rng(seed).permutation(len(made))
    return [replace(one, instruction=made[order[i]].instruction) for i, one in enumerate(made)]


def test_shuffled_text_is_named(tmp_path: Path) -> None:
    world.write(tmp_path / "set", shuffled(0))
    code, said = command(tmp_path, world.config(tmp_path / "set"), "shuffled")
    assert code == 1
    assert "! No link of instruction and actions was found in" in said
    assert "Is the text shuffled?" in said
    assert "1 problem, marked with !" in said


def test_lambda_a_hundred_times_too_high_is_named_with_a_better_one(home: Path) -> None:
    config = world.config(home / "set", objective={"state": {"weight": 30.0}})
    found = run_doctor(config, home / "run", updates=UPDATES)
    (text,) = about(found, "dominates")
    assert "state makes" in text and "Its weight (30) is likely too high" in text
    advised = float(re.search(r"objective.state.weight=([\d.e-]+)", text).group(1))  # pyright: ignore[reportOptionalMemberAccess]
    assert advised < 3.0
    assert len(found.problems) == 1


@pytest.mark.parametrize("how", ["all weights 0", "biases below every ReLU"])
def test_dead_encoder_is_named(home: Path, how: str) -> None:
    config = world.config(home / "set")
    training = build_training(config, home / "run", output=home / "trial")
    with torch.no_grad():
        for name, parameter in training.model.vision.named_parameters():
            if how == "all weights 0":
                parameter.zero_()
            elif "stem" in name and name.endswith("norm.bias"):
                parameter.fill_(-100)
    found = examine(training, updates=2)
    texts = about(found, "dead_units")
    for when in ("At initialisation", "After 2 updates"):
        assert any(text.startswith(f"{when}: 100 % of the units of the vision tokens are") for text in texts)


def test_dead_encoder_of_the_newest_checkpoint_is_named(home: Path) -> None:
    config = world.config(home / "set", training={"steps": 3, "schedule": {"kind": "wsd", "warmup": 1}})
    folder = pipeline.train(config, home / "trained")
    tensors = load_file(folder / "model.safetensors")
    dead = {name: value - 100 * ("stem" in name and "norm.bias" in name) for name, value in tensors.items()}
    save_file(dead, folder / "model.safetensors")
    relist(folder)
    found = run_doctor(config, home / "trained", updates=0)
    texts = about(found, "dead_units")
    assert any(text.startswith("In step-000003: 100 % of the units of the vision tokens") for text in texts)


def test_leak_through_the_state_is_named(tmp_path: Path) -> None:
    """The state holds the action that is recorded with it."""
    leaking = [replace(e, states=np.concatenate([e.states, e.actions], axis=1)) for e in world.episodes(24)]
    world.write(tmp_path / "set", leaking)
    (finding,) = leak_findings(measure_leak(build_data(world.config(tmp_path / "set"), tmp_path)))
    assert finding.is_problem
    assert finding.text.startswith("A linear map from the state gives the next action with R2 1.0000")
    assert "the state leaks the action" in finding.text


def test_no_data_is_said_with_the_cure(tmp_path: Path) -> None:
    config = world.config(tmp_path / "nothing", data={"sources": []})
    with pytest.raises(UserError, match="Record first"):
        run_doctor(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_part_that_every_phase_freezes_is_a_hint(home: Path) -> None:
    phase = {"name": "only", "share": 1, "learning_rates": {"vision": 0.0}}
    config = world.config(home / "set", strategy={"kind": "phases", "list": [phase]})
    found = run_doctor(config, home / "run", updates=0)
    assert found.problems == ()
    assert [finding.text for finding in found.findings if finding.kind == "always_frozen"] == [
        "Vision never learns: the strategy freezes it throughout."
    ]


def test_rate_that_explodes_is_named(home: Path) -> None:
    optimizer = {"kind": "adamw", "lr": 1e30}
    training = {
        "optimizer": optimizer,
        "gradients": {"clip_norm": "off"},
        "schedule": {"kind": "wsd", "warmup": 0},
    }
    found = run_doctor(world.config(home / "set", training=training), home / "run", updates=5)
    (text,) = about(found, "not_finite")
    assert "is not finite" in text and "training.optimizer.lr" in text
