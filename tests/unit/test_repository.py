"""What a stranger finds around the code: how to cite, what CI runs, what an issue asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import tutti
from tutti.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (tutti.__version__, PROJECT["license"])
    assert citation["keywords"] == PROJECT["keywords"]


def test_ci_runs_the_gate_on_every_python_that_the_package_names() -> None:
    (job,) = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values()
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == named
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_issue_forms_ask_for_what_there_is() -> None:
    commands = {command.__name__.replace("_", "-") for command in COMMANDS} | {"data"}
    forms = {form.stem: read(form) for form in FORMS if form.stem != "config"}
    assert set(forms) == {"bug", "feature", "question"}
    for name, form in forms.items():
        assert {"name", "description", "body"} <= form.keys(), name
        parts = [part["id"] for part in form["body"]]
        assert len(set(parts)) == len(parts) and all(part["attributes"]["label"] for part in form["body"])
        assert {*re.findall(r"`tutti ([a-z-]+)", str(form))} <= commands
    template = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    assert len(template.splitlines()) == 5
