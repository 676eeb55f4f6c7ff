"""Charts over steps: axes, smoothing, numbers, phases, and what a term is drawn against."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import pytest

from tutti.report.blocks import Charts
from tutti.report.curves import smooth
from tutti.report.formatting import anything, count, duration, listed, plain
from tutti.report.inputs import Inputs, read_inputs
from tutti.report.sections.training import phase_marks, training_section
from tutti.report.svg.charts import Series, line_chart, thin
from tutti.report.svg.drawing import Scale, value_scale

STEPS = list(range(1, 2001))


def test_ticks_are_round_and_inside_and_what_is_outside_is_drawn_at_the_edge() -> None:
    scale = Scale(low=0, high=1, start=0, end=100)
    assert (scale.pixel(7), scale.pixel(-7)) == (100, 0)
    assert Scale(low=0, high=1, start=0, end=1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(low=-0.03, high=0.13, start=0, end=1).ticks(4) == pytest.approx([0, 0.05, 0.1])


def test_log_scale_is_taken_for_a_wide_positive_spread_only() -> None:
    assert value_scale([0.001, 1], 0, 1).log
    assert not value_scale([0.5, 1], 0, 1).log
    assert not value_scale([-1, 1000], 0, 1).log
    assert not value_scale([0.001, 1], 0, 1, log=False).log
    zeros = value_scale([0.0, 0.0], 0, 1)
    assert zeros.low == 0 and zeros.high >= 1, "zeros stand on an axis of ordinary numbers"


def test_log_scale_puts_equal_factors_at_equal_distances() -> None:
    scale = Scale(low=0.01, high=1, start=0, end=100, log=True)
    assert [scale.pixel(v) for v in (0.01, 0.1, 1)] == pytest.approx([0, 50, 100])
    assert [t for t in scale.ticks() if t in (0.01, 0.1, 1)] == pytest.approx([0.01, 0.1, 1])


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-2.0, -2.0], [1e-12, 1e-12], [1e12, 1e12], []])
def test_constant_or_absent_values_have_an_axis(values: list[float]) -> None:
    scale = value_scale(values, 100, 0)
    assert scale.high > scale.low
    assert all(0 <= scale.pixel(v) <= 100 for v in values)
    assert len(scale.ticks()) >= 1


def test_smoothing_keeps_a_constant_and_a_straight_line_and_skips_nan() -> None:
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    line = [float(i) for i in range(1000)]
    assert smooth(line)[500] == pytest.approx(500)
    assert smooth([1.0, math.nan, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert math.isnan(smooth([math.nan])[0])


def test_thinning_keeps_spikes_ends_and_order() -> None:
    values = [0.0] * 2000
    values[777] = 9.0
    drawn = thin(Series(name="a", xs=STEPS, ys=values, colour="c1"))
    xs, ys = drawn.xs, drawn.ys
    assert len(xs) <= 410
    assert (xs[0], xs[-1]) == (1, 2000)
    assert (778, 9.0) in zip(xs, ys, strict=True)
    assert xs == sorted(xs)


def test_chart_carries_the_values_that_hovering_shows() -> None:
    chart = line_chart("t", [Series(name="a", xs=[10, 12345], ys=[0.5, 0.25], colour="c1")], unit="loss")
    found = re.search(r'data-chart="([^"]*)"', chart.svg)
    assert found is not None
    values = json.loads(html.unescape(found.group(1)))
    assert values["series"] == [
        {"name": "a", "colour": "c1", "unit": "", "xs": [10, 12345], "ys": [0.5, 0.25]}
    ]


def test_chart_of_nothing_but_nan_is_an_empty_frame_and_names_are_escaped() -> None:
    chart = line_chart("t", [Series(name="a", xs=[1, 2], ys=[math.nan, math.inf], colour="c1")], unit="loss")
    assert "nothing recorded" in chart.svg
    assert "nan" not in chart.svg
    chart = line_chart(
        "<t>",
        [Series(name="<i>&\"'", xs=[0, 100], ys=[1, 2], colour="c1")],
        unit="<u>",
        marks=[(50, "<two>"), (500, "outside")],
    )
    assert not re.search(r"<(t|i|u|two)>", chart.svg)
    assert "&lt;two&gt;" in chart.svg and "outside" not in chart.svg
    assert 'class="mark" x1="302.0"' in chart.svg  # the middle of 58 and 546
    assert str(chart.svg).count('class="mark"') == 1


def test_numbers_and_lists_read_as_people_say_them() -> None:
    seconds = {0.42: "0.4 s", 59.4: "59 s", 59.9: "1 min 00 s", 700: "11 min 40 s", 7500: "2 h 05 min"}
    assert {value: duration(value) for value in seconds} == seconds
    lists = {(): "", ("a",): "a", ("a", "b"): "a and b", ("a", "b", "c"): "a, b and c"}
    assert {words: listed(words) for words in lists} == lists
    assert [plain(v) for v in (0, 0.1234, 12345, 1e-5, 2.5e7)] == ["0", "0.123", "12,345", "1e-5", "2.5e7"]
    assert [count(v) for v in (940, 52301, 1_842_311)] == ["940", "52,301", "1.84 M"]
    assert [anything(v) for v in (True, None, [1, 2], [[64, 64]])] == ["yes", "\u2013", "1, 2", "64 x 64"]


def inputs_of(folder: Path, strategy: str, phases: list[int], **metrics: float) -> Inputs:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"strategy: {{kind: {strategy}}}\n")
    values = {"loss/total": 1.0, "loss/progress/raw": 0.7, "lambda/progress": 1.0, **metrics}
    lines = [
        {"step": 10 * (n + 1), "kind": "train", "strategy/phase": p, **values} for n, p in enumerate(phases)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_inputs(folder)


def test_a_phase_is_marked_behind_the_last_record_of_the_one_before(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "run", "two_stage", [0, 0, 0, 1, 1])
    assert phase_marks(inputs) == [(30, "action")]
    unknown = inputs_of(tmp_path / "other", "of_tomorrow", [0, 1, 2])
    assert phase_marks(unknown) == [(10, "phase 2"), (20, "phase 3")]
    assert phase_marks(inputs_of(tmp_path / "one", "end_to_end", [0, 0])) == []


def test_a_term_is_drawn_against_its_baseline(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "run", "two_stage", [0, 0, 1], **{"metric/progress/mean_baseline": 0.69})
    charts = [c for b in training_section(inputs).blocks if isinstance(b, Charts) for c in b.charts]
    (term,) = [chart for chart in charts if chart.title.startswith("progress: raw, ")]
    assert ("mean baseline", "grey", "reference") in term.legend
    assert "always answering the batch's mean" in term.help
    assert 'class="mark"' in term.svg
