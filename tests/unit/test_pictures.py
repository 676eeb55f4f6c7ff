"""The pictures of the pages: drawn from a run, readable alone, with a text instead, none left over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import house
import picture_pipeline
import picture_training
import pytest

from fixtures.report_runs import make_run
from tutti.config.run_config import load_config
from tutti.report.svg.charts import Series, line_chart

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
NAMES = {f"training-{name}" for name in picture_training.DRAWN}
NAMES |= {"strategies-10", "strategies-50", "seeds", *picture_training.COMPARED}
PLAIN = {"line", "value", "name", "cell", "square"}
"""Classes that need no style of their own outside of the report."""
SVG = "{http://www.w3.org/2000/svg}"


def test_a_finished_run_is_drawn_and_its_heat_map_is_written_as_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    to, numbers = tmp_path / "pictures", tmp_path / "numbers"
    assert picture_training.main([str(run), "--to", str(to), "--output", str(numbers)]) == 0
    first = {path.stem: path.read_text() for path in to.iterdir()}
    assert first.keys() == NAMES and all(
        ElementTree.fromstring(text).tag == f"{SVG}svg" for text in first.values()
    )
    found = json.loads(numbers.with_suffix(".json").read_text())
    assert "median and range" in first["seeds"] and ">98.4 (97.5 to 100)<" in first["seeds"]
    assert found["steps"] == 3000 and found["shares"].keys() == {"first", "second"}
    for term, parts in found["shares"]["first"].items():
        for part, share in parts.items():
            shown = f"{100 * share:.0f} %" if share >= 0.01 or not share else "%"
            assert shown in first["training-shares"], (term, part)
    assert picture_training.main([str(run), "--to", str(to), "--output", str(numbers)]) == 0
    assert {path.stem: path.read_text() for path in to.iterdir()} == first


def test_the_stored_pictures_are_those_that_the_scripts_draw_of_the_files_of_today() -> None:
    """All that need no run: the model's structure, the study's differences, the seeds."""
    texts = {name: f"{chart._repr_svg_()}\n" for name, chart in picture_training.of_results().items()}
    texts["pipeline"] = picture_pipeline.draw(load_config(ROOT / "configs" / "demo.yaml"))
    stale = [name for name, text in texts.items() if (PICTURES / f"{name}.svg").read_text("utf-8") != text]
    assert stale == [], "draw them again: benchmarks/picture_pipeline.py, benchmarks/picture_training.py RUN"


def test_the_picture_of_the_packages_has_the_packages_of_today_on_their_floors() -> None:
    """Sizes and arrows move with every change of the code, and wait for the next drawing."""

    def boxes(drawn: str) -> list[tuple[str, str, str]]:
        return re.findall(r'<text x="(\d+)" y="(\d+)"[^>]* font-weight="600">([^<]+)<', drawn)

    stored = boxes((PICTURES / "packages.svg").read_text(encoding="utf-8"))
    assert stored == boxes(house.draw(ROOT / "src" / "tutti")), "draw it again: benchmarks/house.py"


def test_the_pipeline_has_a_dot_where_a_term_reaches_a_part_and_none_elsewhere() -> None:
    config = load_config(
        ROOT / "configs" / "smoke.yaml",
        [
            "objective.recon=null",
            "objective.align.stop_gradient=[vision]",
            "model.action={kind: flow}",
        ],
    )
    drawn = ElementTree.fromstring(picture_pipeline.draw(config))
    dots = [len(list(one)) for one in drawn.iter(f"{SVG}g") if one.get("class") == "dots"]
    assert dots == [1, 4, 3]  # align: language, as it is stopped before vision; action: all; state
    words = [one.text for one in drawn.iter(f"{SVG}text")]
    assert "state" in words and "recon" not in words
    assert "align reaches language; action reaches vision, language, fusion, action; state" in drawn.get(
        "aria-label", ""
    )


def test_a_run_without_records_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (run / "records.jsonl").unlink()
    assert picture_training.main([str(run), "--to", str(tmp_path / "to")]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "expected a finished run" in said and "'Learning rate'" in said and not (tmp_path / "to").exists()


def test_a_chart_by_itself_has_its_legend_in_rows_and_hides_what_needs_a_pointer() -> None:
    names = [f"a rather long name of line {number}" for number in range(4)]
    lines = [Series(name=name, xs=[0, 1], ys=[1, 2], colour="c1") for name in names]
    chart = line_chart(
        "Title", [*lines, Series(name="level", xs=[0, 1], ys=[1, 1], colour="c2", kind="reference")], unit="m"
    )
    drawn = ElementTree.fromstring(chart._repr_svg_())
    keys = [one for one in drawn.iter(f"{SVG}text") if one.get("class") == "key"]
    assert [one.text for one in keys] == [*names, "level"]
    _, top, width, height = map(float, drawn.attrib["viewBox"].split())
    assert {one.get("y") for one in keys} == {"4.0", "22.0"}
    assert all(float(one.attrib["x"]) + 6 * len(one.text or "") < width for one in keys)
    (card,) = (one for one in drawn.iter(f"{SVG}rect") if one.get("fill") == "#fff")
    assert (float(card.attrib["y"]), float(card.attrib["height"])) == (top, height)
    style = next(drawn.iter(f"{SVG}style")).text or ""
    assert ".cursor,.hit{display:none}" in style


@pytest.mark.parametrize("name", [*sorted(NAMES), "pipeline"])
def test_a_stored_picture_is_whole_small_and_has_a_ground_of_its_own(name: str) -> None:
    path = PICTURES / f"{name}.svg"
    drawn = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 60_000 and any(one.get("fill") == "#fff" for one in drawn.iter(f"{SVG}rect"))
    classes = {word for one in drawn.iter() for word in one.get("class", "").split()}
    style = next(drawn.iter(f"{SVG}style")).text or ""
    assert [word for word in classes - PLAIN if not re.search(rf"\.{word}\b", style)] == []


def test_every_picture_is_shown_with_a_text_instead_of_it() -> None:
    shown: set[str] = set()
    for page in PAGES:
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            assert len(text) > 15 or not text.isascii(), f"{page.name}: {target}"
            shown.add(Path(target).name)
    assert {path.name for path in PICTURES.iterdir()} - shown == set()
