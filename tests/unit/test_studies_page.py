"""A study's three files: tables in each of them, every start kept, and nothing unescaped."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fixtures.studies import cell, found, make_study, trained
from tutti.report.blocks import Cell, Table, markdown
from tutti.report.svg.rows import ForestRow, forest_chart
from tutti.studies.costs import StepCost
from tutti.studies.page import publish
from tutti.studies.scores import score_study
from tutti.studies.tables import Findings, difference_table, show

HALF, NONE, ALL = [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]
HOSTILE = "training.seed0=<script>alert('x')</script>"
MADE: dict[str, Any] = {
    "command": "tutti compare <b>study.yaml</b>",
    "commit": "abc",
    "machine": {"processor": "one & only", "cores": 2, "system": "Linux"},
    "versions": {"python": "3.11", "torch": "2.13"},
    "load": 0.5,
}
VOID = {"meta", "br", "img", "input", "circle", "line", "rect", "polyline", "link", "hr"}


class Balanced(HTMLParser):
    """Counts what is open; every element that may not be left open must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.stack.pop() == tag, tag


def findings(**changes: Any) -> Findings:
    study = make_study(
        seeds=3,
        episodes_per_task=[2, "all"],
        arms={"end_to_end": [], "action_only": ["strategy.kind=action_only"], "other": [HOSTILE]},
    )
    wins = {"end_to_end": [HALF, ALL, NONE], "action_only": [ALL, ALL, ALL], "other": [NONE, NONE, HALF]}
    results = found(
        *(
            trained(arm, seed, bits, HALF, level=level)
            for level in (2, "all")
            for arm, rows in wins.items()
            for seed, bits in enumerate(rows)
        )
    )
    results.pop(cell("other", 2, "all"))
    costs = {arm: StepCost(flops=3e9, samples=4, parameters=1200) for arm in study.arms}
    values: dict[str, Any] = {
        "study": study,
        "data": "d0",
        "costs": costs,
        "found": results,
        "missing": [cell("other", 2, "all")],
        "scores": score_study(study, results),
    }
    return Findings(**(values | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("study")
    publish(findings(), made, MADE)
    return made


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_is_whole_and_fetches_nothing(html: str) -> None:
    page = Balanced()
    page.feed(html)
    assert page.stack == []
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1
    assert "default-src 'none'" in html


def test_what_the_study_says_is_escaped(html: str) -> None:
    assert "<script>alert" not in html and "<b>study.yaml</b>" not in html
    assert "&lt;script&gt;alert" in html and "one &amp; only" in html


def test_page_has_a_forest_and_every_table_for_each_level(html: str) -> None:
    assert html.count("points of success, minus end_to_end") == 4, "one for wide and one for narrow windows"
    for words in ("Minus end_to_end, 2 demonstrations a task", "Against end_to_end, all demonstrations"):
        assert words in html
    for section in ("differences", "success", "tasks", "cost", "held-out", "protocol", "reproduce"):
        assert f'<section id="{section}">' in html
    assert "Tutti: report of a study" in html and "17 of 18" in html
    assert "1 of 18 cells are missing: other, all demonstrations, seed 2." in html


def test_results_hold_every_start_of_every_cell(folder: Path) -> None:
    kept = json.loads((folder / "results.json").read_text())
    assert len(kept["cells"]) == 17
    assert kept["cells"][0]["successes"] == {"reach": HALF, "push": HALF}
    assert kept["cells"][0]["starts"] == {"reach": [0, 1, 2, 3], "push": [0, 1, 2, 3]}
    assert kept["missing"] == ["other, all demonstrations, seed 2"]
    assert kept["made"]["commit"] == "abc" and kept["study"]["baseline"] == "end_to_end"
    arm = next(score for score in kept["scores"] if (score["arm"], score["level"]) == ("action_only", 2))
    assert arm["against"]["verdict"] == "unresolved" and arm["seeds"] == [0, 1, 2]
    assert arm["adjusted_p"] >= arm["against"]["p"]
    assert "trained" not in arm


def test_markdown_has_the_same_numbers(folder: Path) -> None:
    text = (folder / "results.md").read_text()
    assert text.startswith("# Study tiny\n\n4 comparisons with end_to_end at equal steps:")
    assert "| action_only | +25.0 |" in text
    assert "| end_to_end | 50.0, 75.0, 25.0 | 50.0 | -12.1 to 112.1 |" in text
    assert "Warning: 1 of 18 cells are missing" in text
    assert text.endswith("Python 3.11, torch 2.13. Data d0.\n")


def test_study_without_a_finished_cell_says_so(tmp_path: Path) -> None:
    publish(findings(found={}, scores=[], missing=[cell("other", 2)]), tmp_path, MADE)
    page = (tmp_path / "report.html").read_text()
    assert page.count("No cell is finished yet") >= 5
    assert "No arm can be compared yet" in page


def test_same_findings_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    publish(findings(), tmp_path, MADE)
    for name in ("report.html", "results.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_pipes_in_a_name_do_not_break_a_markdown_row() -> None:
    table = Table(
        heads=[("a", ""), ("b", "")], rows=[[Cell(text="x|y"), Cell(text="1", small="[2]")]], caption="T"
    )
    assert markdown(table) == "**T**\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 [2] |"


def test_tables_are_shown_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = difference_table(findings(), 2)
    assert {len(row) for row in shown.rows} == {len(shown.heads)}
    show(shown)
    said = capsys.readouterr().out
    assert "action_only" in said and "+25.0" in said


def test_forest_draws_zero_cuts_off_what_leaves_the_axis_and_escapes_names() -> None:
    rows = [
        ForestRow(name="<a>", value=3, interval=(-1, 7), wide=(-900, 950), seeds=(1, 5), label="+3"),
        ForestRow(name="b", value=0, interval=(0, 0), wide=None, seeds=(0,), label="0", mood="good"),
    ]
    svg = str(forest_chart("T", rows, baseline="<base>").svg)
    assert "&lt;a&gt;" in svg and "<a>" not in svg and "&lt;base&gt;" in svg
    assert svg.count('class="wide-interval"') == 1
    places = [float(part.split('"')[1]) for part in svg.replace("x2=", "x1=").split("x1=")[1:]]
    assert min(places) >= 190 and max(places) <= 860 - 210


def test_forest_of_nothing_but_zero_still_has_an_axis() -> None:
    row = ForestRow(name="a", value=0, interval=(0, 0), wide=(0, 0), seeds=(0, 0), label="0")
    assert "+2" in str(forest_chart("T", [row], baseline="b").svg)
