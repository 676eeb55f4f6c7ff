"""Trainings of a whole vision-language model: resumed to the bit, exported without its folder, planned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from fixtures import run_equality, squares_data
from fixtures.squares_data import TRAINING
from fixtures.towers import SIZE
from fixtures.vlms import save_vlm
from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config
from tutti.data.formats.lerobot.writer import write_lerobot
from tutti.debug.tower_checks import check_towers
from tutti.planning.footprint import fake_update
from tutti.runs.build import build_training, expected_spec
from tutti.serving.export import export_policy
from tutti.serving.policy import Policy
from tutti.storage.checkpoint import find_checkpoint


def config_of(home: Path, kind: str = "smolvlm", learn: Any = "none", **training: Any) -> RunConfig:
    return build_config(
        {
            "name": "vlm",
            "data": {
                "sources": [{"path": str(home / "data")}],
                "horizon": 4,
                "batch_size": 2,
                "image_size": SIZE,
                "validation_fraction": 0.3,
                "prefetch": 0,
            },
            "model": {
                "vlm": {"path": str(home / kind), "learn": learn, "layers": 3},
                "action": {"kind": "flow", "width": 8, "depth": 2, "heads": 2, "cross_attention": "layers"},
            },
            "training": TRAINING | training,
        },
        "vlm",
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a VLM, and a run of 4 steps with its LoRA factors."""
    home = tmp_path_factory.mktemp("home")
    made = squares_data.episodes(6)
    write_lerobot(home / "data", made, fps=10, views=tuple(made[0].images), robot_type="dot")
    save_vlm(home / "smolvlm", "smolvlm")
    pipeline.train(config_of(home, learn={"lora": 2}), home / "run")
    return home


def act(policy: Policy) -> np.ndarray:
    views = {view: np.full((20, 20, 3), 40 * n, np.uint8) for n, view in enumerate(policy.spec.views)}
    return policy.predict(views, np.zeros(2, np.float32), "go to the red square")


def test_a_resumed_run_is_the_run_without_a_break(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(find_checkpoint(tmp_path / "run"))
    assert find_checkpoint(tmp_path / "run").name == "step-000002"
    build_training(config_of(home, learn={"lora": 2}), tmp_path / "run").fit()
    assert run_equality.unequal(*map(run_equality.content, (home / "run", tmp_path / "run"))) == []


def test_a_checkpoint_has_the_hash_and_an_export_has_the_weights(home: Path, tmp_path: Path) -> None:
    saved = find_checkpoint(home / "run")
    names = [name for name in load_file(saved / "model.safetensors") if ".tower." in name]
    assert names and all(name.endswith((".down", ".up")) for name in names)
    section = yaml.safe_load((saved / "config.yaml").read_text())["model"]["vlm"]
    assert section["architecture"]["model_type"] == "smolvlm" and len(section["sha256"]) == 64
    policy = Policy.load(home / "run")
    export_policy(home / "run", tmp_path / "export")
    away = home / "away"
    (home / "smolvlm").rename(away)
    try:
        exported = Policy.load(tmp_path / "export")
        np.testing.assert_allclose(act(exported), act(policy), atol=1e-5)
        assert not any(name.endswith(".down") for name, _ in exported.model.named_parameters())
    finally:
        away.rename(home / "smolvlm")


def test_a_plan_counts_a_vlm_and_the_doctor_names_its_parts(home: Path, tmp_path: Path) -> None:
    parts = []
    for learn in ("none", "all"):
        config = config_of(home, learn=learn)
        with fake_update(config, expected_spec(config)) as (trial, memory):
            trial.peaks(memory, 1)
            parts.append(trial.parts())
    frozen, full = parts
    assert frozen.parameters == full.parameters and full.weights == frozen.weights
    tower = full.trainable - frozen.trainable
    assert full.gradients - frozen.gradients == full.ema - frozen.ema == 4 * tower > 0

    training = build_training(config_of(home, learn="all"), home / "run", output=tmp_path)
    lines, findings = check_towers(training, training.data.train.batch_at(0))
    assert "54 tensors loaded, none missing, 10 not read (lm_head.weight" in lines[0]
    assert lines[1].startswith(
        "vision: 8 picture tokens found, 2 views x 4; pictures of 16 px (the tower's: 16)"
    )
    assert lines[3].startswith("language: the longest instruction has 7 tokens, 64 are read")
    assert lines[5].startswith("fusion: 3 blocks of width 16 over 8 picture tokens, up to 16 of text, which")
    assert [(one.kind, one.part) for one in findings] == [
        ("tower_rate", part) for part in ("vision", "language", "fusion")
    ]
