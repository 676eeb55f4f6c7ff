"""The smallest whole study: it runs end to end, and killed half way it resumes to the same results."""

from __future__ import annotations

import json
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


def test_study_leaves_tables_costs_and_every_start(study: Path) -> None:
    found = results(study)
    assert [(cell["arm"], cell["seed"], cell["steps"]) for cell in found["cells"]] == [
        ("end_to_end", 0, 20),
        ("action_only", 0, 20),
    ]
    assert found["cells"][0]["starts"] == {"faucet-open": [1000], "drawer-close": [1000]}
    assert found["cells"][0]["samples"] == 160 and found["cells"][0]["milliseconds"] > 0
    assert set(found["cells"][0]["held_out"]) >= {"action", "state"}
    assert set(found["cells"][1]["held_out"]) == {"action"}
    assert found["costs"]["action_only"]["flops"] < found["costs"]["end_to_end"]["flops"]
    assert found["scores"][1]["against"]["verdict"] == "unresolved"
    assert found["missing"] == []
    assert len(LeRobotStore(study / "recorded" / "dataset").episodes) == 6
    assert "unresolved" in (study / "report.html").read_text()
    assert (study / "results.md").read_text().startswith("# Study smoke")


def test_cells_are_ordinary_runs_that_share_one_cache(study: Path) -> None:
    cells = sorted((study / "cells").iterdir())
    assert len(cells) == 2
    for cell in cells:
        assert (cell / "cache").resolve() == (study / "cache").resolve()
        assert (cell / "evaluation" / "results.json").is_file()
        assert json.loads((cell / "stages.json").read_text())["evaluate"]["finished"]


def test_killed_half_way_it_resumes_to_the_same_results(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    pattern = "cells/end_to_end-*/checkpoints/step-000010"
    assert start(folder).stop_at(folder, pattern, signal.SIGKILL, LIMIT)[0] == -signal.SIGKILL
    assert not list(folder.glob("cells/*/result.json"))
    assert "2 cells, 0 found, 2 to do" in finish(folder)
    assert without_clock(folder) == without_clock(study)
    assert results(folder)["scores"] == results(study)["scores"]


def test_finished_study_is_found_again_and_reported_without_running(study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (study / "cells").glob("*/result.json")}
    assert "2 cells, 2 found, 0 to do" in finish(study)
    assert "report.html" in finish(study, "--report-only")
    assert {path: path.stat().st_mtime_ns for path in (study / "cells").glob("*/result.json")} == before


def test_further_starts_play_again_but_do_not_train_again(study: Path) -> None:
    weights = {
        path: path.stat().st_mtime_ns for path in (study / "cells").glob("*/checkpoints/step-000020/*")
    }
    finish(study, "evaluation.episodes=2")
    assert results(study)["cells"][0]["starts"]["faucet-open"] == [1000, 1001]
    assert {
        path: path.stat().st_mtime_ns for path in (study / "cells").glob("*/checkpoints/step-000020/*")
    } == weights
