"""`tutti probe`: from a run's checkpoint to its files, the terminal and the report."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fixtures import squares_data as world
from tutti import pipeline
from tutti.cli.app import app
from tutti.debug.probe import probe_checkpoint
from tutti.report import write_report
from tutti.types import UserError

GRAVE = ("fault", "warning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained for three steps and has been probed."""
    folder = tmp_path_factory.mktemp("probed")
    world.write(folder / "set")
    config = world.config(folder / "set", training={"steps": 3, "schedule": {"kind": "wsd", "warmup": 1}})
    pipeline.train(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def said(run: Path) -> str:
    result = CliRunner().invoke(app, ["probe", str(run)])
    assert result.exit_code == 0, result.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def page_of(run: Path) -> str:
    return re.sub(r"[ \n]+", " ", write_report(run).read_text(encoding="utf-8"))


def test_files_terminal_and_report_say_what_was_found_the_problems_first(run: Path, said: str) -> None:
    probes = json.loads((run / "probes" / "probes.json").read_text())
    assert probes["checkpoint"] == "step-000003"
    assert (probes["executed"], probes["episodes"]) == (2, 15)
    assert (run / "probes" / "occlusion.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "probes").iterdir()) == ["occlusion.png", "probes.json"]
    places = {said.index(" ".join(one["sentence"].split())): one for one in probes["findings"]}
    problems = {place: one["sentence"] for place, one in places.items() if one["severity"] in GRAVE}
    assert any("this model ignores the instruction" in one for one in problems.values()), "after three steps"
    assert max(problems) < min(places.keys() - problems)
    page = page_of(run)
    assert "Does it look and listen?" in page and "What one input alone would do." in page
    assert "Illustrative: which image patches the executed actions come from" in page
    head = html.unescape(page[: page.index("<nav>")]).replace("\xa0", " ")
    assert [one for one in problems.values() if one not in head] == []


def test_report_without_probes_says_how_to_get_them(run: Path, said: str, tmp_path: Path) -> None:
    kept = (run / "probes").rename(tmp_path / "probes")
    try:
        page = page_of(run)
    finally:
        kept.rename(run / "probes")
    assert "ignores the instruction" not in page
    assert "<code>tutti probe RUN</code>" in page


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"findings": 3}', '{"findings": [{"severity": "fault"}, 7]}']
)
def test_foreign_probes_never_stop_the_report(run: Path, said: str, content: str) -> None:
    path = run / "probes" / "probes.json"
    kept = path.read_text()
    try:
        path.write_text(content)
        assert "Does it look and listen?" in page_of(run)
    finally:
        path.write_text(kept)


def test_probing_again_gives_the_same_bytes(run: Path, said: str) -> None:
    before = {path.name: path.read_bytes() for path in (run / "probes").iterdir()}
    assert CliRunner().invoke(app, ["probe", str(run)]).exit_code == 0
    assert {path.name: path.read_bytes() for path in (run / "probes").iterdir()} == before


def test_run_without_a_checkpoint_is_an_error_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    result = CliRunner().invoke(app, ["probe", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "config" in result.output or "checkpoint" in result.output


def test_a_policy_of_several_robots_is_refused_with_the_cure(tmp_path: Path) -> None:
    names = ("dot", "spot")
    sources = [
        {"path": str(world.write(tmp_path / name, world.episodes(6, number))), "embodiment": name}
        for number, name in enumerate(names)
    ]
    section = {"sources": sources, "batch_size": 2, "image_size": 16}
    config = world.config(tmp_path / "dot", data=section, model=world.MODEL, training=world.TRAINING)
    pipeline.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="one robot's actions, and this policy is of dot, spot"):
        probe_checkpoint(tmp_path / "run")
