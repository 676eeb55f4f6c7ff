"""The section "What trains what": its drawings, its notes, runs that have no diagnostics, foreign names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fixtures.report_runs import look_values
from tutti.report import write_report
from tutti.report.blocks import Charts, Fold, Note
from tutti.report.inputs import read_inputs
from tutti.report.sections.gradients import influence_section, top_notes
from tutti.report.svg.charts import share_chart
from tutti.report.svg.rows import heat_map

CONFIG = (
    "name: looked\ntraining: {diagnostics: {every: 100, share: 0.5}}\nobjective: {recon: {weight: 0.1}}\n"
)
HOSTILE = '"><script>alert(1)<b>'


def write_records(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, looks: list[dict[str, Any]]) -> Path:
    steps = [look["step"] for look in looks]
    write_records(
        folder, [*looks, *({"step": s, "loss/total": 1.0, "data/samples": 32.0 * s} for s in steps)]
    )
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def sound(count: int = 12) -> list[dict[str, Any]]:
    return [{"step": step, **look_values(step)} for step in range(100, 100 * count + 1, 100)]


def charts_of(run: Path) -> dict[str, str]:
    blocks = influence_section(read_inputs(run)).blocks
    inner = [block for outer in blocks if isinstance(outer, Fold) for block in outer.blocks]
    return {
        chart.title: str(chart.svg)
        for block in [*blocks, *inner]
        if isinstance(block, Charts)
        for chart in block.charts
    }


def notes_of(run: Path) -> list[tuple[str, str]]:
    blocks = influence_section(read_inputs(run)).blocks
    return [(block.mood, block.text) for block in blocks if isinstance(block, Note)]


def test_section_of_a_sound_run_says_so_and_has_every_drawing(tmp_path: Path) -> None:
    section = influence_section(read_inputs(make_run(tmp_path, sound())))
    assert section.lead.startswith("12 diagnostic steps at 50 % of the batch, one every 100 steps")
    assert notes_of(tmp_path) == [("good", "No fault found in 12 diagnostic steps.")]
    assert top_notes(read_inputs(tmp_path)) == []
    titles = set(charts_of(tmp_path))
    assert {
        *(
            "Share of each part's update (and of its gradient), first half",
            "Share of each part's update (and of its gradient), second half",
        ),
        *(
            "Shares of the gradient in the vision encoder",
            "Shares of the gradient in the fusion",
            "Cosines in the language encoder",
        ),
        *("Diagnostic steps in which two terms conflict", "Update-to-weight ratio", "Effective rank"),
        *("Dead units", "Gradient noise scale and batch", "lambda |g| in the fusion"),
    } <= titles
    assert "Shares of the gradient in the action decoder" not in titles  # one term alone has all of it
    assert "Cosines in the action decoder" not in titles
    assert "Loss spikes" not in titles


def test_no_fault_is_not_said_in_green_above_a_hint(tmp_path: Path) -> None:
    idle = {f"diag/update_share/recon/{part}": 0.001 for part in ("vision", "language", "fusion", "action")}
    run = make_run(tmp_path, [look | idle for look in sound()])
    (head, _), (mood, _) = notes = notes_of(run)
    assert (head, mood) == ("hint", "hint")
    assert notes[0][1] == "No fault found in 12 diagnostic steps, but 1 hint:"
    assert notes[1][1].startswith("recon hardly teaches")


def test_findings_stand_in_the_section_and_the_grave_ones_at_the_top(tmp_path: Path) -> None:
    shares = {"diag/update_share/recon/vision": 0.97, "diag/update_share/action/vision": 0.02}
    changes = shares | {"diag/dead/readout": 0.4}
    run = make_run(tmp_path, [look | changes for look in sound()])
    moods = [mood for mood, _ in notes_of(run)]
    assert moods == ["bad", "warn"]
    top = top_notes(read_inputs(run))
    assert [note.mood for note in top] == moods
    assert top[0].text.startswith("40 % of the units of the readout are dead")
    page = write_report(run).read_text()
    assert page.index("of the units of the readout are dead") < page.index("<nav>")
    assert '<p class="note warn">recon makes 97\u00a0% of the update of the vision encoder' in page
    dead = {f"diag/dead/{name}": 0.9 for name in ("vision", "language", "fused", "readout")}
    jumps = {f"diag/update_ratio/{part}": 0.5 for part in ("vision", "language")}
    top = top_notes(read_inputs(make_run(tmp_path, [look | dead | jumps for look in sound()])))
    assert len(top) == 5 and top[-1].text.startswith("2 more findings")


def test_run_without_diagnostics_says_why_and_still_gets_the_findings_of_its_curves(tmp_path: Path) -> None:
    for lines in (None, [], [{"step": s, "loss/total": 1.0, "optim/clip_share": 1.0} for s in range(1, 30)]):
        if lines is not None:
            write_records(tmp_path, lines)
        section = influence_section(read_inputs(tmp_path))
        assert "training.diagnostics.every" in section.missing
        assert ("are clipped" in str(section.blocks)) == bool(lines)


def test_a_single_look_and_a_frozen_part_are_drawn(tmp_path: Path) -> None:
    looks = [
        {k: v for k, v in look.items() if not (k.endswith("/vision") and look["step"] > 600)}
        for look in sound()
    ]
    svg = charts_of(make_run(tmp_path, looks))[
        "Share of each part's update (and of its gradient), second half"
    ]
    assert svg.count(">frozen<") == 1
    assert svg.count("<g data-tip") == 9  # three terms in three parts that are not frozen
    assert (
        charts_of(make_run(tmp_path, sound(1)))["Shares of the gradient in the fusion"].count("<polygon") == 2
    )


def test_names_and_values_from_outside_are_escaped_and_do_no_harm(tmp_path: Path) -> None:
    odd = {f"diag/{what}/{HOSTILE}/vision": 0.5 for what in ("share", "norm")}
    odd |= {f"diag/norm/action/{HOSTILE}": 0.1, f"diag/cosine/action~{HOSTILE}/vision": -0.9}
    odd |= {"diag/cosine/a~b~c/vision": 1.0, "diag/norm/short": 1.0, "diag/spike/x/y": 9.0, "diag/": 1.0}
    looks = [look | odd | {"diag/share/recon/vision": None, "diag/rank/fused": "NaN"} for look in sound()]
    page = write_report(make_run(tmp_path, looks)).read_text()
    assert page.count("<script") == 1 and "alert(1)" in page
    HTMLParser().feed(page)


def test_heat_map_shades_by_value_and_leaves_the_absent_a_dash() -> None:
    chart = heat_map(
        "t", ["a", "b"], ["x", "y"], {("a", "x"): (0.0, ""), ("a", "y"): (1.0, ""), ("b", "x"): (0.0001, "")}
    )
    depths = [float(d) for d in re.findall(r'fill-opacity="([^"]+)"', chart.svg)]
    assert depths == pytest.approx([0.05, 0.95, 0.05, 0.05], abs=1e-3)
    texts = re.findall(r'class="cell[^>]*>([^<]+)<', chart.svg)
    assert texts == ["0 %", "100 %", "&lt; 0.1 %", "\u2013"]


def test_areas_fill_the_whole_and_leave_a_gap_where_nothing_was_recorded() -> None:
    steps = [10, 20, 30, 40, 50]
    shares = {"a": {10: 0.25, 20: 0.5, 40: 0.5, 50: 1.0}, "b": {10: 0.75, 20: 0.5, 40: 0.5}}
    chart = share_chart("t", steps, shares, {"a": "c1", "b": "c2"})
    areas = re.findall(r'<polygon class="area (c\d)" points="([^"]+)"', chart.svg)
    assert [colour for colour, _ in areas] == ["c1", "c2", "c1", "c2"]  # two stretches of two areas
    corners = [tuple(map(float, point.split(","))) for point in areas[1][1].split()]
    bottom, top = 250 - 40, 14
    assert [y for _, y in corners] == pytest.approx(
        [top, top, (top + bottom) / 2, bottom - (bottom - top) / 4]
    )
    assert [name for name, _, _ in chart.legend] == ["a", "b"]


def test_long_runs_are_thinned_to_means() -> None:
    steps = list(range(1, 5001))
    chart = share_chart("t", steps, {"a": dict.fromkeys(steps, 0.3), "b": dict.fromkeys(steps, 0.7)}, {})
    points = re.findall(r'points="([^"]+)"', chart.svg)[0].split()
    assert len(points) == 2 * 200
    assert len(chart.svg) < 60_000


def test_last_stretch_is_the_last_quarter_but_at_least_three_looks(tmp_path: Path) -> None:
    for count, first in ((20, 1600), (5, 300), (2, 100)):
        assert read_inputs(make_run(tmp_path, sound(count))).records.end[0] == first
