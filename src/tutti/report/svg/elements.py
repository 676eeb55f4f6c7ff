"""SVG elements that all charts share. Everything that comes from outside is escaped here.

Colours are CSS classes (`c1` to `c6`, `grey`), so one drawing serves the light and the dark scheme.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from tutti.report.formatting import Number

Point = tuple[Number, Number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A finished drawing with its title, an explanation, and its legend (name, colour, kind)."""

    title: str
    help: str
    svg: Markup
    legend: tuple[tuple[str, str, str], ...] = ()
    wide: bool = False


def drawing(width: Number, height: Number, spoken: str, inside: str, values: object | None = None) -> Markup:
    """The finished SVG. Screen readers get `spoken`; `values` are JSON for the script of the page."""
    data = f' data-chart="{escape(json.dumps(values, separators=(",", ":")))}"' if values is not None else ""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(spoken)}"{data}>'
    return Markup(f"{head}{inside}</svg>")


def text(kind: str, x: Number, y: Number, words: str, more: str = "") -> str:
    """A text of the CSS classes `kind`; `more` are other attributes."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def line(kind: str, start: Point, end: Point) -> str:
    """A straight line of the CSS classes `kind`."""
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def path(points: Iterable[Point]) -> str:
    """Points as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def circle(x: Number, y: Number, radius: Number) -> str:
    """A circle around (x, y)."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def hover(tip: str, inside: str) -> str:
    """A group whose `tip` appears under the pointer."""
    return f'<g data-tip="{escape(tip)}">{inside}</g>'
