"""The page on 20 demonstrations: its files and its commands run as they are printed, on toy data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fixtures import squares_data as world
from fixtures import vlms
from tutti.cli.app import app
from tutti.nested_dicts import merge

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-robot.md"
TOY = {
    "data": {"horizon": 4, "image_size": 16, "batch_size": 2},
    "model": world.MODEL,
    "objective": {"recon": None, "state": {"offsets": [2]}},
    "training": {key: value for key, value in world.TRAINING.items() if key != "steps"},
    "evaluation": {"suite": "none"},
}


def run_block(page: str, number: int, lines: int) -> None:
    block = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[number]
    commands = [line.split() for line in block.splitlines()]
    assert len(commands) == lines and all(words[0] == "tutti" for words in commands)
    for words in commands:
        found = CliRunner().invoke(app, words[1:])
        assert found.exit_code == 0, (words, found.output[-2000:])


def test_its_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    world.write(tmp_path / "my" / "many", world.episodes(6))
    world.write(tmp_path / "my" / "robot", world.episodes(4))
    page = PAGE.read_text(encoding="utf-8")
    pretrain, robot = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[:2])
    pretrain["training"]["steps"], robot["training"]["steps"] = 4, 10
    robot["data"]["validation_fraction"] = 0.25
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(merge(pretrain, TOY)))
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(robot))
    run_block(page, 0, 4)
    taken = json.loads((tmp_path / "runs" / "my-robot" / "init_from.json").read_text())["counts"]
    assert taken["taken"] > 30 and taken["another shape"] == 0
    assert (tmp_path / "my-robot-policy").is_dir()


def test_a_pi0_of_another_robot_is_fine_tuned_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny stand-ins for the folders, and the page's own list of what may differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    world.write(tmp_path / "my" / "robot", world.episodes(4))
    vlms.save_vlm(tmp_path / "weights" / "paligemma", "paligemma")
    (tmp_path / "weights" / "paligemma" / "model.safetensors").unlink()
    vlms.save_pi0(tmp_path / "weights" / "pi0_base")
    page = PAGE.read_text(encoding="utf-8")
    given = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[2])
    small = {
        "data": {"horizon": 4, "batch_size": 2, "validation_fraction": 0.25},
        "evaluation": {"suite": "none"},
    }
    small |= {
        "model": {"action": {"width": 12, "hidden": 20}},
        "training": {"steps": 4, "schedule": {"kind": "wsd", "warmup": 1}},
    }
    (tmp_path / "pi0.yaml").write_text(yaml.safe_dump(merge(given, small)))
    run_block(page, 1, 2)
    told = json.loads((tmp_path / "runs" / "my-pi0" / "init_from.json").read_text())
    assert told["counts"]["taken"] > 130 and told["counts"]["another shape"] == 4
    assert (tmp_path / "my-pi0-policy").is_dir()
