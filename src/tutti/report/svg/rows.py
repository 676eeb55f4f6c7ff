"""Charts with one row per name: rows over a scale, differences against a baseline, seconds, a heat map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from tutti.report.formatting import NOTHING, Number, duration, percent
from tutti.report.svg.drawing import Chart, Point, Scale, circle, drawing, hover, line, text

WIDTH, TOP = 860, 8
NARROW, OWN_LINE = 400, 24
"""Of the drawing for a narrow window: its width, and the height of the line of words above each row."""
MIN_RANGE = 5.0
HEAT_WIDTH, HEAT_LABELS, HEAT_TOP, HEAT_ROW = 560, 118, 26, 36
MIN_SHOWN = 0.0005
DARK = 0.65  # a cell as dark as this carries light letters


@dataclass(frozen=True, slots=True)
class Row:
    """What is drawn of a row; `marks` have y = 0 in its middle. `strong` draws a line above it.

    `mood` is "good", "bad" or "" and colours the words in `label`.
    """

    name: str
    label: str
    tips: Sequence[str]
    marks: str
    mood: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestRow:
    """One line: the difference, a thick interval, a thin one (None: not known), a dot for each seed.

    All in points. `mood` is that of `Row`.
    """

    name: str
    value: Number
    interval: tuple[Number, Number]
    wide: tuple[Number, Number] | None
    seeds: Sequence[Number]
    label: str
    mood: str = ""


def row_chart(
    title: str,
    rows: Callable[[Scale], Sequence[Row]],
    across: Scale,
    height: Number,
    *,
    ticks: Sequence[tuple[str, Number, str]] = (),
    axis: str = "",
    legend: Sequence[tuple[str, str, str]] = (),
    help: str = "",
) -> Chart:
    """Rows over upright lines, each with its kind, value and words, and the name of the axis below. `rows`
    draws them on a scale, and does so twice: in a narrow window the words stand above the marks.

    A whole row shows its tips under the pointer.
    """
    short = replace(across, start=16, end=NARROW - 16)
    svg, small = (
        _rows_drawing(title, rows(one), one, height, ticks=ticks, axis=axis, narrow=one is short)
        for one in (across, short)
    )
    return Chart(title=title, help=help, svg=svg, narrow=small, legend=legend, wide=True)


def _rows_drawing(
    title: str,
    rows: Sequence[Row],
    across: Scale,
    height: Number,
    *,
    ticks: Sequence[tuple[str, Number, str]],
    axis: str,
    narrow: bool,
) -> Markup:
    width, above = (NARROW, OWN_LINE) if narrow else (WIDTH, 0)
    base = TOP + (height + above) * len(rows) + 4
    parts: list[str] = []
    for kind, tick, words in ticks:
        x = across.pixel(tick)
        parts += [line(kind, (x, TOP), (x, base)), text("tick middle", x, base + 16, words)]
    parts.append(text("tick middle", (across.start + across.end) / 2, base + 36, axis) if axis else "")
    top = -height / 2 - above
    hit = f'<rect class="hit" x="0" y="{top:.1f}" width="{width}" height="{height + above}"/>'
    left, right, y = (8, width - 8, 1 - height / 2) if narrow else (across.start - 14, across.end + 14, 4)
    for index, row in enumerate(rows):
        top = TOP + (height + above) * index
        if row.strong and index:
            parts.append(line("axis", (8, top), (width - 8, top)))
        strong, mood = " strong" if row.strong else "", f" {row.mood}" if row.mood else ""
        name = text(f"name{'' if narrow else ' end'}{strong}", left, y, row.name)
        label = text(f"value{' end' if narrow else ''}{strong}{mood}", right, y, row.label)
        inside = hover("\n".join([row.name, *row.tips]), hit + name + row.marks + label)
        parts.append(f'<g transform="translate(0 {top + above + height / 2:.1f})">{inside}</g>')
    spoken = f"{title}: {'; '.join(f'{row.name} {row.label}' for row in rows)}"
    kind = "narrow" if narrow else ""
    return drawing((width, base + (42 if axis else 0)), spoken, parts, kind=kind)


def whisker(kind: str, across: Scale, bounds: tuple[Number, Number, Number], place: Point) -> str:
    """An interval with its point; `bounds` are low, high and the value, `place` y and the point's radius."""
    low, high, x = (across.pixel(value) for value in bounds)
    y, radius = place
    bar = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'<g class="whisker {kind}">{bar}{circle(x, y, radius)}</g>'


def forest_chart(title: str, rows: Sequence[ForestRow], *, baseline: str, help: str = "") -> Chart:
    """The differences in points of success; what an interval has outside +-100 points is cut off."""

    def draw(across: Scale) -> list[Row]:
        drawn: list[Row] = []
        for row in rows:
            marks, tips = "", [f"{row.value:+.1f} points"]
            tips.append(f"paired bootstrap {row.interval[0]:+.1f} to {row.interval[1]:+.1f}")
            if row.wide is not None:
                start, end = (across.pixel(value) for value in row.wide)
                marks += line("wide-interval", (start, 7), (end, 7))
                tips.append(f"t over seeds {row.wide[0]:+.1f} to {row.wide[1]:+.1f}")
            dots = (circle(across.pixel(seed), 7, 3) for seed in row.seeds)
            marks += "".join(f'<g class="whisker c2 hollow">{dot}</g>' for dot in dots)
            marks += whisker("c1", across, (*row.interval, row.value), (-3, 5))
            tips.append(f"each seed {', '.join(f'{seed:+.1f}' for seed in row.seeds)}")
            drawn.append(Row(row.name, row.label, tips, marks, row.mood))
        return drawn

    across = _forest_scale(rows)
    legend = [("paired bootstrap", "c1", "line"), ("t over seeds", "grey", "reference")]
    legend.append(("a seed", "c2", "hollow"))
    ticks = [("grid" if tick else "zero", tick, f"{tick:+g}" if tick else "0") for tick in across.ticks(7)]
    axis = f"points of success, minus {baseline}"
    return row_chart(title, draw, across, 36, ticks=ticks, axis=axis, legend=legend, help=help)


def _forest_scale(rows: Sequence[ForestRow]) -> Scale:
    """Wide enough for every interval and for zero, with some room, but not beyond +-100 points."""
    ends = [0.0]
    for row in rows:
        ends += [*row.interval, *(row.wide or ()), *row.seeds, row.value]
    low, high = max(min(ends), -100.0), min(max(ends), 100.0)
    room = max(0.06 * (high - low), MIN_RANGE / 2 if high - low < MIN_RANGE else 0.0)
    return Scale(low=low - room, high=high + room, start=190, end=WIDTH - 210)


def seconds_chart(title: str, seconds: Mapping[str, Number], help: str = "") -> Chart:
    """One bar for each stage of the pipeline, with its seconds."""

    def draw(across: Scale) -> list[Row]:
        rows: list[Row] = []
        for name, value in seconds.items():
            width = max(1.0, across.pixel(value) - across.start)
            bar = f'<rect class="bar c1" x="{across.start}" y="-8" rx="2" height="16" width="{width:.1f}"/>'
            rows.append(Row(name, duration(value), [duration(value)], bar))
        return rows

    across = Scale(low=0, high=max([*seconds.values(), 1e-9]), start=150, end=WIDTH - 120)
    return row_chart(title, draw, across, 28, help=help)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], tuple[Number, str]],
    *,
    help: str = "",
    colour: str = "c1",
    words: Mapping[str, str] | None = None,
    beside: Mapping[tuple[str, str], Number] | None = None,
) -> Chart:
    """Fractions in [0, 1] by row and column, each a cell as dark as it is large, with what it says under the
    pointer. A pair that is absent has a dash; `words` fill a whole column instead of values. `beside` are
    second fractions, which stand below in brackets."""
    words, beside = words or {}, beside or {}
    width = (HEAT_WIDTH - HEAT_LABELS - 4) / max(1, len(columns))
    middles = {column: HEAT_LABELS + width * (place + 0.5) for place, column in enumerate(columns)}
    parts: list[str] = []
    for column, x in middles.items():
        parts.append(text("name middle", x, HEAT_TOP - 9, column))
        if column in words:
            parts.append(text("tick middle", x, HEAT_TOP + HEAT_ROW * len(rows) / 2 + 4, words[column]))
    for number, row in enumerate(rows):
        y = HEAT_TOP + HEAT_ROW * (number + 0.5)
        parts.append(text("name end", HEAT_LABELS - 12, y + 4, row))
        for column, x in middles.items():
            if column not in words:
                value, tip = cells.get((row, column), (math.nan, f"{row}, {column}"))
                second = f"({percent(beside[row, column])})" if (row, column) in beside else ""
                parts.append(hover(tip, _heat_cell(value, x, y, width, colour, below=second)))
    said = "; ".join(f"{row} in {column} {percent(value)}" for (row, column), (value, _) in cells.items())
    spoken = f"{title}: {said or 'nothing recorded'}"
    svg = drawing((HEAT_WIDTH, HEAT_TOP + HEAT_ROW * len(rows) + 6), spoken, parts)
    return Chart(title=title, help=help, svg=svg)


def _heat_cell(value: Number, x: Number, y: Number, width: Number, colour: str, *, below: str) -> str:
    """A cell around (x, y), with small words below its value; NaN is a dash."""
    depth = 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)
    words = NOTHING if math.isnan(value) else percent(depth, 1 if 0 < depth < 0.01 else 0)
    words = "< 0.1 %" if 0 < depth < MIN_SHOWN else words
    light = " on" if depth >= DARK else ""
    return (
        f'<rect class="heat {colour}" x="{x - width / 2 + 2:.1f}" y="{y - HEAT_ROW / 2 + 2:.1f}" rx="4" '
        f'width="{width - 4:.1f}" height="{HEAT_ROW - 4}" fill-opacity="{0.05 + 0.9 * depth:.3f}"/>'
    ) + "".join(
        text(f"cell middle{light}{small}", x, y + shift, said)
        for said, small, shift in ((words, "", -1.5 if below else 4.5), (below, " below", 12.0))
        if said
    )
