"""Series of the charts over steps, from the records of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tutti.report.formatting import Number
from tutti.report.inputs import Records
from tutti.report.svg.axes import smooth
from tutti.report.svg.charts import Series

MIN_TO_SMOOTH = 30
"""Records below which smoothing hides more than it shows."""
COLOURS = {"action": "c1", "align": "c2", "recon": "c3", "total": "c6"}
SPARE = ("c4", "c5", "c6")


def term_colours(terms: Iterable[str]) -> dict[str, str]:
    """One colour for each term, the same in every chart."""
    spare = iter(SPARE * 20)
    return {term: COLOURS.get(term) or next(spare) for term in terms}


def series(
    records: Records,
    name: str,
    label: str,
    colour: str,
    *,
    kind: Literal["line", "faint", "points", "reference"] = "line",
    factor: Number = 1,
    smoothing: Number = 0.0,
) -> list[Series]:
    """The values of a metric times `factor`, smoothed over a share of the records; none if not recorded."""
    steps, values = records.get(name)
    ys = smooth(values, smoothing) if smoothing else values
    ys = ys if factor == 1 else [factor * y for y in ys]
    return [Series(name=label, xs=steps, ys=ys, colour=colour, kind=kind)] if steps else []


def smoothed(records: Records, name: str, label: str, colour: str, factor: Number = 1) -> list[Series]:
    """A metric's smoothed line over each record, drawn faint; few records are drawn as they are."""
    if len(records.get(name)[0]) < MIN_TO_SMOOTH:
        return series(records, name, label, colour, factor=factor)
    return [
        *series(records, name, f"{label}, each record", colour, kind="faint", factor=factor),
        *series(records, name, label, colour, factor=factor, smoothing=0.01),
    ]


def level(steps: tuple[Number, Number], value: Number, label: str, colour: str) -> Series:
    """A straight line at `value`, from the first to the last of `steps`."""
    return Series(name=label, xs=steps, ys=[value, value], colour=colour, kind="reference")
