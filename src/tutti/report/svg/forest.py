"""A forest plot: differences against a baseline, each with its intervals, around a line at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tutti.report.formatting import Number
from tutti.report.svg.axes import Scale
from tutti.report.svg.charts import Chart, drawing

WIDTH, LEFT, RIGHT, TOP, ROW = 860, 190, 210, 8, 36
MIN_RANGE = 5.0


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


def forest_chart(title: str, rows: Sequence[ForestRow], *, baseline: str, help: str = "") -> Chart:
    """The differences in points of success; what an interval has outside +-100 points is cut off."""
    height = TOP + ROW * len(rows) + 46
    base = TOP + ROW * len(rows) + 4
    across = _scale(rows)
    parts: list[str] = []
    for tick in across.ticks(7):
        x = across.pixel(tick)
        kind, words = ("zero", "0") if tick == 0 else ("grid", f"{tick:+g}")
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{base + 16}">{words}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    axis = escape(f"points of success, minus {baseline}")
    parts.append(f'<text class="tick middle" x="{middle:.0f}" y="{base + 36}">{axis}</text>')
    parts += [_row(row, TOP + ROW * (index + 0.5), across) for index, row in enumerate(rows)]
    spoken = f"{title}: {'; '.join(f'{row.name} {row.label}' for row in rows)}"
    legend = (
        ("paired bootstrap", "c1", "line"),
        ("t over seeds", "grey", "reference"),
        ("a seed", "c2", "hollow"),
    )
    svg = drawing(WIDTH, height, spoken, "".join(parts))
    return Chart(title=title, help=help, svg=svg, legend=legend, wide=True)


def _scale(rows: Sequence[ForestRow]) -> Scale:
    """Wide enough for every interval and for zero, with some room, but not beyond +-100 points."""
    ends = [0.0]
    for row in rows:
        ends += [*row.interval, *(row.wide or ()), *row.seeds, row.value]
    low, high = max(min(ends), -100.0), min(max(ends), 100.0)
    room = max(0.06 * (high - low), MIN_RANGE / 2 if high - low < MIN_RANGE else 0.0)
    return Scale(low=low - room, high=high + room, start=LEFT, end=WIDTH - RIGHT)


def _row(row: ForestRow, y: Number, across: Scale) -> str:
    low, high, x = (across.pixel(value) for value in (*row.interval, row.value))
    parts = [f'<text class="name end" x="{LEFT - 14}" y="{y + 4:.1f}">{escape(row.name)}</text>']
    if row.wide is not None:
        start, end = (across.pixel(value) for value in row.wide)
        parts.append(
            f'<line class="wide-interval" x1="{start:.1f}" x2="{end:.1f}" y1="{y + 7:.1f}" y2="{y + 7:.1f}"/>'
        )
    for seed in row.seeds:
        parts.append(
            f'<g class="whisker c2 hollow"><circle cx="{across.pixel(seed):.1f}" cy="{y + 7:.1f}" r="3"/></g>'
        )
    parts.append(
        f'<g class="whisker c1"><line x1="{low:.1f}" x2="{high:.1f}" y1="{y - 3:.1f}" y2="{y - 3:.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y - 3:.1f}" r="5"/></g>'
    )
    mood = f" {row.mood}" if row.mood else ""
    parts.append(
        f'<text class="value{mood}" x="{WIDTH - RIGHT + 14}" y="{y + 4:.1f}">{escape(row.label)}</text>'
    )
    tip = escape(
        f"{row.name}\n{row.value:+.1f} points"
        f"\npaired bootstrap {row.interval[0]:+.1f} to {row.interval[1]:+.1f}"
        + (f"\nt over seeds {row.wide[0]:+.1f} to {row.wide[1]:+.1f}" if row.wide else "")
        + f"\neach seed {', '.join(f'{seed:+.1f}' for seed in row.seeds)}"
    )
    hit = f'<rect class="hit" x="0" y="{y - ROW / 2:.1f}" width="{WIDTH}" height="{ROW}"/>'
    return f'<g data-tip="{tip}">{hit}{"".join(parts)}</g>'
