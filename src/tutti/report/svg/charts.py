"""Charts over steps: lines, and shares of a whole as stacked areas.

A chart carries its values as JSON, from which a few lines of JavaScript show what lies under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup

from tutti.report.formatting import Number, plain
from tutti.report.svg.axes import Scale, thin, value_scale
from tutti.report.svg.elements import Chart, circle, drawing, line, path, text

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 40
STEP = "optimizer step"
MAX_POINTS = 200
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
) -> Chart:
    """Lines over steps. `unit` names the vertical axis; `log` None chooses by the spread of the values;
    `marks` are steps at which something begins, with its name."""
    series = [s for s in series if any(math.isfinite(y) for y in s.ys)]
    across = _step_scale([x for s in series for x in s.xs])
    up = value_scale(_visible(series), HEIGHT - BOTTOM, TOP, log=log, zero=zero)
    parts = [_mark(across.pixel(x), name) for x, name in marks if across.low <= x <= across.high]
    drawn = [replace(s, **dict(zip(("xs", "ys"), thin(s.xs, s.ys), strict=True))) for s in series]
    parts += [_draw(s, across, up) for s in sorted(drawn, key=lambda s: DRAWN_FIRST.index(s.kind))]
    axis = f"{unit} (log scale)" if up.log else unit
    shown_unit = "" if unit in ("loss", "lambda") else unit
    svg = _drawing(title, drawn, [_frame(across, up, axis), *parts], across, unit=shown_unit)
    legend = tuple((s.name, s.colour, s.kind) for s in drawn if s.kind != "faint")
    return Chart(title=title, help=help, svg=svg, legend=legend)


def share_chart(
    title: str,
    steps: Sequence[int],
    shares: Mapping[str, Mapping[int, Number]],
    colours: Mapping[str, str],
    help: str = "",
) -> Chart:
    """Shares of a whole over steps, one area on another, in per cent. `shares` has name -> step -> fraction.

    A step without a record leaves a gap; a name without a value there has 0.
    """
    names = [name for name in shares if any(shares[name].get(step, 0) > 0 for step in steps)]
    xs, columns = _mean_shares(steps, [shares[name] for name in names])
    across, up = _step_scale(steps), Scale(low=0, high=100, start=HEIGHT - BOTTOM, end=TOP)
    parts: list[str] = []
    for stretch in _stretches(columns):
        base = [0.0] * len(stretch)
        for number, name in enumerate(names):
            top = [under + 100 * columns[at][number] for under, at in zip(base, stretch, strict=True)]
            edge = [(across.pixel(xs[at]), up.pixel(y)) for at, y in zip(stretch, top, strict=True)]
            under = [(across.pixel(xs[at]), up.pixel(y)) for at, y in zip(stretch, base, strict=True)]
            if len(stretch) == 1:  # a single step is a bar
                edge, under = ([(x - 3, y), (x + 3, y)] for ((x, y),) in (edge, under))
            corners = path([*edge, *reversed(under)])
            parts.append(f'<polygon class="area {colours.get(name, "grey")}" points="{corners}"/>')
            base = top
    known = [at for at, column in enumerate(columns) if column]
    series = [
        Series(
            name=name,
            xs=[xs[at] for at in known],
            ys=[round(100 * columns[at][number], 2) for at in known],
            colour=colours.get(name, "grey"),
        )
        for number, name in enumerate(names)
    ]
    svg = _drawing(title, series, [_frame(across, up, "%"), *parts], across, unit="%")
    legend = tuple((s.name, s.colour, "square") for s in series)
    return Chart(title=title, help=help, svg=svg, legend=legend)


def _drawing(
    title: str, series: Sequence[Series], parts: Sequence[str], across: Scale, *, unit: str
) -> Markup:
    """The drawing with a cursor and the values that it shows; read out is where each line begins and ends."""
    values = {
        "x": [across.low, across.high, LEFT, WIDTH - RIGHT],
        "label": STEP,
        "series": [
            {"name": s.name, "colour": s.colour, "unit": unit}
            | {"xs": [_short(x) for x in s.xs], "ys": [_short(y) for y in s.ys]}
            for s in series
        ],
    }
    lines = [s for s in series if s.kind != "faint" and s.ys]
    ends = "; ".join(f"{s.name} from {plain(s.ys[0])} to {plain(s.ys[-1])}" for s in lines)
    inside = "".join([*parts, line("cursor", (0, TOP), (0, HEIGHT - BOTTOM))])
    return drawing(WIDTH, HEIGHT, f"{title}: {ends or 'nothing recorded'}", inside, values)


def _frame(across: Scale, up: Scale, axis: str) -> str:
    """Grid, axes and ticks."""
    base, right, middle = HEIGHT - BOTTOM, WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2
    ticks = up.ticks()
    small = max(map(abs, ticks), default=1) < 0.005  # then all of them with an exponent, not some
    parts: list[str] = []
    for tick in ticks:
        y = up.pixel(tick)
        label = f"{tick:.0e}".replace("e-0", "e-") if small and tick else plain(tick, 4)
        parts += [line("grid", (LEFT, y), (right, y)), text("tick end", LEFT - 7, y + 3.6, label)]
    parts += [text("tick middle", across.pixel(tick), base + 16, f"{tick:,.0f}") for tick in across.ticks(6)]
    parts += [line("axis", (LEFT, base), (right, base)), text("tick end", right, HEIGHT - 6, STEP)]
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
    return line("mark", (x, TOP), (x, HEIGHT - BOTTOM)) + text(kind, at, TOP + 9, name)


def _step_scale(steps: Sequence[Number]) -> Scale:
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    return Scale(low=low, high=high if high > low else low + 1, start=LEFT, end=WIDTH - RIGHT)


def _visible(series: Sequence[Series]) -> list[Number]:
    """The values that the vertical axis must show: all of them, but of the raw ones only the inner 99 %."""
    raw = sorted(y for s in series if s.kind == "faint" for y in s.ys if math.isfinite(y))
    cut = len(raw) // 200
    rest = [y for s in series if s.kind != "faint" for y in s.ys if math.isfinite(y)]
    return raw[cut : len(raw) - cut] + rest


def _mean_shares(
    steps: Sequence[int], shares: Sequence[Mapping[int, Number]]
) -> tuple[list[Number], list[list[float]]]:
    """At most MAX_POINTS steps with the mean shares around them; an empty list where nothing is recorded."""
    every = math.ceil(len(steps) / MAX_POINTS) or 1
    xs: list[Number] = []
    columns: list[list[float]] = []
    for start in range(0, len(steps), every):
        stretch = steps[start : start + every]
        recorded = [step for step in stretch if any(step in values for values in shares)]
        xs.append(stretch[len(stretch) // 2])
        columns.append(
            [sum(values.get(step, 0.0) for step in recorded) / len(recorded) for values in shares]
            if recorded
            else []
        )
    return xs, columns


def _stretches(columns: Sequence[Sequence[float]]) -> list[list[int]]:
    """The places of `columns` without a gap between them."""
    stretches: list[list[int]] = [[]]
    for place, column in enumerate(columns):
        if column:
            stretches[-1].append(place)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _short(value: Number) -> Number:
    """The value with four digits, as it goes into the page's JSON."""
    if not math.isfinite(value):
        return 0.0
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")
