"""Training curves: losses raw and weighted, lambdas, accuracies, optimizer, throughput."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from pydantic import TypeAdapter, ValidationError

from tutti.report.blocks import Block, Charts, Fold, Note, Section
from tutti.report.formatting import Number, percent, plain
from tutti.report.inputs import Inputs, Records, config_of, config_value
from tutti.report.series import level, series, smoothed, term_colours
from tutti.report.svg.charts import Series, line_chart
from tutti.report.svg.elements import Chart
from tutti.training.metric_names import describe_metric
from tutti.training.strategy import StrategyConfig

Marks = Sequence[tuple[Number, str]]
"""Steps at which something begins, with its name."""

SMOOTHING, LARGEST = 0.01, "optim/grad_norm_max"
SMOOTHED = "Lines: smoothed over about 1 % of the records. Faint: each record."
REFERENCES = {
    "floor": ("floor", "the smallest value that these batches allow", "c4"),
    "chance": ("chance", "the value of a guess", "grey"),
    "copy_baseline": ("copy baseline", "the loss of predicting that nothing changes", "grey"),
    "hold_baseline": ("hold baseline", "the loss of predicting that the hand stays where it is", "grey"),
    "mean_baseline": ("mean baseline", "the loss of always answering the batch's mean", "grey"),
    "zero_baseline": ("zero baseline", "the loss of always answering 0, the mean action", "grey"),
    "blind_baseline": ("blind baseline", "the loss of answering each patch's own mean", "grey"),
}
SHARES = {"data": "c2", "forward": "c1", "backward": "c4", "optimizer": "c3", "diagnostics": "c5"}


def training_section(inputs: Inputs) -> Section:
    """Every metric that the training recorded."""
    section = partial(Section, id="training", title="Training")
    records = inputs.records
    terms = term_names(records)
    if not terms and "loss/total" not in records:
        return section(missing="No training records yet. `tutti train` writes records.jsonl.")
    colours = term_colours(terms)
    marks = phase_marks(inputs)
    blocks: list[Block] = [Note(text=SMOOTHED)]
    blocks.append(
        Charts(
            charts=[
                _total(records, terms, colours, marks),
                *(_term(records, term, colours, marks) for term in terms),
                *_lambdas(records, terms, colours, marks),
                *(chart for term in terms for chart in _accuracy(records, term, colours)),
                *_optimizer(records, _clip_norm(inputs), marks),
                *_speed(records),
            ]
        )
    )
    rest = [name for name in records.columns if not _has_a_place(name, terms)]
    if rest:
        charts = [_single(records, name) for name in sorted(rest)]
        blocks.append(Fold(title=f"Every other metric ({len(charts)})", blocks=[Charts(charts=charts)]))
    return section(lead=_lead(records, terms), blocks=blocks)


def phase_marks(inputs: Inputs) -> Marks:
    """The step at which each phase but the first begins, with its name; nothing where there is one phase."""
    steps, numbers = inputs.records.get("strategy/phase")
    marks: list[tuple[Number, str]] = []
    for (last, before), (_, number) in pairwise(zip(steps, numbers, strict=True)):
        if number > before:  # it begins right behind a record, or between two
            marks.append((last, _phase_name(inputs, int(number))))
    return marks


def _phase_name(inputs: Inputs, number: int) -> str:
    try:
        strategy: StrategyConfig = TypeAdapter(StrategyConfig).validate_python(config_of(inputs, "strategy"))
        return strategy.phases()[number].name
    except (ValidationError, IndexError):
        return f"phase {number + 1}"


def term_names(records: Records) -> list[str]:
    """The terms of the loss, action first, then in the order in which they were recorded."""
    names = [n.split("/")[1] for n in records.columns if n.startswith("loss/") and n.endswith("/raw")]
    return sorted(names, key=lambda name: name != "action")


def _lead(records: Records, terms: Sequence[str]) -> str:
    steps, _ = records.get("loss/total") if "loss/total" in records else records.get(f"loss/{terms[0]}/raw")
    text = f"{len(steps):,} records up to optimizer step {steps[-1]:,}."
    samples = records.last("data/samples")
    return text if samples is None else f"{text} {samples:,.0f} training windows consumed."


def _held_out(records: Records, name: str, colour: str, label: str = "held-out episodes") -> list[Series]:
    return series(records, name, label, colour, kind="points")


def _total(records: Records, terms: Sequence[str], colours: dict[str, str], marks: Marks) -> Chart:
    lines = smoothed(records, "loss/total", "total", "c6")
    for term in terms:
        name = f"loss/{term}/weighted"
        lines += series(records, name, f"lambda x {term}", colours[term], smoothing=SMOOTHING)
    lines += _held_out(records, "valid/total", "c6", "total, held-out episodes")
    help = f"{describe_metric('loss/total')} The lines below it are the weighted terms that it is the sum of."
    return line_chart("Total and its weighted terms", lines, unit="loss", help=help, log=False, marks=marks)


def _term(records: Records, term: str, colours: dict[str, str], marks: Marks) -> Chart:
    lines = smoothed(records, f"loss/{term}/raw", f"{term}, training", colours[term])
    lines += _held_out(records, f"valid/{term}", "grey")
    help = f"{describe_metric(f'loss/{term}/raw')} Points: {_lower(describe_metric(f'valid/{term}'))}"
    for reference, (label, meaning, colour) in REFERENCES.items():
        name = f"metric/{term}/{reference}"
        if name in records:
            lines += series(records, name, label, colour, kind="reference", smoothing=SMOOTHING)
            help += f" {label.capitalize()}: {meaning}."
    return line_chart(f"{term}: raw", lines, unit="loss", help=help, marks=marks)


def _lambdas(records: Records, terms: Sequence[str], colours: dict[str, str], marks: Marks) -> list[Chart]:
    lines = [one for term in terms for one in series(records, f"lambda/{term}", term, colours[term])]
    return _chart("Lambdas", lines, "lambda", "lambda/action", log=False, marks=marks)


def _accuracy(records: Records, term: str, colours: dict[str, str]) -> list[Chart]:
    name = f"metric/{term}/accuracy"
    lines = smoothed(records, name, "training", colours[term], factor=100)
    lines += series(records, f"valid/{name}", "held-out episodes", "grey", kind="points", factor=100)
    return _chart(f"{term}: accuracy", lines, "%", name, log=False)


def _clip_norm(inputs: Inputs) -> float | None:
    norm = config_value(config_of(inputs), "training", "gradients", "clip_norm")
    return float(norm) if isinstance(norm, int | float) else None


def _optimizer(records: Records, clip_norm: float | None, marks: Marks) -> list[Chart]:
    rates = series(records, "optim/lr", "learning rate", "c4")
    rates += series(records, "optim/lr_adamw", "learning rate of AdamW", "c5")
    norm = smoothed(records, "optim/grad_norm", "mean norm", "c5")
    norm += series(records, LARGEST, "largest", "grey", kind="reference", smoothing=SMOOTHING)
    if norm and clip_norm is not None:
        ends = (norm[0].xs[0], norm[0].xs[-1])
        norm.append(level(ends, clip_norm, f"clip norm {plain(clip_norm)}", "c2"))
    clip = smoothed(records, "optim/clip_share", "clipped steps", "c2", factor=100)
    help = f"{describe_metric('optim/grad_norm')} Largest: {_lower(describe_metric(LARGEST))}"
    return [
        *_chart("Learning rate", rates, "learning rate", "optim/lr", log=False, marks=marks),
        *_chart("Gradient norm before clipping", norm, "norm", help, marks=marks),
        *_chart("Clipped steps", clip, "%", "optim/clip_share", log=False),
    ]


def _speed(records: Records) -> list[Chart]:
    rate = smoothed(records, "time/samples_per_second", "windows per second", "c1")
    waiting = smoothed(records, "time/data_share", "data wait", "c2", factor=100)
    shares = [
        one
        for name, colour in SHARES.items()
        for one in series(records, f"time/{name}_share", name, colour, factor=100, smoothing=SMOOTHING)
    ]
    wait, mean = records.mean("time/data_share"), records.mean("time/samples_per_second")
    title = "Data wait" + ("" if wait is None else f" ({percent(wait, 1)} of the time on average)")
    head = "Throughput" + ("" if mean is None else f" ({plain(mean)} windows/s on average)")
    help = " ".join(f"{n.capitalize()}: {describe_metric(f'time/{n}_share')}" for n in SHARES)
    return [
        *_chart(head, rate, "windows / s", "time/samples_per_second"),
        *_chart(title, waiting, "%", "time/data_share", log=False),
        *_chart("Where a step's time goes", shares, "%", help, log=False),
    ]


def _single(records: Records, name: str) -> Chart:
    schedule = name.startswith("optim/")  # smoothing would round off a schedule's corners
    lines = series(records, name, name, "c4") if schedule else smoothed(records, name, name, "c4")
    return line_chart(name, lines, unit="value", help=describe_metric(name) or "", zero=False)


def _chart(
    title: str,
    lines: Sequence[Series],
    unit: str,
    help: str,
    *,
    log: bool | None = None,
    marks: Marks = (),
) -> list[Chart]:
    """The chart of these lines, none without lines. `help` is an explanation or the metric that has it."""
    help = describe_metric(help) or help
    return [line_chart(title, lines, unit=unit, help=help, log=log, marks=marks)] if lines else []


def _has_a_place(name: str, terms: Sequence[str]) -> bool:
    """Whether one of the charts by name shows this metric already."""
    family, _, rest = name.partition("/")
    if family in ("loss", "lambda", "optim", "time"):
        return name not in ("optim/lr_factor", "optim/ema_decay", "time/validation_seconds")
    if name == "data/samples":
        return True  # in the section's first sentence
    if family == "diag":
        return True  # in a section of its own
    if family == "valid" and not rest.startswith("metric/"):
        return True
    term, _, metric = name.removeprefix("valid/").removeprefix("metric/").partition("/")
    shown = ("accuracy",) if family == "valid" else ("accuracy", *REFERENCES)
    return family in ("valid", "metric") and term in terms and metric in shown


def _lower(text: str | None) -> str:
    return text[:1].lower() + text[1:] if text else ""
