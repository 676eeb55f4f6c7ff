"""Charts of a search: what each key came to, and parallel coordinates of all trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tutti.report.formatting import Number
from tutti.report.svg.drawing import Chart, Scale, circle, drawing, hover, line, path, text, value_scale

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 250, 58, 546, 14, 210
BESIDE, MOST_BESIDE = 7, 15
"""Pixels between trials of one choice, and how many stand side by side."""
WIDE, AXES_TOP, AXES_BOTTOM, AXES_LEFT, AXES_RIGHT = 860, 40, 260, 90, 790


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One searched key: a range, whose `ends` are shown though no trial lies there, or the labels of its
    choices in their order."""

    name: str
    labels: Sequence[str] = ()
    log: bool = False
    ends: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A trial: its places (value or label, None where the key was not searched), its value with an interval
    (None: not known), whether it reached the top, and what the pointer shows."""

    places: Sequence[float | str | None]
    value: float
    interval: tuple[float, float] | None
    top: bool
    strong: bool
    tip: str


def response_chart(
    axis: Axis, number: int, dots: Sequence[Dot], *, unit: str, help: str, default: float | None = None
) -> Chart:
    """The value of each trial over one key; hollow and pale where a trial ended before the top. `default` is
    the value of the config as it is, a dashed line."""
    known = [(one, place) for one in dots if (place := one.places[number]) is not None]
    across = _scale(axis, [place for _, place in known], LEFT, RIGHT)
    ends = [end for one, _ in known for end in (one.value, *(one.interval or ()))]
    up = value_scale([*ends, *([] if default is None else [default])], BOTTOM, TOP, log=False)
    parts = [line("axis", (LEFT, BOTTOM), (RIGHT, BOTTOM))]
    for tick in up.ticks():
        y = up.pixel(tick)
        parts += [line("grid", (LEFT, y), (RIGHT, y)), text("tick end", LEFT - 8, y + 4, f"{tick:g}")]
    parts += [text("tick middle", x, BOTTOM + 18, words) for x, words in _ticks(axis, across)]
    parts += [text("tick middle", (LEFT + RIGHT) / 2, HEIGHT - 4, f"{axis.name}; upwards: {unit}")]
    if default is not None:
        y = up.pixel(default)
        parts.append(line("mark", (LEFT, y), (RIGHT, y)))
    beside, count = Counter[float | str](), Counter(place for _, place in known)
    for one, place in sorted(known, key=lambda pair: pair[0].strong):
        x, y = across.pixel(_number(axis, place)), up.pixel(one.value)
        if axis.labels:  # trials of one choice stand side by side
            x += BESIDE * (beside[place] % MOST_BESIDE - (min(count[place], MOST_BESIDE) - 1) / 2)
            beside[place] += 1
        ends = [up.pixel(end) for end in one.interval or ()]
        bar = line("", (x, ends[0]), (x, ends[1])) if ends else ""
        kind = "c1" if one.top else "grey hollow"
        mark = f'<g class="whisker {"c2" if one.strong else kind}">{bar}{circle(x, y, 4)}</g>'
        parts.append(hover(one.tip, mark))
    svg = drawing((WIDTH, HEIGHT), f"{axis.name} against {unit}: {len(known)} trials", parts, kind="plot")
    legend = _legend([one for one, _ in known], "points", "hollow")
    legend += [("the default", "grey", "reference")] * (default is not None)
    return Chart(title=axis.name, help=help, svg=svg, legend=legend)


def _legend(dots: Sequence[Dot], line: str, pale: str) -> list[tuple[str, str, str]]:
    """The signs that a chart of these trials has."""
    signs = [
        (any(one.strong for one in dots), ("the best", "c2", line.replace("faint", "line"))),
        (any(one.top and not one.strong for one in dots), ("to the top", "c1", line)),
        (any(not one.top for one in dots), ("ended before", "grey", pale)),
    ]
    return [sign for there, sign in signs if there]


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of dotted names, as many as it takes to tell them apart.

    >>> short_names(["training.lr", "objective.align.share", "objective.recon.share"])
    ['lr', 'align.share', 'recon.share']
    """
    parts = [name.split(".") for name in names]
    found: list[str] = []
    for own in parts:
        tails = ([other[-count:] for other in parts] for count in range(1, len(own) + 1))
        count = next((n for n, all_ in enumerate(tails, 1) if all_.count(own[-n:]) == 1), len(own))
        found.append(".".join(own[-count:]))
    return found


def parallel_chart(title: str, axes: Sequence[Axis], dots: Sequence[Dot], *, unit: str, help: str) -> Chart:
    """A line for each trial through its values on upright axes, the last of which is what it came to."""
    count = len(axes)
    xs = [AXES_LEFT + (AXES_RIGHT - AXES_LEFT) * place / count for place in range(count + 1)]
    scales = [
        _scale(axis, [p for one in dots if (p := one.places[n]) is not None], AXES_BOTTOM, AXES_TOP)
        for n, axis in enumerate(axes)
    ]
    last = value_scale([one.value for one in dots], AXES_BOTTOM, AXES_TOP, log=False, zero=False)
    parts: list[str] = []
    names = [*short_names([axis.name for axis in axes]), unit]
    for number, (x, name) in enumerate(zip(xs, names, strict=True)):
        parts += [
            line("axis", (x, AXES_TOP), (x, AXES_BOTTOM)),
            text("tick middle", x, 16 + 14 * (number % 2), name),
        ]
        ticks = _ticks(axes[number], scales[number]) if number < count else _ticks(Axis(name=""), last)
        parts += [text("tick end", x - 5, y + 4, words) for y, words in ticks]
    for one in sorted(dots, key=lambda one: (one.strong, one.top)):
        points = [
            (x, scale.pixel(_number(axis, place)))
            for x, axis, scale, place in zip(xs, axes, scales, one.places, strict=False)
            if place is not None
        ]
        points.append((xs[-1], last.pixel(one.value)))
        colour, kind = ("c2", "line") if one.strong else ("c1" if one.top else "grey", "faint")
        drawn = f'<g class="{colour}"><polyline class="{kind}" points="{path(points)}"/></g>'
        parts.append(hover(one.tip, drawn))
    svg = drawing((WIDE, AXES_BOTTOM + 20), f"{title}: {len(dots)} trials over {count} keys", parts)
    legend = _legend(dots, "faint", "faint")
    return Chart(title=title, help=help, svg=svg, legend=legend, wide=True)


def _scale(axis: Axis, places: Sequence[float | str], start: Number, end: Number) -> Scale:
    if axis.labels:
        return Scale(low=-0.5, high=len(axis.labels) - 0.5, start=start, end=end)
    known = [*axis.ends, *(_number(axis, place) for place in places)]
    return value_scale(known, start, end, log=axis.log, zero=False)


def _number(axis: Axis, place: float | str) -> float:
    return float(axis.labels.index(str(place))) if axis.labels else float(place)


def _ticks(axis: Axis, scale: Scale) -> list[tuple[Number, str]]:
    if axis.labels:
        return [(scale.pixel(number), name.strip('"')[:18]) for number, name in enumerate(axis.labels)]
    return [(scale.pixel(tick), f"{tick:g}") for tick in scale.ticks()]
