"""The page of a search: response curves, parallel coordinates, every trial, the confirmation, the cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutti.evaluation.statistics.intervals import wilson
from tutti.report.blocks import Block, Cell, Charts, Code, Facts, Note, Page, Section, Tile, render, table
from tutti.report.svg.trials import Axis, Dot, parallel_chart, response_chart
from tutti.runs.provenance import made_with
from tutti.storage.files import write_atomically
from tutti.studies.tune.found import Found, Tried, value_text
from tutti.studies.tune.space import DEFAULT
from tutti.studies.tune.trial import Search

CONFIRMED = "confirm/report.html, beside this page, has every start of every arm."
HELP = "Each dot is a trial. A whisker is Wilson's 95 % interval over its starts, of one training."


def write_page(made: Search, found: Found, circumstances: dict[str, Any], path: Path) -> None:
    """Writes the self-contained page."""
    axes = [
        Axis(
            name=key,
            labels=one.labels,
            log=one.log,
            ends=[end for end in (one.low, one.high) if end is not None],
        )
        for key, one in made.space.parameters.items()
    ]
    dots = [dot for one in found.trials if (dot := _dot(one, found, axes)) is not None]
    default = next((_value(one, found) for one in found.trials if one.control == DEFAULT), None)
    unit = "success, %" if found.plays else "minus the held-out error"
    charts = [
        response_chart(axis, number, dots, unit=unit, help=HELP, default=default)
        for number, axis in enumerate(axes)
        if any(dot.places[number] is not None for dot in dots)
    ]
    searched = [dot for dot in dots if any(place is not None for place in dot.places)]
    blocks: list[Block] = [Charts(charts=charts)]
    if searched:
        blocks.append(Charts(charts=[parallel_chart("All trials", axes, searched, unit=unit, help=HELP)]))
    rows = table(
        found.trials,
        [
            ("trial", "", lambda one: one.name),
            ("value", "", lambda one: value_text(one, found.plays)),
            ("errors by rung", "", lambda one: ", ".join(f"{at:,}: {-v:.4g}" for at, v in one.rungs.items())),
            ("steps", "", lambda one: f"{one.steps:,}"),
            (
                "changes",
                "",
                lambda one: Cell(text=one.refused or " ".join(one.overrides) or "none", mood="text"),
            ),
        ],
    )
    confirmed: list[Block] = [
        Note(text=f"{arm}: {one['text']}.", mood="good" if one["verdict"] == "better" else "")
        for arm, one in found.verdicts.items()
    ]
    cost = [
        (
            "trials",
            f"{len(found.trials)}, of them {sum(t.value is not None for t in found.trials)} to the top",
        ),
        ("steps of all trials", f"{sum(one.steps for one in found.trials):,}"),
        ("in whole trainings", f"{found.cost:.2f}"),
        ("rungs, steps", ", ".join(f"{steps:,}" for steps in made.rungs)),
        ("score", " + ".join(f"{weight:g} x {name}" for name, weight in made.space.score.items())),
    ]
    page = Page(
        kicker="Tutti: report of a search",
        name=found.name,
        result=found.sentences[-1],
        tiles=[
            Tile(value=str(len(found.trials)), name="trials"),
            Tile(value=f"{found.cost:.1f}", name="whole trainings spent"),
            Tile(value=made.space.sampler, name="sampler"),
        ],
        notes=[Note(text=line) for line in found.sentences[:2]],
        warnings=[],
        sections=[
            Section(id="curves", title="What each key does", lead=HELP, blocks=blocks),
            Section(
                id="confirmation",
                title="Confirmation from fresh seeds",
                lead=CONFIRMED if confirmed else "",
                blocks=confirmed,
                missing=""
                if confirmed
                else "Nothing was confirmed: a trial's own value chose it, and flatters it.",
            ),
            Section(id="trials", title="Trials", blocks=[rows]),
            Section(id="cost", title="What the search cost", blocks=[Facts(pairs=cost)]),
            Section(
                id="reproduce",
                title="Reproduce",
                blocks=[
                    Code(title="Command", text=str(circumstances["command"]), open=True),
                    Note(text=made_with(circumstances)),
                    Code(title="The space", text=made.space.model_dump_json(indent=1)),
                ],
            ),
        ],
        footer="Written by tutti tune. Intervals: 95 %, two-sided.",
    )
    write_atomically(path, render(page))


def _value(one: Tried, found: Found) -> float | None:
    """What is drawn of a trial: success in per cent where it was played, else minus the error."""
    if one.success is not None:
        k, n = one.success
        return 100 * k / n
    return None if found.plays or not one.rungs else one.rungs[max(one.rungs)]


def _dot(one: Tried, found: Found, axes: list[Axis]) -> Dot | None:
    """A trial as a dot; None where it has no value to show."""
    if (value := _value(one, found)) is None:
        return None
    own = wilson(*one.success) if one.success is not None else None
    interval = (100 * own.low, 100 * own.high) if own is not None else None
    return Dot(
        places=[one.params.get(axis.name) for axis in axes],
        value=value,
        interval=interval,
        top=one.value is not None,
        strong=[one] == found.best(1),
        tip=f"{one.name}: {value_text(one, found.plays)}\n" + "\n".join(one.overrides),
    )
