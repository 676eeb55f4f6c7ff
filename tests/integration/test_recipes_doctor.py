"""Every shipped recipe of a vision-language model passes the doctor with tiny stand-ins for its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import squares_data as world
from fixtures.vlms import save_vlm
from tutti.config.run_config import RunConfig, load_config
from tutti.debug.doctor import Diagnosis, examine, print_diagnosis, run_doctor
from tutti.debug.gradient_checks import phase_tables
from tutti.debug.tower_checks import check_towers
from tutti.runs.build import BuiltTraining, build_training
from tutti.types import Tokens

CONFIGS = Path(__file__).parents[2] / "configs" / "vlm"
SMALL = {"model.action.width": 32, "model.action.depth": 2, "model.action.heads": 4}
PROMPTS = ("In", ":", "What", "action", "should", "robot", "take", "?", "Out", "Task", ";")
RECIPES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # its stand-in, what is smaller than in the recipe, the decoder's blocks, what the doctor hints at
    "smolvla-like": ("smolvlm", {"model.vlm.layers": 3, **SMALL}, "3 blocks", "model.vlm.learn is none."),
    "pi0-like": (
        "paligemma",
        {"model.action.width": 8},
        "4 blocks",
        "vision, language, fusion are pre-trained",
    ),
    "pi0-fast-like": (
        "paligemma",
        {"model.action.vocabulary_size": 20, "model.action.skip": 1, "model.action.scale": 1},
        "4 blocks",
        "vision, language, fusion are pre-trained",
    ),
    "openvla-oft-like": ("paligemma", {}, "4 blocks", ""),
    "flower-like": ("smolvlm", {"model.vlm.layers": 2, **SMALL}, "2 blocks", "vision, language, fusion are"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    world.write(home / "data", world.episodes(8))
    for kind in ("smolvlm", "paligemma"):
        save_vlm(home / kind, kind)
        path = home / kind / "tokenizer.json"
        said = json.loads(path.read_text())
        known = said["model"]["vocab"]
        known |= {word: len(known) + n for n, word in enumerate(PROMPTS) if word not in known}
        path.write_text(json.dumps(said))
    return home


def config_of(home: Path, recipe: str) -> RunConfig:
    kind, small, _, _ = RECIPES[recipe]
    given = {"data.batch_size": 8, "data.horizon": 8, "data.prefetch": 0, "training.threads": 1, **small}
    given |= {"model.vlm.path": home / kind, "data.sources": f"[{{path: {home / 'data'}}}]"}
    return load_config(CONFIGS / f"{recipe}.yaml", [f"{key}={value}" for key, value in given.items()])


def test_all_recipes_are_known_and_say_what_they_differ_in() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*RECIPES}
    for recipe in RECIPES:
        head = (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8")
        assert "# Alike: " in head and "# Differs: " in head and "by us." in head


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_doctor_accepts_a_recipe(home: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables for every part, lines on tower, tokens and texts, and no problem."""
    _, _, blocks, hint = RECIPES[recipe]
    config = config_of(home, recipe)
    found: Diagnosis = run_doctor(config, home / recipe, updates=2)
    assert found.problems == (), [one.text for one in found.problems]
    print_diagnosis(found)
    lines, said = "\n".join(found.towers), capsys.readouterr().out
    tokens = 4 if "smolvlm" in str(config.model.vlm) else 16
    assert f"{2 * tokens} picture tokens found, 2 views x {tokens}" in lines and "none missing" in lines
    told = {"pi0-fast-like": 10, "openvla-oft-like": 19}.get(recipe, 7)  # with the recipe's own template
    assert f"the longest instruction has {told} tokens" in lines and "0.0 % of all stand for" in lines
    assert f"fusion: {blocks} of width 16 over {2 * tokens} picture tokens" in lines
    assert lines.splitlines()[-1].startswith("Learning parameters: vision ")
    assert "Reach, phase 'joint'" in said and "Nothing is wrong." in said
    assert hint in " ".join(said.split()), said
    hints = [one.kind for one in found.findings]
    assert hints.count("tower_rate") == (recipe in ("pi0-like", "pi0-fast-like", "flower-like"))
    assert ("action: a new expert with random weights" in lines) == (recipe == "pi0-like")


def built(home: Path, tmp_path: Path) -> BuiltTraining:
    return build_training(config_of(home, "openvla-oft-like"), home / "run", output=tmp_path)


def test_pictures_that_reach_nobody_are_an_alarm(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of exactly 0 in the vision tower while pictures are there, as where no token of the sequence
    is that of a picture; and picture tokens that are lost on their way."""
    training = built(home, tmp_path)
    batches = [training.data.train.batch_at(n) for n in range(4)]
    assert all(bool(one.observation.image_mask.all()) for one in batches)
    (hint,) = phase_tables(training, batches)[1]
    assert (
        hint.sentence
        == "Language never learns: model.vlm.learn is lora, which is for linear layers of blocks."
    )
    assert check_towers(training, batches[0])[1] == []
    vision: Any = training.model.vision
    forward = vision.forward

    def ignored(images: torch.Tensor, image_mask: torch.Tensor) -> Tokens:
        tokens = forward(images, image_mask)
        return replace(tokens, values=torch.zeros_like(tokens.values) + 0 * tokens.values)

    monkeypatch.setattr(vision, "forward", ignored)
    faults = [one.sentence for one in examine(training, updates=0).problems if one.kind == "reach"]
    assert len(faults) == 1 and faults[0].startswith("Vision gets no gradient from any term")
    assert "exactly zero on this batch" in faults[0]

    def lost(images: torch.Tensor, image_mask: torch.Tensor) -> Tokens:
        tokens = forward(images, image_mask)
        return Tokens(values=tokens.values[:, :20], mask=tokens.mask[:, :20])

    monkeypatch.setattr(vision, "forward", lost)
    lines, findings = check_towers(training, batches[0])
    assert "20 picture tokens found, 2 views x 16" in lines[1]
    assert [(one.kind, one.severity) for one in findings] == [("picture_tokens", "fault")]
    assert findings[0].sentence == "20 picture tokens reach the fusion; expected 32."
