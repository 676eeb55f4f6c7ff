"""Charts as inline SVG: lines over steps, success with intervals, bars of seconds.

Colours are CSS classes (`c1` to `c6`, `grey`), so one drawing serves the light and the dark scheme. A chart
carries its values as JSON, from which a few lines of JavaScript show what lies under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from markupsafe import Markup

from tutti.report.formatting import Number, duration, percent, plain
from tutti.report.svg.axes import Scale, thin, value_scale

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One named line of a chart. `faint` is drawn thin behind the others and has no legend entry."""

    name: str
    xs: Sequence[Number]
    ys: Sequence[Number]
    colour: str
    kind: Literal["line", "faint", "points", "reference"] = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A finished drawing with its title, what it means, and its legend (name, colour, kind)."""

    title: str
    help: str
    svg: Markup
    legend: tuple[tuple[str, str, str], ...] = ()
    wide: bool = False


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
    strong: bool = field(default=False)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    help: str = "",
    log: bool | None = None,
    zero: bool = True,
    x_label: str = "optimizer step",
    marks: Sequence[tuple[Number, str]] = (),
) -> Chart:
    """Lines over steps. `unit` names the vertical axis; `log` None chooses by the spread of the values;
    `marks` are steps at which something begins, with its name."""
    drawn = [s for s in series if any(math.isfinite(y) for y in s.ys)]
    thinned = {id(s): thin(s.xs, s.ys) for s in drawn}
    xs = [x for s in drawn for x in s.xs]
    ys = _visible([y for s in drawn if s.kind == "faint" for y in s.ys], drawn)
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    across = Scale(low=low, high=high if high > low else low + 1, start=LEFT, end=WIDTH - RIGHT)
    up = value_scale(ys, HEIGHT - BOTTOM, TOP, log=log, zero=zero)
    axis = f"{unit} (log scale)" if up.log else unit
    parts = [frame(across, up, axis, x_label)]
    parts += [_mark(across.pixel(x), name) for x, name in marks if across.low <= x <= across.high]
    order = {"faint": 0, "reference": 1, "line": 2, "points": 3}
    for one in sorted(drawn, key=lambda s: order[s.kind]):
        parts.append(_draw(one, *thinned[id(one)], across, up))
    values = {
        "x": [across.low, across.high, LEFT, WIDTH - RIGHT],
        "label": x_label,
        "series": [
            {"name": s.name, "colour": s.colour, "unit": "" if unit in ("loss", "lambda") else unit}
            | {"xs": [short(x) for x in thinned[id(s)][0]], "ys": [short(y) for y in thinned[id(s)][1]]}
            for s in drawn
        ],
    }
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/>')
    svg = drawing(WIDTH, HEIGHT, spoken(title, drawn), "".join(parts), values)
    legend = tuple((s.name, s.colour, s.kind) for s in drawn if s.kind != "faint")
    return Chart(title=title, help=help, svg=svg, legend=legend)


def _mark(x: Number, name: str) -> str:
    """A thin upright line, with its name beside its upper end, on the side that has more room."""
    side, at = ("tick", x + 4) if x < (LEFT + WIDTH) / 2 else ("tick end", x - 4)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="{side}" x="{at:.1f}" y="{TOP + 9}">{escape(name)}</text>'
    )


def _visible(raw: list[Number], drawn: Sequence[Series]) -> list[Number]:
    """The values the vertical axis must show: all of them, but of the raw ones only the inner 99 %."""
    raw = sorted(y for y in raw if math.isfinite(y))
    cut = len(raw) // 200
    rest = [y for s in drawn if s.kind != "faint" for y in s.ys if math.isfinite(y)]
    return raw[cut : len(raw) - cut] + rest


def _draw(one: Series, xs: list[Number], ys: list[Number], across: Scale, up: Scale) -> str:
    points = [(across.pixel(x), up.pixel(y)) for x, y in zip(xs, ys, strict=True)]
    if one.kind == "points" or len(points) == 1:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return f'<g class="points {one.colour}"><polyline points="{path}"/>{dots}</g>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{one.kind} {one.colour}" points="{path}"/>'


def frame(across: Scale, up: Scale, unit: str, x_label: str) -> str:
    """Grid, axes and ticks of a chart over steps."""
    parts = []
    ticks = up.ticks()
    small = max(map(abs, ticks), default=1) < 0.005  # then all of them with an exponent, not some
    for tick in ticks:
        y = up.pixel(tick)
        label = f"{tick:.0e}".replace("e-0", "e-") if small and tick else plain(tick, 4)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 3.6:.1f}">{label}</text>')
    for tick in across.ticks(6):
        x = across.pixel(tick)
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{tick:,.0f}</text>')
    base, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    turn = f'transform="rotate(-90 11 {middle:.0f})"'
    parts.append(f'<text class="tick middle" x="11" y="{middle:.0f}" {turn}>{escape(unit)}</text>')
    return "".join(parts)


def success_chart(title: str, rows: Sequence[SuccessRow], help: str = "") -> Chart:
    """Point and interval of each task, its wrong-instruction control below, the expert as a tick."""
    width, left, right, row_height, top = 860, 150, 170, 34, 8
    height = top + row_height * len(rows) + 42
    across = Scale(low=0, high=1, start=left, end=width - right)
    base = top + row_height * len(rows) + 4
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = across.pixel(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{base + 16}">{percent(tick)}</text>')
    parts.append(f'<text class="tick middle" x="{across.pixel(0.5):.0f}" y="{base + 34}">success rate</text>')
    for index, row in enumerate(rows):
        y = top + row_height * (index + 0.5)
        if row.strong and index:
            line = y - row_height / 2
            parts.append(f'<line class="axis" x1="8" x2="{width - 8}" y1="{line:.1f}" y2="{line:.1f}"/>')
        parts.append(_success_row(row, y, across, left, width - right))
    legend = [("policy", "c1", "points")]
    if any(row.wrong for row in rows):
        legend.append(("wrong instruction", "c2", "hollow"))
    if any(row.expert is not None for row in rows):
        legend.append(("expert's ceiling", "grey", "tick"))
    svg = drawing(
        width, height, f"{title}: {', '.join(f'{r.task} {r.policy.label}' for r in rows)}", "".join(parts)
    )
    return Chart(title=title, help=help, svg=svg, legend=tuple(legend), wide=True)


def _success_row(row: SuccessRow, y: Number, across: Scale, left: Number, right: Number) -> str:
    strong = " strong" if row.strong else ""
    parts = [f'<text class="name end{strong}" x="{left - 14}" y="{y + 4:.1f}">{escape(row.task)}</text>']
    tips = [f"policy {row.policy.label}"]
    shift = 5 if row.wrong else 0
    if row.expert is not None:
        x = across.pixel(row.expert)
        parts.append(f'<line class="ceiling" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 11:.1f}" y2="{y + 11:.1f}"/>')
        tips.append(f"expert {percent(row.expert)}")
    for estimate, colour, level in ((row.wrong, "c2 hollow", y + 6), (row.policy, f"c1{strong}", y - shift)):
        if estimate is None:
            continue
        low, high, x = (across.pixel(v) for v in (estimate.low, estimate.high, estimate.rate))
        parts.append(
            f'<g class="whisker {colour}">'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{level:.1f}" y2="{level:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{level:.1f}" r="{4 if "hollow" in colour else 5.5}"/></g>'
        )
    if row.wrong:
        tips.append(f"wrong instruction {row.wrong.label}")
    parts.append(
        f'<text class="value{strong}" x="{right + 14}" y="{y + 4:.1f}">{escape(row.policy.label)}</text>'
    )
    tip = escape(f"{row.task}\n" + "\n".join(tips))
    hit = f'<rect class="hit" x="0" y="{y - 17:.1f}" width="860" height="34"/>'
    return f'<g data-tip="{tip}">{hit}{"".join(parts)}</g>'


def seconds_chart(title: str, seconds: dict[str, Number], help: str = "") -> Chart:
    """One bar for each stage of the pipeline, with its seconds."""
    width, left, right, row_height = 860, 150, 120, 28
    height = row_height * len(seconds) + 8
    across = Scale(low=0, high=max([*seconds.values(), 1e-9]), start=left, end=width - right)
    parts = []
    for index, (name, value) in enumerate(seconds.items()):
        y, end = row_height * index + 4, across.pixel(value)
        parts.append(
            f'<text class="name end" x="{left - 14}" y="{y + 15}">{escape(name)}</text>'
            f'<rect class="bar c1" x="{left}" y="{y + 2}" rx="2" height="16" '
            f'width="{max(1.0, end - left):.1f}"/>'
            f'<text class="value" x="{end + 9:.1f}" y="{y + 15}">{duration(value)}</text>'
        )
    spoken = f"{title}: " + ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    return Chart(title=title, help=help, svg=drawing(width, height, spoken, "".join(parts)), wide=True)


def drawing(width: Number, height: Number, spoken: str, inside: str, values: object | None = None) -> Markup:
    """The finished SVG; `spoken` is read out in its place. `inside` must be escaped already."""
    data = f' data-chart="{escape(json.dumps(values, separators=(",", ":")))}"' if values is not None else ""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(spoken)}"{data}>'
    return Markup(f"{head}{inside}</svg>")  # what came from outside went through escape


def spoken(title: str, drawn: Sequence[Series]) -> str:
    """What is read out in place of lines: where each begins and ends."""
    ends = []
    for one in drawn:
        ys = [y for y in one.ys if math.isfinite(y)]
        if one.kind != "faint" and ys:
            ends.append(f"{one.name} from {plain(ys[0])} to {plain(ys[-1])}")
    return f"{title}: {'; '.join(ends) if ends else 'nothing recorded'}"


def short(value: Number) -> Number:
    """The value with four digits, as it goes into the page's JSON."""
    if not math.isfinite(value):
        return 0.0
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")
