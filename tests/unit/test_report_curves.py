"""The training section's curves: where phases begin, and what a term is drawn against."""

from __future__ import annotations

import json
from pathlib import Path

from tutti.report.blocks import Charts
from tutti.report.inputs import Inputs, read_inputs
from tutti.report.sections.training import phase_marks, training_section
from tutti.report.svg.charts import Series, line_chart


def inputs_of(folder: Path, strategy: str, phases: list[int], **metrics: float) -> Inputs:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"strategy: {{kind: {strategy}}}\n")
    values = {"loss/total": 1.0, "loss/progress/raw": 0.7, "lambda/progress": 1.0, **metrics}
    lines = [
        {"step": 10 * (n + 1), "kind": "train", "strategy/phase": p, **values} for n, p in enumerate(phases)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_inputs(folder)


def test_a_mark_stands_at_its_step_with_its_name_escaped() -> None:
    series = [Series(name="a", xs=[0, 100], ys=[1, 2], colour="c1")]
    chart = line_chart("t", series, unit="loss", marks=[(50, "<two>"), (500, "outside")])
    assert str(chart.svg).count('class="mark"') == 1
    assert "&lt;two&gt;" in chart.svg and "outside" not in chart.svg
    assert 'class="mark" x1="302.0"' in chart.svg  # the middle of 58 and 546


def test_a_phase_is_marked_behind_the_last_record_of_the_one_before(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "run", "two_stage", [0, 0, 0, 1, 1])
    assert phase_marks(inputs) == [(30, "action")]
    unknown = inputs_of(tmp_path / "other", "of_tomorrow", [0, 1, 2])
    assert phase_marks(unknown) == [(10, "phase 2"), (20, "phase 3")]
    assert phase_marks(inputs_of(tmp_path / "one", "end_to_end", [0, 0])) == []


def test_a_term_is_drawn_against_its_baseline(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "run", "two_stage", [0, 0, 1], **{"metric/progress/mean_baseline": 0.69})
    charts = [c for b in training_section(inputs).blocks if isinstance(b, Charts) for c in b.charts]
    (term,) = [chart for chart in charts if chart.title == "progress: raw"]
    assert ("mean baseline", "grey", "reference") in term.legend
    assert "always answering the batch's mean" in term.help
    assert 'class="mark"' in term.svg
