"""Charts with one row per name: success rates, differences against a baseline, seconds, a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tutti.report.formatting import NOTHING, Number, duration, percent
from tutti.report.svg.axes import Scale
from tutti.report.svg.elements import Chart, circle, drawing, hover, line, text

WIDTH, TOP = 860, 8
MIN_RANGE = 5.0
HEAT_WIDTH, HEAT_LABELS, HEAT_TOP, HEAT_ROW = 560, 118, 26, 36
MIN_SHOWN = 0.0005
DARK = 0.65  # a cell as dark as this carries light letters


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A rate with its interval, all fractions in [0, 1], and the words that say it."""

    rate: Number
    low: Number
    high: Number
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessRow:
    """A task's line in the success chart; `wrong` is its wrong-instruction control, `expert` the ceiling."""

    task: str
    policy: Estimate
    wrong: Estimate | None = None
    expert: Number | None = None
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestRow:
    """One line: the difference, a thick interval, a thin one (None: not known), a dot for each seed.

    All in points. `mood` is "good", "bad" or "" and colours the words in `label`.
    """

    name: str
    value: Number
    interval: tuple[Number, Number]
    wide: tuple[Number, Number] | None
    seeds: Sequence[Number]
    label: str
    mood: str = ""


@dataclass(frozen=True, slots=True)
class _Row:
    """What is drawn of a row; `marks` have y = 0 in its middle. `strong` draws a line above it."""

    name: str
    label: str
    tips: Sequence[str]
    marks: str
    mood: str = ""
    strong: bool = False


def success_chart(title: str, rows: Sequence[SuccessRow], help: str = "") -> Chart:
    """Point and interval of each task, its wrong-instruction control below, the expert as a tick."""
    across = Scale(low=0, high=1, start=150, end=WIDTH - 170)
    drawn: list[_Row] = []
    for row in rows:
        marks, tips = "", [f"policy {row.policy.label}"]
        if row.expert is not None:
            x = across.pixel(row.expert)
            marks += line("ceiling", (x, -11), (x, 11))
            tips.append(f"expert {percent(row.expert)}")
        if row.wrong:
            marks += _whisker("c2 hollow", across, (row.wrong.low, row.wrong.high, row.wrong.rate), (6, 4))
            tips.append(f"wrong instruction {row.wrong.label}")
        policy = (row.policy.low, row.policy.high, row.policy.rate)
        marks += _whisker("c1 strong" if row.strong else "c1", across, policy, (-5 if row.wrong else 0, 5.5))
        drawn.append(_Row(row.task, row.policy.label, tips, marks, strong=row.strong))
    legend = [("policy", "c1", "points")]
    if any(row.wrong for row in rows):
        legend.append(("wrong instruction", "c2", "hollow"))
    if any(row.expert is not None for row in rows):
        legend.append(("expert's ceiling", "grey", "tick"))
    ticks = [("grid", tick, percent(tick)) for tick in (0, 0.25, 0.5, 0.75, 1)]
    svg = _row_drawing(title, drawn, across, 34, ticks=ticks, axis="success rate")
    return Chart(title=title, help=help, svg=svg, legend=tuple(legend), wide=True)


def forest_chart(title: str, rows: Sequence[ForestRow], *, baseline: str, help: str = "") -> Chart:
    """The differences in points of success; what an interval has outside +-100 points is cut off."""
    across = _forest_scale(rows)
    drawn: list[_Row] = []
    for row in rows:
        marks, tips = "", [f"{row.value:+.1f} points"]
        tips.append(f"paired bootstrap {row.interval[0]:+.1f} to {row.interval[1]:+.1f}")
        if row.wide is not None:
            start, end = (across.pixel(value) for value in row.wide)
            marks += line("wide-interval", (start, 7), (end, 7))
            tips.append(f"t over seeds {row.wide[0]:+.1f} to {row.wide[1]:+.1f}")
        dots = (circle(across.pixel(seed), 7, 3) for seed in row.seeds)
        marks += "".join(f'<g class="whisker c2 hollow">{dot}</g>' for dot in dots)
        marks += _whisker("c1", across, (*row.interval, row.value), (-3, 5))
        tips.append(f"each seed {', '.join(f'{seed:+.1f}' for seed in row.seeds)}")
        drawn.append(_Row(row.name, row.label, tips, marks, mood=row.mood))
    legend = (("paired bootstrap", "c1", "line"), ("t over seeds", "grey", "reference"))
    legend += (("a seed", "c2", "hollow"),)
    ticks = [("grid" if tick else "zero", tick, f"{tick:+g}" if tick else "0") for tick in across.ticks(7)]
    svg = _row_drawing(title, drawn, across, 36, ticks=ticks, axis=f"points of success, minus {baseline}")
    return Chart(title=title, help=help, svg=svg, legend=legend, wide=True)


def seconds_chart(title: str, seconds: Mapping[str, Number], help: str = "") -> Chart:
    """One bar for each stage of the pipeline, with its seconds."""
    height = 28
    across = Scale(low=0, high=max([*seconds.values(), 1e-9]), start=150, end=WIDTH - 120)
    parts: list[str] = []
    for index, (name, value) in enumerate(seconds.items()):
        y, end = height * index + 4, across.pixel(value)
        width = max(1.0, end - across.start)
        parts += [
            text("name end", across.start - 14, y + 15, name),
            f'<rect class="bar c1" x="{across.start}" y="{y + 2}" rx="2" height="16" width="{width:.1f}"/>',
            text("value", end + 9, y + 15, duration(value)),
        ]
    spoken = f"{title}: " + ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    svg = drawing(WIDTH, height * len(seconds) + 8, spoken, "".join(parts))
    return Chart(title=title, help=help, svg=svg, wide=True)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], Number],
    *,
    help: str = "",
    colour: str = "c1",
    tips: Mapping[tuple[str, str], str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Chart:
    """Fractions in [0, 1], each a cell as dark as it is large. A pair that is absent has a dash.

    `tips` says more about a cell under the pointer; `words` fill a whole column instead of values.
    """
    tips, words = tips or {}, words or {}
    width = (HEAT_WIDTH - HEAT_LABELS - 4) / max(1, len(columns))
    middle = HEAT_TOP + HEAT_ROW * len(rows) / 2
    parts: list[str] = []
    for place, column in enumerate(columns):
        x = HEAT_LABELS + width * place
        parts.append(text("name middle", x + width / 2, HEAT_TOP - 9, column))
        if column in words:
            parts.append(text("tick middle", x + width / 2, middle + 4, words[column]))
    for number, row in enumerate(rows):
        y = HEAT_TOP + HEAT_ROW * number
        parts.append(text("name end", HEAT_LABELS - 12, y + HEAT_ROW / 2 + 4, row))
        for place, column in enumerate(columns):
            if column not in words:
                cell = _heat_cell(values.get((row, column)), HEAT_LABELS + width * place, y, width, colour)
                parts.append(hover(tips.get((row, column), f"{row}, {column}"), cell))
    said = "; ".join(
        f"{row} in {column} {percent(value)}"
        for (row, column), value in values.items()
        if math.isfinite(value)
    )
    spoken = f"{title}: {said or 'nothing recorded'}"
    svg = drawing(HEAT_WIDTH, HEAT_TOP + HEAT_ROW * len(rows) + 6, spoken, "".join(parts))
    return Chart(title=title, help=help, svg=svg)


def _heat_cell(value: Number | None, x: Number, y: Number, width: Number, colour: str) -> str:
    depth, words = 0.0, NOTHING
    if value is not None and math.isfinite(value):
        depth = min(max(float(value), 0.0), 1.0)
        words = percent(depth, 1 if 0 < depth < 0.01 else 0)
        words = "< 0.1 %" if 0 < depth < MIN_SHOWN else words
    light = " on" if depth >= DARK else ""
    return (
        f'<rect class="heat {colour}" x="{x + 2:.1f}" y="{y + 2:.1f}" rx="4" width="{width - 4:.1f}" '
        f'height="{HEAT_ROW - 4}" fill-opacity="{0.05 + 0.9 * depth:.3f}"/>'
    ) + text(f"cell middle{light}", x + width / 2, y + HEAT_ROW / 2 + 4.5, words)


def _row_drawing(
    title: str,
    rows: Sequence[_Row],
    across: Scale,
    height: Number,
    *,
    ticks: Sequence[tuple[str, Number, str]],
    axis: str,
) -> Markup:
    """Rows over upright lines of a kind at values, with their words and the axis below.

    A whole row shows its tips under the pointer.
    """
    base = TOP + height * len(rows) + 4
    parts: list[str] = []
    for kind, tick, words in ticks:
        x = across.pixel(tick)
        parts += [line(kind, (x, TOP), (x, base)), text("tick middle", x, base + 16, words)]
    parts.append(text("tick middle", (across.start + across.end) / 2, base + 36, axis))
    hit = f'<rect class="hit" x="0" y="{-height / 2:.1f}" width="{WIDTH}" height="{height}"/>'
    for index, row in enumerate(rows):
        top = TOP + height * index
        if row.strong and index:
            parts.append(line("axis", (8, top), (WIDTH - 8, top)))
        strong, mood = " strong" if row.strong else "", f" {row.mood}" if row.mood else ""
        name = text(f"name end{strong}", across.start - 14, 4, row.name)
        label = text(f"value{strong}{mood}", across.end + 14, 4, row.label)
        inside = hover("\n".join([row.name, *row.tips]), hit + name + row.marks + label)
        parts.append(f'<g transform="translate(0 {top + height / 2:.1f})">{inside}</g>')
    spoken = f"{title}: {'; '.join(f'{row.name} {row.label}' for row in rows)}"
    return drawing(WIDTH, base + 42, spoken, "".join(parts))


def _whisker(
    kind: str, across: Scale, bounds: tuple[Number, Number, Number], place: tuple[Number, Number]
) -> str:
    """An interval with its point; `bounds` are low, high and the value, `place` y and the point's radius."""
    low, high, x = (across.pixel(value) for value in bounds)
    y, radius = place
    bar = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'<g class="whisker {kind}">{bar}{circle(x, y, radius)}</g>'


def _forest_scale(rows: Sequence[ForestRow]) -> Scale:
    """Wide enough for every interval and for zero, with some room, but not beyond +-100 points."""
    ends = [0.0]
    for row in rows:
        ends += [*row.interval, *(row.wide or ()), *row.seeds, row.value]
    low, high = max(min(ends), -100.0), min(max(ends), 100.0)
    room = max(0.06 * (high - low), MIN_RANGE / 2 if high - low < MIN_RANGE else 0.0)
    return Scale(low=low - room, high=high + room, start=190, end=WIDTH - 210)
