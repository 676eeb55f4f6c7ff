"""Charts over steps as data: which metrics they show, in which style; and how they are drawn from records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from scipy.signal import lfilter

from tutti.report.formatting import Number
from tutti.report.records import Records
from tutti.report.svg.charts import Series, line_chart
from tutti.report.svg.drawing import Chart
from tutti.training.metric_names import describe_metric

MIN_TO_SMOOTH = 30
"""Records below which smoothing hides more than it shows."""
SMOOTHING, SMOOTHING_OF_DIAGNOSTICS = 0.01, 0.03
"""The share of the records over which a line is smoothed; there are fewer diagnostic steps."""
TERM_COLOURS = {"action": "c1", "align": "c2", "recon": "c3", "total": "c6"}
SPARE = ("c4", "c5", "c6")
Style = Literal["exact", "smooth", "curve", "reference", "points"]


class Line(NamedTuple):
    """A metric in a chart; with `*` in its name a line for each name of the chart's `each` that was recorded.

    `curve` is `smooth` with each record behind it, drawn faint; `reference` is smooth and dashed.
    """

    metric: str
    label: str = "*"
    colour: str = ""
    style: Style = "smooth"
    factor: Number = 1


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart over steps. `help` is an explanation or the metric that has it; `each` has the names that `*`
    of a line stands for, with their colours; `levels` are (value, name, colour) of straight lines."""

    title: str
    unit: str
    lines: Sequence[Line]
    help: str = ""
    each: Mapping[str, str] = field(default_factory=dict)
    levels: Sequence[tuple[Number, str, str]] = ()
    log: bool | None = None
    zero: bool = True
    marks: Sequence[tuple[Number, str]] = ()


def draw(records: Records, plots: Iterable[Plot]) -> list[Chart]:
    """The charts of which something was recorded."""
    charts: list[Chart] = []
    for plot in plots:
        series = [one for line in plot.lines for one in _series(records, line, plot.each)]
        if series:
            steps = [step for one in series for step in one.xs]
            for value, name, colour in plot.levels:
                ends, ys = (min(steps), max(steps)), (value, value)
                series.append(Series(name=name, xs=ends, ys=ys, colour=colour, kind="reference"))
            help = describe_metric(plot.help) or plot.help
            style = {"log": plot.log, "zero": plot.zero}
            charts.append(
                line_chart(plot.title, series, unit=plot.unit, help=help, marks=plot.marks, **style)
            )
    return charts


def shown_in(plots: Iterable[Plot]) -> set[str]:
    """The names of the metrics that the charts show where they were recorded."""
    lines = [(line, name) for plot in plots for line in plot.lines for name in [*plot.each, ""]]
    return {line.metric.replace("*", name) for line, name in lines}


def _series(records: Records, line: Line, each: Mapping[str, str]) -> Iterator[Series]:
    metric, label, colour, style, factor = line
    for name, own_colour in each.items() if "*" in metric else [("", colour)]:
        steps, values = records.get(metric.replace("*", name))
        if not steps:
            continue
        ys = [factor * value for value in values]
        said = label.replace("*", name.replace("~", ", "))
        one = {"xs": steps, "colour": colour or own_colour}
        many = len(steps) >= MIN_TO_SMOOTH
        if many and style == "curve":
            yield Series(name=f"{said}, each record", ys=ys, kind="faint", **one)
        if many and style not in ("exact", "points"):
            ys = smooth(ys, SMOOTHING_OF_DIAGNOSTICS if metric.startswith("diag/") else SMOOTHING)
        kind = style if style in ("reference", "points") else "line"
        yield Series(name=said, ys=ys, kind=kind, **one)


def term_colours(terms: Iterable[str]) -> dict[str, str]:
    """One colour for each term, the same in every chart."""
    spare = iter(SPARE * 20)
    return {term: TERM_COLOURS.get(term) or next(spare) for term in terms}


def smooth(values: Sequence[Number], share: Number = SMOOTHING) -> list[Number]:
    """Mean weighted by d^|distance|, to both sides alike, so that a falling curve is not drawn late.

    s_t = sum_k d^|t-k| x_k / sum_k d^|t-k| with d = exp(-1 / (share * points)); values that are not finite
    are left out.
    """
    keep = math.exp(-1 / max(1.0, share * len(values)))
    known = np.isfinite(values)
    tops_and_weights = np.stack([np.where(known, values, 0.0), known])
    before, after = (  # y_t = x_t + d y_{t-1}, in both directions
        np.asarray(lfilter([1.0], [1.0, -keep], one)) for one in (tops_and_weights, tops_and_weights[:, ::-1])
    )
    tops, weights = before + after[:, ::-1] - tops_and_weights  # which is in both
    with np.errstate(invalid="ignore"):
        return (tops / weights).tolist()
