"""The smallest whole study: it runs end to end, and killed half way it resumes to the same results."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from fixtures.processes import Command
from tutti.data.formats.lerobot.reader import LeRobotStore

pytestmark = [pytest.mark.slow, pytest.mark.simulation, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "configs" / "studies" / "smoke.yaml"
LIMIT = 400.0
CLOCKED = ("seconds", "milliseconds", "machine")


def start(folder: Path, *arguments: str) -> Command:
    return Command(folder.parent, "compare", str(STUDY), "jobs=1", "--folder", str(folder), *arguments)


def finish(folder: Path, *arguments: str) -> str:
    code, said = start(folder, *arguments).finish(LIMIT)
    assert code == 0, said
    return said


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def without_clock(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in cell.items() if key not in CLOCKED} for cell in results(folder)["cells"]
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing interrupts."""
    folder = tmp_path_factory.mktemp("studies") / "whole"
    finish(folder)
    return folder


def test_study_leaves_tables_costs_every_start_and_ordinary_runs(study: Path) -> None:
    found = results(study)
    assert [(cell["arm"], cell["seed"], cell["steps"]) for cell in found["cells"]] == [
        ("end_to_end", 0, 20),
        ("action_only", 0, 20),
    ]
    first, second = found["cells"]
    assert first["starts"] == {"faucet-open": [1000], "drawer-close": [1000]}
    assert first["samples"] == 160 and first["milliseconds"] > 0
    assert set(first["held_out"]) >= {"action", "state"} and set(second["held_out"]) == {"action"}
    assert found["costs"]["action_only"]["flops"] < found["costs"]["end_to_end"]["flops"]
    assert found["scores"][1]["against"]["verdict"] == "unresolved" and found["missing"] == []
    assert len(LeRobotStore(study / "recorded" / "dataset").episodes) == 6
    assert "unresolved" in (study / "report.html").read_text()
    assert (study / "results.md").read_text().startswith("# Study smoke")
    cells = sorted((study / "cells").iterdir())
    assert len(cells) == 2
    for cell in cells:
        assert (cell / "evaluation" / "results.json").is_file()
        assert json.loads((cell / "stages.json").read_text())["evaluate"]["finished"]


def test_killed_half_way_it_resumes_to_the_same_results(study: Path, tmp_path: Path) -> None:
    """In a copy of the study that lacks one cell."""
    folder = shutil.copytree(study, tmp_path / "killed", symlinks=True)
    (done,) = folder.glob("cells/end_to_end-*")
    shutil.rmtree(done)
    assert start(folder).stop_at(done, "checkpoints/step-000010", signal.SIGKILL, LIMIT)[0] == -signal.SIGKILL
    assert not (done / "result.json").exists()
    assert "2 cells, 1 found, 1 to do" in finish(folder)
    assert without_clock(folder) == without_clock(study)
    assert results(folder)["scores"] == results(study)["scores"]


def test_further_starts_play_again_but_do_not_train_again(study: Path) -> None:
    weights = {path: path.stat().st_mtime_ns for path in study.glob("cells/*/checkpoints/step-000020/*")}
    assert "2 cells, 0 found, 2 to do" in finish(study, "evaluation.episodes=2")
    assert results(study)["cells"][0]["starts"]["faucet-open"] == [1000, 1001]
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
