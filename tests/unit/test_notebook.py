"""The notebook of one training step runs, prints what is stored in it, and is a page of the site."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import notebook
import pytest

from tutti.report.svg.rows import heat_map

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "start" / "one-step.ipynb"


def test_every_cell_runs_and_gives_what_is_stored() -> None:
    """In a process of its own: the type checker of the tests' import hook is not what a reader has."""
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "notebook.py"), str(PAGE), "--check"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_what_the_page_says_of_its_numbers_holds_of_those_that_are_stored() -> None:
    said = "\n".join(
        "".join(one.get("text", ()))
        for cell in json.loads(PAGE.read_text())["cells"]
        for one in cell.get("outputs", ())
    )
    lines = [line.split() for line in said.splitlines() if line]
    moved = {line[0]: (float(line[1]), float(line[3])) for line in lines if line[2:3] == ["->"]}
    names = ("align", "action", "recon", "state")
    rows = {
        line[0]: [float(one) for one in line[1:]] for line in lines if line[0] in names and len(line) == 5
    }
    assert tuple(rows) == names and moved.keys() == {*names, "total"}
    assert moved["total"][1] < moved["total"][0]
    weighted = [float(line[3]) for line in lines if line[0] in names and len(line) == 4 and line[2] != "->"]
    assert sum(weighted) == pytest.approx(moved["total"][0], abs=2e-4)
    assert rows["action"][3] > 0 and all(row[3] == 0 for term, row in rows.items() if term != "action")
    assert rows["align"][0] > 0 and rows["align"][1] > 0 and rows["align"][2] == 0
    assert "to 1e-5: True" in said and "the same weights, to 1e-6: True" in said


def test_a_cell_that_fails_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Text"]},
        {"cell_type": "code", "source": ["x = 1\n", "1 / 0"]},
    ]
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    monkeypatch.chdir(tmp_path)
    assert notebook.main([str(path)]) == 1
    assert "in cell 1 of the notebook" in capsys.readouterr().err


def test_outputs_that_differ_by_more_than_numbers_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.ipynb"
    monkeypatch.chdir(tmp_path)

    def write(source: str) -> None:
        old = json.loads(path.read_text())["cells"][0] if path.exists() else {}
        path.write_text(json.dumps({"cells": [old | {"cell_type": "code", "source": [source]}]}))

    write("print('loss 1.5')\n'last'")
    assert notebook.main([str(path)]) == 0
    stored = json.loads(path.read_text())["cells"][0]["outputs"]
    assert stored[0]["text"] == ["loss 1.5\n"] and stored[1]["data"] == {"text/plain": ["'last'"]}
    write("print('loss  -2.25e-3')\n'last'")
    assert notebook.main([str(path), "--check"]) == 0
    write("print('lost 1.5')\n'last'")
    assert notebook.main([str(path), "--check"]) == 1
    assert "not those that are stored" in capsys.readouterr().out


def test_a_chart_shows_itself_in_a_notebook() -> None:
    chart = heat_map("A < B", ["a"], ["x"], {("a", "x"): (0.7, "tip")})
    drawn = chart._repr_svg_()
    assert drawn.startswith('<svg xmlns="http://www.w3.org/2000/svg" viewBox=') and drawn.endswith("</svg>")
    assert "A &lt; B" in drawn and "70 %" in drawn and 'fill="#fff"' in drawn and "var(--" not in drawn
