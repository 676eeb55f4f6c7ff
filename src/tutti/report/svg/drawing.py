"""What all charts share: SVG elements, and scales from values to pixels with round ticks.

Everything that comes from outside is escaped here. Colours are CSS classes (`c1` to `c6`, `grey`), so one
drawing serves the light and the dark scheme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from tutti.report.formatting import Number

Point = tuple[Number, Number]
ALONE = (
    "text{font:13px sans-serif;fill:#20262e} .title{font-weight:600;font-size:14px} .end{text-anchor:end} "
    ".middle{text-anchor:middle} .tick{font-size:11px;fill:#5b6470} .below{font-size:11px} .on{fill:#fff} "
    ".strong{font-weight:600} .key{font-size:12px;fill:#5b6470;stroke-width:2} polyline{stroke-width:1.9} "
    "polyline,line{fill:none;stroke:currentColor} .reference,.wide-interval{stroke-dasharray:5 4} "
    ".faint{stroke-width:1;opacity:.26} .points polyline{stroke-width:1;opacity:.55} "
    ".reference{stroke-width:1.4} .whisker line,.ceiling{stroke-width:2.2} .area{opacity:.82} "
    ".heat,.bar,.area,circle{fill:currentColor} .hollow circle{fill:#fff;stroke:currentColor;stroke-width:2} "
    ".cursor,.hit{display:none} "
    ".grid,.axis{stroke:#d5d9de} .mark,.zero,.ceiling,.wide-interval{stroke:#8b929c} .grey{color:#8b929c} "
    ".c1{color:#1f6fb2} .c2{color:#d0702a} .c3{color:#2c8a63} .c4{color:#7d5bb0} .c5{color:#b2476a} "
    ".c6{color:#3c4450} .good{fill:#1d7a4f} .bad{fill:#b3372f}"
)
"""The style of a chart outside of the report, whose page has its own."""
KEY, KEY_ROW, LETTER = 16, 18, 6.3
"""Of a legend in pixels: the width of a sign, the height of a row, about the width of a letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A finished drawing with its title, an explanation, and its legend (name, colour, kind).

    `narrow` is another drawing of the same, for narrow windows.
    """

    title: str
    help: str
    svg: Markup
    legend: Sequence[tuple[str, str, str]] = ()
    wide: bool = False
    narrow: str | Markup = ""

    def _repr_svg_(self) -> str:
        """The drawing by itself, as a notebook shows it: on a card of its own, so that it can be read on a
        light and on a dark page."""
        start = self.svg.index(">") + 1
        _, _, width, height = self.svg[: start - 1].split('viewBox="')[1].split('"')[0].split()
        keys, rows = _legend(self.legend, float(width))
        top = 30 + KEY_ROW * rows
        wide, tall = float(width) + 24, float(height) + top + 12
        keys = f'<g transform="translate(0 {4 - KEY_ROW * rows})">{keys}</g>' if rows else ""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 {-top} {wide:g} {tall:g}" '
        card = f'<rect x="-12" y="{-top}" width="{wide:g}" height="{tall:g}" rx="8" fill="#fff"/>'
        title = text("title", 0, 22 - top, self.title)
        return f'{head}width="{wide:g}"><style>{ALONE}</style>{card}{title}{keys}{self.svg[start:]}'


def _legend(keys: Sequence[tuple[str, str, str]], width: Number) -> tuple[str, int]:
    """The signs of a legend with their names, in as many rows as it takes, and the number of rows."""
    parts: list[str] = []
    x, row = 0.0, 0
    for name, colour, kind in keys:
        if x and x + KEY + 6 + LETTER * len(name) > width:
            x, row = 0.0, row + 1
        y = KEY_ROW * row
        if kind in ("points", "hollow", "square"):
            sign = f'<g class="{kind}">{circle(x + KEY / 2, y, 4)}</g>'
        else:
            lies = kind != "tick"
            ends = ((x, y), (x + KEY, y)) if lies else ((x + KEY / 2, y - 6), (x + KEY / 2, y + 6))
            sign = line(f"{kind} key", *ends)
        parts.append(f'<g class="{colour}">{sign}</g>{text("key", x + KEY + 6, y + 4, name)}')
        x += KEY + 20 + LETTER * len(name)
    return "".join(parts), row + 1 if parts else 0


def drawing(
    size: Point, spoken: str, parts: Iterable[str], values: object = None, *, kind: str = ""
) -> Markup:
    """The finished SVG of the CSS class `kind`. Screen readers get `spoken`; `values` are JSON for the script
    of the page. The labels of a "plot" grow in a narrow window, as those of a drawing with values do."""
    width, height = size
    data = f' data-chart="{escape(json.dumps(values, separators=(",", ":")))}"' if values is not None else ""
    named = f' class="{kind}"' if kind else ""
    head = f'<svg viewBox="0 0 {width} {height}"{named} role="img" aria-label="{escape(spoken)}"{data}>'
    return Markup(f"{head}{''.join(parts)}</svg>")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A straight or logarithmic map from [low, high] to the pixels [start, end]."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def pixel(self, value: Number) -> Number:
        """The pixel of `value`; what lies outside is cut to the edge, so a spike stays in the picture."""
        low, high, value = self.low, self.high, max(value, self.low)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[Number]:
        """Round values inside [low, high]; on a straight scale about `wanted`."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, math.ceil(len(decades) / 7))
            steps = (1, 2, 5) if len(decades) <= 3 else (1,)
            ticks = [m * 10.0**d for d in decades[::every] for m in steps]
            return [t for t in ticks if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def value_scale(
    values: Sequence[Number], start: Number, end: Number, *, log: bool | None = None, zero: bool = True
) -> Scale:
    """The scale for these values; `log` None takes a log scale where they span more than a factor 40.

    A linear scale begins at 0 if `zero`, else a little below the smallest value.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low > 0 and (log or (log is None and high / low > 40)):
        return Scale(low=low / 1.15, high=high * 1.15, start=start, end=end, log=True)
    if zero and low >= 0:
        low = 0.0
    if low == high == 0:  # nothing but zeros: an axis of ordinary numbers
        high = 1.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - max(abs(low) * 0.1, 1e-9), high + max(abs(high) * 0.1, 1e-9)
    room = 0.06 * (high - low)
    return Scale(low=low if low == 0 else low - room, high=high + room, start=start, end=end)
