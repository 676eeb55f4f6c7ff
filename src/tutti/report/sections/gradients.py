"""What trains what: shares of updates, conflicts, update ratios, features, noise scale, findings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import cycle, product

from tutti.findings import DEAD_UNITS_MAX
from tutti.report.blocks import Block, Charts, Fold, Note, Section, note_of
from tutti.report.curves import Line, Plot, draw, term_colours
from tutti.report.formatting import percent, plain
from tutti.report.inputs import Inputs, config_value
from tutti.report.judges import judge_records
from tutti.report.records import Records, part_words
from tutti.report.svg.charts import share_chart
from tutti.report.svg.drawing import Chart
from tutti.report.svg.rows import heat_map
from tutti.training.metric_names import describe_metric

AT_TOP = 4
TITLE = "What trains what"
PART_COLOURS = {"vision": "c1", "language": "c2", "fusion": "c3", "action": "c4"}
FEATURE_COLOURS = {"vision": "c1", "language": "c2", "fused": "c3", "readout": "c4"}
SPARE = ("c5", "c6", "grey")
PAIR_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")


def influence_section(inputs: Inputs) -> Section:
    """Every metric of the diagnostic steps, and all findings."""
    records = inputs.records
    findings = judge_records(records, inputs.config)
    notes: list[Block] = [note_of(finding) for finding in findings]
    if not records.diagnostic_steps:
        missing = (
            "Not recorded: this run is older than the diagnostics, has no diagnostic step, or "
            "`training.diagnostics.every` is 0."
        )
        return Section(missing=missing, blocks=notes)
    count = f"{len(records.diagnostic_steps):,} diagnostic steps"
    if not any(finding.is_problem for finding in findings):
        hints = f", but {len(findings)} hint{'s' * (len(findings) > 1)}:" if findings else "."
        notes.insert(0, Note(text=f"No fault found in {count}{hints}", mood="hint" if findings else "good"))
    share, every = (config_value(inputs.config, "training", "diagnostics", key) for key in ("share", "every"))
    how = f" at {percent(share)} of the batch" if isinstance(share, int | float) else ""
    often = f", one every {plain(every)} steps" if isinstance(every, int | float) and every > 1 else ""
    lead = (
        f"{count}{how}{often}: each term by itself, in each part of the model. Its share of the update "
        "is the norm of its part of the optimiser's step over the sum of these norms; its share of the "
        "gradient that of its weighted gradient, before the optimiser rescales it and momentum cancels noise."
    )
    colours = term_colours(records.terms)
    conflicts = [*_conflicts(records), *draw(records, _cosines(records))]
    blocks: list[Block] = [
        *notes,
        Charts(charts=[*_shares(records), *_areas(records, colours)]),
        *([Charts(charts=conflicts)] if conflicts else []),
        Charts(charts=draw(records, _health(records))),
        Fold(
            title="Norm of each term's weighted gradient",
            blocks=[Charts(charts=draw(records, _norms(records, colours)))],
        ),
    ]
    return Section(lead=lead, blocks=blocks)


def top_notes(inputs: Inputs) -> list[Note]:
    """The faults and warnings for the top of the page, the gravest first."""
    findings = judge_records(inputs.records, inputs.config)
    grave = [note_of(finding) for finding in findings if finding.is_problem]
    notes = grave[:AT_TOP]
    if len(grave) > AT_TOP:
        more = f"{len(grave) - AT_TOP} more findings under \u201c{TITLE}\u201d."
        notes.append(Note(text=more, mood="warn"))
    return notes


def _shares(records: Records) -> Iterator[Chart]:
    """Shares of every term in every part, in the first half of the run and in the second: of the update, with
    that of the gradient beside it; of a run without windows of updates that of the gradient alone."""
    updates = bool(records.named("diag/update_share/*/*"))
    for half, span in zip(("first", "second"), records.halves, strict=True):
        cells: dict[tuple[str, str], tuple[float, str]] = {}
        beside: dict[tuple[str, str], float] = {}
        for term, part in product(records.terms, records.parts):
            share, norm = (records.median(f"diag/{kind}/{term}/{part}", span) for kind in ("share", "norm"))
            if share is None:
                continue
            said = f"{percent(share, 1)} of the gradient" + ("" if norm is None else f", norm {plain(norm)}")
            cells[term, part] = share, f"{term} in {part}: {said} (medians)"
            if updates:
                moved = records.update_share(term, part, span)
                of_update = "" if moved is None else f"{percent(moved, 1)} of the update, "
                cells[term, part] = (
                    math.nan if moved is None else moved,
                    f"{term} in {part}: {of_update}{said} (medians)",
                )
                beside[term, part] = share
        shown = describe_metric(f"diag/{'update_' * updates}share/action/vision")
        elsewhere = updates and records.updates_in(span) != span
        over = "; of the update, which was not measured then, over the whole run" * elsewhere
        help = (
            f"{shown}{' Below: its share of the gradient.' * updates} Median over the diagnostic steps "
            f"from {span[0]:,} to {span[1]:,}{over}. A dash: the term was not computed, or no gradient "
            "reached the part. Frozen: the part did not learn, so it had no gradient."
        )
        words = {part: "frozen" for part in records.parts if records.is_frozen(part, span)}
        of = "update (and of its gradient)" if updates else "gradient"
        title = f"Share of each part's {of}, {half} half"
        yield heat_map(title, records.terms, records.parts, cells, help=help, words=words, beside=beside)


def _areas(records: Records, colours: Mapping[str, str]) -> Iterator[Chart]:
    for part in records.parts:
        shares: dict[str, dict[int, float]] = {}
        for term in records.terms:
            columns = zip(*records.get(f"diag/share/{term}/{part}"), strict=True)
            shares[term] = {step: share for step, share in columns if math.isfinite(share)}
        if sum(any(values.values()) for values in shares.values()) > 1:  # one term alone has all of it
            help = describe_metric(f"diag/share/action/{part}") or ""
            title = f"Shares of the gradient in {part_words(part)}"
            yield share_chart(title, records.diagnostic_steps, shares, colours, help)


def _conflicts(records: Records) -> Iterator[Chart]:
    """How often two terms pull a part in opposite directions."""
    cells: dict[tuple[str, str], tuple[float, str]] = {}
    for (a, b), part in product(records.pairs, records.parts):
        if (conflict := records.conflict(a, b, part)) is not None:
            share, cosine, count = conflict
            often = f"{percent(share)} of {count} diagnostic steps, mean {cosine:.2f}"
            cells[f"{a}, {b}", part] = share, f"{a}, {b} in {part}: cosine below 0 in {often}"
    if records.pairs:
        names = [f"{a}, {b}" for a, b in records.pairs]
        parts = [part for part in records.parts if any(column == part for _, column in cells)]
        help = (
            "Share of the diagnostic steps in which the two terms' gradients point against each other. Half "
            "is chance: unrelated gradients have a cosine around 0. A dash: at most one of the terms reaches "
            "it."
        )
        title = "Diagnostic steps in which two terms conflict"
        yield heat_map(title, names, parts, cells, help=help, colour="c2")


def _cosines(records: Records) -> Iterator[Plot]:
    pairs = dict(zip(("~".join(pair) for pair in records.pairs), cycle(PAIR_COLOURS), strict=False))
    for part in records.parts:
        title, name = f"Cosines in {part_words(part)}", f"diag/cosine/*/{part}"
        level = [(0.0, "unrelated", "grey")]
        yield Plot(title, "cosine", [Line(name)], name, each=pairs, levels=level, log=False)


def _health(records: Records) -> Iterator[Plot]:
    others = [part for part in records.parts if part not in PART_COLOURS]
    parts = PART_COLOURS | dict.fromkeys(others, "grey") | dict(zip(others, SPARE, strict=False))
    ratio = "diag/update_ratio/*"
    yield Plot("Update-to-weight ratio", "ratio", [Line(ratio)], ratio, each=parts, log=True)
    limits = {name: records.median(f"diag/rank_limit/{name}") for name in FEATURE_COLOURS}
    maxima = [
        (limit, f"maximum of {name}", FEATURE_COLOURS[name])
        for name, limit in limits.items()
        if limit is not None
    ]
    rank, dead = "diag/rank/*", "diag/dead/*"
    yield Plot("Effective rank", "rank", [Line(rank)], rank, each=FEATURE_COLOURS, levels=maxima)
    fault = [(100 * DEAD_UNITS_MAX, f"fault from {percent(DEAD_UNITS_MAX)} on", "grey")]
    lines = [Line(dead, factor=100)]
    yield Plot("Dead units", "%", lines, dead, each=FEATURE_COLOURS, levels=fault, log=False)
    scale, batch = "diag/noise_scale", records.batch_size
    level = [] if batch is None else [(batch, f"batch {plain(batch)}", "c2")]
    lines = [Line(scale, "noise scale", "c1")]
    yield Plot("Gradient noise scale and batch", "windows", lines, scale, levels=level)
    spikes = term_colours(term for (term,) in records.named("diag/spike/*"))
    lines = [Line("diag/spike/*", style="points")]  # a point for each spike, as high as its z
    yield Plot("Loss spikes", "z", lines, "diag/spike/action", each=spikes, log=False)


def _norms(records: Records, colours: Mapping[str, str]) -> Iterator[Plot]:
    for part in records.parts:
        name = f"diag/norm/*/{part}"
        # 0, where the term does not reach the part, is not on a log scale
        reach = {t: c for t, c in colours.items() if any(records.values(name.replace("*", t)))}
        yield Plot(f"lambda |g| in {part_words(part)}", "norm", [Line(name)], name, each=reach)
