"""Training curves: losses raw and weighted, lambdas, accuracies, optimizer, throughput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise

from pydantic import TypeAdapter, ValidationError

from tutti.report.blocks import Block, Charts, Fold, Note, Section
from tutti.report.curves import Line, Plot, Style, draw, shown_in, term_colours
from tutti.report.formatting import WORDS, Number, percent, plain
from tutti.report.inputs import Inputs, config_value
from tutti.report.records import Records
from tutti.training.metric_names import describe_metric
from tutti.training.strategy import StrategyConfig

Marks = list[tuple[Number, str]]
"""Steps at which something begins, with its name."""

SMOOTHED = "Lines: smoothed over about 1 % of the records. Faint: each record."
SHARES = {"data": "c2", "forward": "c1", "backward": "c4", "optimizer": "c3", "diagnostics": "c5"}
ELSEWHERE = ("diag/*", "data/samples", "time/seconds", "*@*")
"""Metrics that another part of the page shows."""


def training_section(inputs: Inputs) -> Section:
    """Every metric that the training recorded."""
    records = inputs.records
    terms = term_colours(records.loss_terms)
    if not terms and "loss/total" not in records:
        return Section(missing="No training records yet. `tutti train` writes records.jsonl.")
    clip_norm = config_value(inputs.config, "training", "gradients", "clip_norm")
    plots = [
        *_terms(records, terms, phase_marks(inputs)),
        *_optimizer(records, phase_marks(inputs), clip_norm if isinstance(clip_norm, int | float) else None),
        *_speed(records),
    ]
    blocks: list[Block] = [Note(text=SMOOTHED), Charts(charts=draw(records, plots))]
    rest = sorted(
        name
        for name in set(records.columns) - shown_in(plots)
        if not any(fnmatchcase(name, pattern) for pattern in ELSEWHERE)
    )
    if rest:
        others = [
            Plot(name, "value", [Line(name, name, "c4", _style(name))], name, zero=False) for name in rest
        ]
        title = f"Every other metric ({len(rest)})"
        blocks.append(Fold(title=title, blocks=[Charts(charts=draw(records, others))]))
    first = "loss/total" if "loss/total" in records else f"loss/{next(iter(terms))}/raw"
    steps, _ = records.get(first)
    lead = f"{len(steps):,} records up to optimizer step {steps[-1]:,}."
    if (samples := records.last("data/samples")) is not None:
        lead += f" {samples:,.0f} training windows consumed."
    return Section(lead=lead, blocks=blocks)


def _style(metric: str) -> Style:
    return "exact" if metric.startswith("optim/") else "curve"  # smoothing rounds off a schedule's corners


def phase_marks(inputs: Inputs) -> Marks:
    """The step at which each phase but the first begins, with its name; nothing where there is one phase."""
    steps, numbers = inputs.records.get("strategy/phase")
    marks: Marks = []
    for (last, before), (_, number) in pairwise(zip(steps, numbers, strict=True)):
        if number > before:  # it begins right behind a record, or between two
            marks.append((last, _phase_name(inputs, int(number))))
    return marks


def _phase_name(inputs: Inputs, number: int) -> str:
    try:
        settings = config_value(inputs.config, "strategy")
        strategy: StrategyConfig = TypeAdapter(StrategyConfig).validate_python(settings)
        return strategy.phases()[number].name
    except (ValidationError, IndexError):
        return f"phase {number + 1}"


def _terms(records: Records, terms: Mapping[str, str], marks: Marks) -> Iterator[Plot]:
    yield Plot(
        "Total and its weighted terms",
        "loss",
        [
            Line("loss/total", "total", "c6", "curve"),
            Line("loss/*/weighted", "lambda x *"),
            Line("valid/total", "total, held-out episodes", "c6", "points"),
        ],
        f"{describe_metric('loss/total')} The lines below it are the weighted terms that it is the sum of.",
        each=terms,
        log=False,
        marks=marks,
    )
    for term, colour in terms.items():
        lines = [
            Line(f"loss/{term}/raw", f"{term}, training", colour, "curve"),
            Line(f"valid/{term}", "held-out episodes", "grey", "points"),
        ]
        held_out = _lower(describe_metric(f"valid/{term}"))
        help = f"{describe_metric(f'loss/{term}/raw')} Points: {held_out}"
        for reference, meaning in WORDS["references"].items():
            if (name := f"metric/{term}/{reference}") in records:
                label = reference.replace("_", " ")
                own = {"floor": "c4", "reachable": "c3"}.get(reference, "grey")
                lines.append(Line(name, label, own, "reference"))
                help += f" {label.capitalize()}: {meaning}."
        yield Plot(f"{term}: raw{beyond(records, term)}", "loss", lines, help, marks=marks)
    lambdas = [Line("lambda/*", style="exact")]
    yield Plot("Lambdas", "lambda", lambdas, "lambda/action", each=terms, log=False, marks=marks)
    for term, colour in terms.items():
        name = f"metric/{term}/accuracy"
        lines = [
            Line(name, "training", colour, "curve", 100),
            Line(f"valid/{name}", "held-out episodes", "grey", "points", 100),
        ]
        yield Plot(f"{term}: accuracy", "%", lines, name, log=False)
        name = f"valid/metric/{term}/retrieval"
        lines = [
            Line(name, "held-out episodes", colour, "points", 100),
            Line(f"{name}_ceiling", "a perfect recogniser of tasks", "c4", "reference", 100),
            Line(f"{name}_chance", "one text for all", "grey", "reference", 100),
        ]
        yield Plot(f"{term}: retrieval", "%", lines, name, log=False)


def _optimizer(records: Records, marks: Marks, clip_norm: Number | None) -> Iterator[Plot]:
    rates = [
        Line("optim/lr", "learning rate", "c4", "exact"),
        Line("optim/lr_adamw", "learning rate of AdamW", "c5", "exact"),
    ]
    yield Plot("Learning rate", "learning rate", rates, "optim/lr", log=False, marks=marks)
    norms = [
        Line("optim/grad_norm", "mean norm", "c5", "curve"),
        Line("optim/grad_norm_max", "largest", "grey", "reference"),
        Line("optim/clip_threshold", "clipped above", "c2", "reference"),
    ]
    mean, largest = (describe_metric(f"optim/grad_norm{end}") for end in ("", "_max"))
    help = f"{mean} Largest: {_lower(largest)}"
    limit = [] if clip_norm is None else [(clip_norm, f"clip norm {plain(clip_norm)}", "c2")]
    yield Plot("Gradient norm before clipping", "norm", norms, help, levels=limit, marks=marks)
    clipped, share = (
        [Line("optim/clip_share", "clipped steps", "c2", "curve", 100)],
        records.mean("optim/clip_share"),
    )
    title = "Clipped steps" + ("" if share is None else f" ({percent(share, 1)} of all)")
    yield Plot(title, "%", clipped, "optim/clip_share", log=False)


def _speed(records: Records) -> Iterator[Plot]:
    rate, wait = (records.mean(f"time/{name}") for name in ("samples_per_second", "data_share"))
    title = "Throughput" + ("" if rate is None else f" ({plain(rate)} windows/s on average)")
    lines = [Line("time/samples_per_second", "windows per second", "c1", "curve")]
    yield Plot(title, "windows / s", lines, "time/samples_per_second")
    title = "Data wait" + ("" if wait is None else f" ({percent(wait, 1)} of the time on average)")
    lines = [Line("time/data_share", "data wait", "c2", "curve", 100)]
    yield Plot(title, "%", lines, "time/data_share", log=False)
    help = " ".join(f"{name.capitalize()}: {describe_metric(f'time/{name}_share')}" for name in SHARES)
    lines = [Line("time/*_share", factor=100)]
    yield Plot("Where a step's time goes", "%", lines, help, each=SHARES, log=False)


def beyond(records: Records, term: str) -> str:
    """How far below its baseline a term ends, by offset where it has several: ", 12 % below copying"."""
    for reference, name in WORDS["baselines"].items():
        if ends := records.against(term, reference):
            offsets = sorted(int(k) for (k,) in records.named(f"metric/{term}/{reference}/*"))
            each = [(k, records.against(term, f"{reference}/{k}")) for k in offsets]
            parts = [f"+{k} {_below(*found[-1])}" for k, found in each if found]
            return f", {_below(*ends[-1])} {name}" + (f" ({', '.join(parts)})" if parts else "")
    return ""


def _below(value: float, baseline: float) -> str:
    share = 1 - value / baseline if baseline > 0 else 0.0
    return f"{percent(abs(share))} {'below' if share > 0 else 'above'}"


def _lower(text: str | None) -> str:
    return text[:1].lower() + text[1:] if text else ""
