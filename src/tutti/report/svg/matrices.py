"""Two drawings of a matrix: rows by columns as shaded cells, and shares of a whole as areas over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from tutti.report.formatting import NOTHING, Number, percent
from tutti.report.svg.axes import Scale
from tutti.report.svg.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Series,
    drawing,
    frame,
    short,
    spoken,
)

MAX_POINTS = 200
STEP = "optimizer step"
LABELS, TOP_LABELS, ROW = 118, 26, 36
MIN_SHOWN = 0.0005
DARK = 0.65  # a cell as dark as this carries light letters


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
    words = words or {}
    height = TOP_LABELS + ROW * len(rows) + 6
    cell = (WIDTH - LABELS - 4) / max(1, len(columns))
    parts: list[str] = []
    for place, column in enumerate(columns):
        x = LABELS + cell * (place + 0.5)
        parts.append(f'<text class="name middle" x="{x:.1f}" y="{TOP_LABELS - 9}">{escape(column)}</text>')
        if column in words:
            y = TOP_LABELS + ROW * len(rows) / 2 + 4
            parts.append(f'<text class="tick middle" x="{x:.1f}" y="{y:.1f}">{escape(words[column])}</text>')
    for line, row in enumerate(rows):
        y = TOP_LABELS + ROW * line
        parts.append(
            f'<text class="name end" x="{LABELS - 12}" y="{y + ROW / 2 + 4:.1f}">{escape(row)}</text>'
        )
        for place, column in enumerate(columns):
            if column not in words:
                tip = (tips or {}).get((row, column), f"{row}, {column}")
                box = (LABELS + cell * place, y, cell)
                parts.append(_cell(values.get((row, column)), box, colour, tip))
    said = "; ".join(
        f"{row} in {column} {percent(value)}"
        for (row, column), value in values.items()
        if math.isfinite(value)
    )
    svg = drawing(WIDTH, height, f"{title}: {said or 'nothing recorded'}", "".join(parts))
    return Chart(title=title, help=help, svg=svg)


def _cell(value: Number | None, box: tuple[Number, Number, Number], colour: str, tip: str) -> str:
    x, y, width = box
    known = value is not None and math.isfinite(value)
    depth = min(max(float(value), 0.0), 1.0) if known and value is not None else 0.0
    text = percent(depth, 1 if 0 < depth < 0.01 else 0) if known else NOTHING
    text = "&lt; 0.1 %" if 0 < depth < MIN_SHOWN else text
    light = " on" if depth >= DARK else ""
    return (
        f'<g data-tip="{escape(tip)}"><rect class="heat {colour}" x="{x + 2:.1f}" y="{y + 2:.1f}" rx="4" '
        f'width="{width - 4:.1f}" height="{ROW - 4}" fill-opacity="{0.05 + 0.9 * depth:.3f}"/>'
        f'<text class="cell middle{light}" x="{x + width / 2:.1f}" y="{y + ROW / 2 + 4.5:.1f}">{text}</text>'
        "</g>"
    )


def share_chart(
    title: str,
    steps: Sequence[int],
    shares: Mapping[str, Mapping[int, Number]],
    colours: Mapping[str, str],
    help: str = "",
) -> Chart:
    """Shares of a whole over steps, one area on another, in per cent. `shares` has name -> step -> fraction.

    A step at which nothing is recorded leaves a gap; a name without a value there has 0.
    """
    names = [name for name in shares if any(shares[name].get(step, 0) > 0 for step in steps)]
    xs, columns = _thinned(steps, [shares[name] for name in names])
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    across = Scale(low=low, high=high if high > low else low + 1, start=LEFT, end=WIDTH - RIGHT)
    up = Scale(low=0, high=100, start=HEIGHT - BOTTOM, end=TOP)
    parts = [frame(across, up, "%", STEP)]
    for piece in _pieces(xs, columns):
        base = [0.0] * len(piece)
        for number, name in enumerate(names):
            top = [under + 100 * columns[at][number] for under, at in zip(base, piece, strict=True)]
            edge = [(across.pixel(xs[at]), up.pixel(y)) for at, y in zip(piece, top, strict=True)]
            under = [(across.pixel(xs[at]), up.pixel(y)) for at, y in zip(piece, base, strict=True)]
            if len(piece) == 1:  # a single look is a bar
                edge, under = ([(x - 3, y), (x + 3, y)] for ((x, y),) in (edge, under))
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*edge, *reversed(under)])
            parts.append(f'<polygon class="area {colours.get(name, "grey")}" points="{path}"/>')
            base = top
    known = [at for at, column in enumerate(columns) if column]
    series = [
        Series(
            name=name,
            xs=[xs[at] for at in known],
            ys=[100 * columns[at][number] for at in known],
            colour=colours.get(name, "grey"),
        )
        for number, name in enumerate(names)
    ]
    values = {
        "x": [across.low, across.high, LEFT, WIDTH - RIGHT],
        "label": STEP,
        "series": [
            {"name": s.name, "colour": s.colour, "unit": "%"}
            | {"xs": [short(x) for x in s.xs], "ys": [short(round(y, 2)) for y in s.ys]}
            for s in series
        ],
    }
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/>')
    svg = drawing(WIDTH, HEIGHT, spoken(title, series), "".join(parts), values)
    return Chart(
        title=title, help=help, svg=svg, legend=tuple((n, colours.get(n, "grey"), "square") for n in names)
    )


def _thinned(
    steps: Sequence[int], shares: Sequence[Mapping[int, Number]]
) -> tuple[list[Number], list[list[float]]]:
    """At most MAX_POINTS steps with the mean shares around them; an empty list where nothing is recorded."""
    every = math.ceil(len(steps) / MAX_POINTS) or 1
    xs: list[Number] = []
    columns: list[list[float]] = []
    for start in range(0, len(steps), every):
        stretch = steps[start : start + every]
        there = [step for step in stretch if any(step in own for own in shares)]
        xs.append(stretch[len(stretch) // 2])
        columns.append(
            [sum(own.get(step, 0.0) for step in there) / len(there) for own in shares] if there else []
        )
    return xs, columns


def _pieces(xs: Sequence[Number], columns: Sequence[Sequence[float]]) -> list[list[int]]:
    """The stretches without a gap, as places in `xs`."""
    pieces: list[list[int]] = [[]]
    for place in range(len(xs)):
        if columns[place]:
            pieces[-1].append(place)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
