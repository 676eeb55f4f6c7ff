"""What trains what: gradient shares, conflicts, update ratios, features, noise scale, findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import cycle, product

from tutti.findings import DEAD_UNITS_MAX, Finding
from tutti.report.blocks import MOODS, Block, Charts, Fold, Note, Section
from tutti.report.findings.all import judge_records
from tutti.report.findings.diagnostic_records import (
    DiagnosticRecords,
    batch_size,
    part_words,
    read_diagnostics,
)
from tutti.report.formatting import Number, percent, plain
from tutti.report.inputs import Inputs, Records, config_of
from tutti.report.series import MIN_TO_SMOOTH, level, series, term_colours
from tutti.report.svg.charts import Series, line_chart, share_chart
from tutti.report.svg.elements import Chart
from tutti.report.svg.rows import heat_map
from tutti.training.metric_names import describe_metric

AT_TOP = 4
ID, TITLE = "what-trains-what", "What trains what"
PART_COLOURS = {"vision": "c1", "language": "c2", "fusion": "c3", "action": "c4"}
FEATURE_COLOURS = {"vision": "c1", "language": "c2", "fused": "c3", "readout": "c4"}
SPARE = ("c5", "c6", "grey")
PAIR_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")


def influence_section(inputs: Inputs) -> Section:
    """Every metric of the diagnostic steps, and all findings."""
    section = partial(Section, id=ID, title=TITLE)
    diagnostics = read_diagnostics(inputs.records)
    findings = judge_records(inputs.records, config_of(inputs))
    notes: list[Block] = [finding_note(finding) for finding in findings]
    if not diagnostics.steps:
        missing = (
            "Not recorded: this run is older than the diagnostics, has no diagnostic step, or "
            "`training.diagnostics.every` is 0."
        )
        return section(missing=missing, blocks=notes)
    if not any(finding.is_problem for finding in findings):
        notes.insert(
            0, Note(text=f"No fault found in {len(diagnostics.steps):,} diagnostic steps.", mood="good")
        )
    colours = term_colours(diagnostics.terms)
    blocks: list[Block] = [
        *notes,
        Charts(charts=[*_matrices(diagnostics), *_areas(diagnostics, colours)]),
        *_conflicts(diagnostics),
        Charts(charts=_health(diagnostics)),
        Fold(
            title="Norm of each term's weighted gradient",
            blocks=[Charts(charts=_norms(diagnostics, colours))],
        ),
    ]
    return section(lead=_lead(inputs, diagnostics), blocks=blocks)


def finding_note(finding: Finding) -> Note:
    """A finding as a note: its sentence and its cure."""
    return Note(text=finding.text, mood=MOODS[finding.severity])


def top_notes(inputs: Inputs) -> list[Note]:
    """The faults and warnings for the top of the page, the gravest first."""
    grave = [f for f in judge_records(inputs.records, config_of(inputs)) if f.is_problem]
    notes = [finding_note(finding) for finding in grave[:AT_TOP]]
    if len(grave) > AT_TOP:
        notes.append(
            Note(text=f"{len(grave) - AT_TOP} more findings under \u201c{TITLE}\u201d.", mood="warn")
        )
    return notes


def _lead(inputs: Inputs, diagnostics: DiagnosticRecords) -> str:
    settings = config_of(inputs, "training").get("diagnostics")
    share, every = map(settings.get, ("share", "every")) if isinstance(settings, Mapping) else (None, None)
    how = f" at {percent(share)} of the batch" if isinstance(share, int | float) else ""
    often = f", one every {plain(every)} steps" if isinstance(every, int | float) else ""
    return (
        f"{len(diagnostics.steps):,} diagnostic steps{how}{often}: the gradient of each term by itself, in "
        "each part of the model. A term's share is its weighted gradient's norm over the sum of all norms."
    )


def _matrices(diagnostics: DiagnosticRecords) -> list[Chart]:
    """Shares of every term in every part, in the first half of the run and in the second."""
    charts: list[Chart] = []
    for half, (since, until) in zip(("first", "second"), diagnostics.halves, strict=True):
        values: dict[tuple[str, str], float] = {}
        tips: dict[tuple[str, str], str] = {}
        for term, part in product(diagnostics.terms, diagnostics.parts):
            share = diagnostics.median(f"share/{term}/{part}", since, until)
            norm = diagnostics.median(f"norm/{term}/{part}", since, until)
            if share is not None:
                values[term, part] = share
                said = "" if norm is None else f", norm {plain(norm)}"
                tips[term, part] = f"{term} in {part}: {percent(share, 1)}{said} (medians)"
        help = (
            f"{describe_metric('diag/share/action/vision')} Median over the diagnostic steps from {since:,} "
            f"to {until:,}. A dash: the term was not computed, or no gradient reached the part. Frozen: the "
            "part did not learn, so it had no gradient."
        )
        words = {part: "frozen" for part in diagnostics.parts if diagnostics.is_frozen(part, since, until)}
        title = f"Share of each part's gradient, {half} half"
        charts.append(
            heat_map(title, diagnostics.terms, diagnostics.parts, values, help=help, tips=tips, words=words)
        )
    return charts


def _areas(diagnostics: DiagnosticRecords, colours: Mapping[str, str]) -> list[Chart]:
    charts: list[Chart] = []
    for part in diagnostics.parts:
        shares = {
            term: _by_step(diagnostics.records, f"diag/share/{term}/{part}") for term in diagnostics.terms
        }
        if sum(any(values.values()) for values in shares.values()) > 1:  # one term alone has all of it
            help = describe_metric(f"diag/share/action/{part}") or ""
            charts.append(
                share_chart(f"Who trains {part_words(part)}", diagnostics.steps, shares, colours, help)
            )
    return charts


def _conflicts(diagnostics: DiagnosticRecords) -> list[Block]:
    """How often two terms pull a part in opposite directions, and their cosines over time."""
    names = {pair: f"{pair[0]}, {pair[1]}" for pair in diagnostics.pairs}
    values: dict[tuple[str, str], float] = {}
    tips: dict[tuple[str, str], str] = {}
    for (pair, name), part in product(names.items(), diagnostics.parts):
        if (conflict := diagnostics.conflict(*pair, part)) is not None:
            share, cosine, count = conflict
            values[name, part] = share
            tips[name, part] = (
                f"{name} in {part}: cosine below 0 in {percent(share)} of {count} diagnostic steps, "
                f"mean {cosine:.2f}"
            )
    if not names:
        return []
    parts = [part for part in diagnostics.parts if any(column == part for _, column in values)]
    help = (
        "Share of the diagnostic steps in which the two terms' gradients point against each other. Half is "
        "chance: unrelated gradients have a cosine around 0. A dash: at most one of the terms reaches it."
    )
    title = "Diagnostic steps in which two terms conflict"
    charts = [heat_map(title, list(names.values()), parts, values, help=help, colour="c2", tips=tips)]
    for part in parts:
        lines = [level(diagnostics.span, 0.0, "unrelated", "grey")]
        for (pair, name), colour in zip(names.items(), cycle(PAIR_COLOURS), strict=False):
            lines += _line(diagnostics, f"diag/cosine/{'~'.join(pair)}/{part}", name, colour)
        help = describe_metric(f"diag/cosine/a~b/{part}") or ""
        charts.append(
            line_chart(f"Cosines in {part_words(part)}", lines, unit="cosine", help=help, log=False)
        )
    return [Charts(charts=charts)]


def _health(diagnostics: DiagnosticRecords) -> list[Chart]:
    others = [part for part in diagnostics.parts if part not in PART_COLOURS]
    colours = PART_COLOURS | dict(zip(others, SPARE, strict=False))
    ratios, ranks, dead = [], [], []
    for part in diagnostics.parts:
        ratios += _line(diagnostics, f"diag/update_ratio/{part}", part, colours.get(part, "grey"))
    for name, colour in FEATURE_COLOURS.items():
        ranks += _line(diagnostics, f"diag/rank/{name}", name, colour)
        limit = diagnostics.median(f"rank_limit/{name}")
        if limit is not None:
            ranks.append(level(diagnostics.span, limit, f"maximum of {name}", colour))
        dead += _line(diagnostics, f"diag/dead/{name}", name, colour, factor=100)
    if dead:
        dead.append(
            level(diagnostics.span, 100 * DEAD_UNITS_MAX, f"fault from {percent(DEAD_UNITS_MAX)} on", "grey")
        )
    scale, batch = (
        _line(diagnostics, "diag/noise_scale", "noise scale", "c1"),
        batch_size(diagnostics.records),
    )
    if batch is not None and scale:
        scale.append(level(diagnostics.span, batch, f"batch {plain(batch)}", "c2"))
    kinds = (
        ("Update-to-weight ratio", ratios, "ratio", "diag/update_ratio/vision", True),
        ("Effective rank", ranks, "rank", "diag/rank/readout", None),
        ("Dead units", dead, "%", "diag/dead/vision", False),
        ("Gradient noise scale and batch", scale, "windows", "diag/noise_scale", None),
        ("Loss spikes", _spikes(diagnostics.records), "z", "diag/spike/action", False),
    )
    return [
        line_chart(title, lines, unit=unit, help=describe_metric(name) or "", log=log)
        for title, lines, unit, name, log in kinds
        if lines
    ]


def _spikes(records: Records) -> list[Series]:
    """A point for each spike, as high as its z."""
    names = {
        name.removeprefix("diag/spike/"): name for name in records.columns if name.startswith("diag/spike/")
    }
    colours = term_colours(names)
    return [
        one
        for term, name in names.items()
        for one in series(records, name, term, colours[term], kind="points")
    ]


def _norms(diagnostics: DiagnosticRecords, colours: Mapping[str, str]) -> list[Chart]:
    help = describe_metric("diag/norm/action/vision") or ""
    charts: list[Chart] = []
    for part in diagnostics.parts:
        lines = [
            one
            for term in diagnostics.terms
            for one in _line(diagnostics, f"diag/norm/{term}/{part}", term, colours[term])
            if any(y > 0 for y in one.ys)  # 0, where the term does not reach the part, is not on a log scale
        ]
        charts.append(line_chart(f"lambda |g| in {part_words(part)}", lines, unit="norm", help=help))
    return charts


def _line(
    diagnostics: DiagnosticRecords, name: str, label: str, colour: str, factor: Number = 1
) -> list[Series]:
    smoothing = 0.03 if len(diagnostics.records.get(name)[0]) >= MIN_TO_SMOOTH else 0
    return series(diagnostics.records, name, label, colour, factor=factor, smoothing=smoothing)


def _by_step(records: Records, name: str) -> dict[int, float]:
    steps, values = records.get(name)
    return {step: value for step, value in zip(steps, values, strict=True) if math.isfinite(value)}
