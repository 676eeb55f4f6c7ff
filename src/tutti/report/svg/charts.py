"""Charts over steps: lines, and shares of a whole as stacked areas.

A chart carries its values as JSON, from which a few lines of JavaScript show what lies under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Literal

import numpy as np
from markupsafe import Markup

from tutti.report.formatting import Number, plain
from tutti.report.svg.drawing import Chart, Point, Scale, circle, drawing, line, path, text, value_scale

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, WIDTH - 14, 14, HEIGHT - 40
STEP = "optimizer step"
MAX_POINTS, MAX_AREA_POINTS = 400, 200
DRAWN_FIRST = ("faint", "reference", "line", "points")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One named line of a chart. `faint` is drawn thin behind the others and has no legend entry."""

    name: str
    xs: Sequence[Number]
    ys: Sequence[Number]
    colour: str
    kind: Literal["line", "faint", "points", "reference"] = "line"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    help: str = "",
    log: bool | None = None,
    zero: bool = True,
    marks: Sequence[tuple[Number, str]] = (),
    along: str = STEP,
) -> Chart:
    """Lines over steps, or what `along` names. `unit` names the vertical axis; `log` None chooses by the
    spread of the values; `marks` are steps at which something begins, with its name."""
    series = [s for s in series if any(math.isfinite(y) for y in s.ys)]
    across = _step_scale([x for s in series for x in s.xs])
    up = value_scale(_visible(series), BOTTOM, TOP, log=log, zero=zero)
    parts = [_mark(across.pixel(x), name) for x, name in marks if across.low <= x <= across.high]
    drawn = [thin(s) for s in series]
    parts += [_draw(s, across, up) for s in sorted(drawn, key=lambda s: DRAWN_FIRST.index(s.kind))]
    axis = f"{unit} (log scale)" if up.log else unit
    shown_unit = "" if unit in ("loss", "lambda") else unit
    svg = _drawing(
        title, drawn, [_frame(across, up, axis, along), *parts], across, unit=shown_unit, along=along
    )
    legend = [(s.name, s.colour, s.kind) for s in drawn if s.kind != "faint"]
    return Chart(title=title, help=help, svg=svg, legend=legend)


def share_chart(
    title: str,
    steps: Sequence[int],
    shares: Mapping[str, Mapping[int, Number]],
    colours: Mapping[str, str],
    help: str = "",
) -> Chart:
    """Shares of a whole over steps, one area on another, in per cent. `shares` has name -> step -> fraction.

    A step without a record leaves a gap; a name without a value there has 0. Of a long run the means over
    MAX_AREA_POINTS stretches are drawn.
    """
    names = [name for name in shares if any(shares[name].get(step, 0) > 0 for step in steps)]
    recorded = {step for name in names for step in shares[name]}
    stretches = np.array_split(np.array(steps), min(len(steps), MAX_AREA_POINTS)) if steps else []
    xs = [int(stretch[len(stretch) // 2]) for stretch in stretches]
    tops = np.full((len(names) + 1, len(xs)), np.nan)  # of each area in per cent, from the base line up
    for at, stretch in enumerate(stretches):
        if known := [step for step in stretch.tolist() if step in recorded]:
            means = [fmean(shares[name].get(step, 0.0) for step in known) for name in names]
            tops[:, at] = 100 * np.cumsum([0.0, *means])
    across, up = _step_scale(steps), Scale(low=0, high=100, start=BOTTOM, end=TOP)
    parts: list[str] = []
    for gap, places in groupby(range(len(xs)), key=lambda at: bool(np.isnan(tops[0, at]))):
        stretch = list(places)
        for number, name in enumerate(names if not gap else ()):
            under, edge = (
                [(across.pixel(xs[at]), up.pixel(tops[row, at])) for at in stretch]
                for row in (number, number + 1)
            )
            if len(stretch) == 1:  # a single step is a bar
                under, edge = ([(x - 3, y), (x + 3, y)] for ((x, y),) in (under, edge))
            corners = path([*edge, *reversed(under)])
            parts.append(f'<polygon class="area {colours.get(name, "grey")}" points="{corners}"/>')
    known = np.isfinite(tops[0]).tolist()
    places = [x for x, is_known in zip(xs, known, strict=True) if is_known]
    series = [
        Series(name=name, xs=places, ys=heights.round(2).tolist(), colour=colours.get(name, "grey"))
        for name, heights in zip(names, np.diff(tops[:, known], axis=0), strict=True)
    ]
    svg = _drawing(title, series, [_frame(across, up, "%"), *parts], across, unit="%")
    return Chart(title=title, help=help, svg=svg, legend=[(s.name, s.colour, "square") for s in series])


def _drawing(
    title: str,
    series: Sequence[Series],
    parts: Sequence[str],
    across: Scale,
    *,
    unit: str,
    along: str = STEP,
) -> Markup:
    """The drawing with a cursor and the values that it shows; read out is where each line begins and ends."""
    values = {
        "x": [across.low, across.high, LEFT, RIGHT],
        "label": along,
        "series": [
            {"name": s.name, "colour": s.colour, "unit": unit}
            | {"xs": [_short(x) for x in s.xs], "ys": [_short(y) for y in s.ys]}
            for s in series
        ],
    }
    lines = [s for s in series if s.kind != "faint" and len(s.ys)]
    ends = "; ".join(f"{s.name} from {plain(s.ys[0])} to {plain(s.ys[-1])}" for s in lines)
    cursor = line("cursor", (0, TOP), (0, BOTTOM))
    return drawing((WIDTH, HEIGHT), f"{title}: {ends or 'nothing recorded'}", [*parts, cursor], values)


def _frame(across: Scale, up: Scale, axis: str, along: str = STEP) -> str:
    """Grid, axes and ticks."""
    middle, ticks = (TOP + BOTTOM) / 2, up.ticks()
    small = max(map(abs, ticks), default=1) < 0.005  # then all of them with an exponent, not some
    parts: list[str] = []
    for tick in ticks:
        y = up.pixel(tick)
        label = f"{tick:.0e}".replace("e-0", "e-") if small and tick else plain(tick, 4)
        parts += [line("grid", (LEFT, y), (RIGHT, y)), text("tick end", LEFT - 7, y + 3.6, label)]
    steps = across.ticks(6)
    parts += [text("tick middle", across.pixel(tick), BOTTOM + 16, f"{tick:,.0f}") for tick in steps]
    parts += [line("axis", (LEFT, BOTTOM), (RIGHT, BOTTOM)), text("tick end", RIGHT, HEIGHT - 6, along)]
    parts.append(text("tick middle", 11, middle, axis, f' transform="rotate(-90 11 {middle:.0f})"'))
    return "".join(parts)


def _draw(one: Series, across: Scale, up: Scale) -> str:
    points = [(across.pixel(x), up.pixel(y)) for x, y in zip(one.xs, one.ys, strict=True)]
    if one.kind == "points" or len(points) == 1:
        dots = "".join(circle(x, y, 3.2) for x, y in points)
        return f'<g class="points {one.colour}"><polyline points="{path(points)}"/>{dots}</g>'
    return f'<polyline class="{one.kind} {one.colour}" points="{path(points)}"/>'


def _mark(x: Number, name: str) -> str:
    """A thin upright line, with its name beside its upper end, on the side that has more room."""
    kind, at = ("tick", x + 4) if x < (LEFT + WIDTH) / 2 else ("tick end", x - 4)
    return line("mark", (x, TOP), (x, BOTTOM)) + text(kind, at, TOP + 9, name)


def _step_scale(steps: Sequence[Number]) -> Scale:
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    return Scale(low=low, high=high if high > low else low + 1, start=LEFT, end=RIGHT)


def _visible(series: Sequence[Series]) -> list[Number]:
    """The values that the vertical axis must show: all of them, but of the raw ones only the inner 99 %."""
    raw = sorted(y for s in series if s.kind == "faint" for y in s.ys if math.isfinite(y))
    cut = len(raw) // 200
    return raw[cut : len(raw) - cut] + [y for s in series if s.kind != "faint" for y in s.ys]


def thin(series: Series, max_points: int = MAX_POINTS) -> Series:
    """About `max_points` points, with each stretch's smallest and largest value (so spikes stay)."""
    points: list[Point] = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(y)]
    if len(points) > max_points:
        stretch = math.ceil(2 * len(points) / max_points)
        parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
        extremes = [{min(part, key=itemgetter(1)), max(part, key=itemgetter(1))} for part in parts]
        points = [points[0], *(point for pair in extremes for point in sorted(pair)), points[-1]]
    return replace(series, xs=[x for x, _ in points], ys=[y for _, y in points])


def _short(value: Number) -> Number:
    """The value with four digits, as it goes into the page's JSON."""
    if not math.isfinite(value):
        return 0.0
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")
