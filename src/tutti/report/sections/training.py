"""The training section: losses raw and weighted, lambdas, alignment, optimizer, throughput."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise

from pydantic import TypeAdapter, ValidationError

from tutti.report.blocks import Block, Charts, Fold, Note, Section
from tutti.report.formatting import Number, percent, plain
from tutti.report.inputs import Inputs, Records, config_of, config_value
from tutti.report.svg.axes import smooth
from tutti.report.svg.charts import Series, line_chart
from tutti.report.svg.elements import Chart
from tutti.training.metrics import describe_metric
from tutti.training.strategy import StrategyConfig

Marks = Sequence[tuple[Number, str]]
"""Steps at which something begins, with its name."""

COLOURS = {"action": "c1", "align": "c2", "recon": "c3", "total": "c6"}
SPARE = ("c4", "c5", "c6")
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
SHARES = ("data", "forward", "backward", "optimizer", "diagnostics")


def training_section(inputs: Inputs) -> Section:
    """Everything that was recorded while the parameters moved."""
    section = partial(Section, id="training", title="Training")
    records = inputs.records
    terms = term_names(records)
    if not terms and "loss/total" not in records:
        return section(missing="No training records yet. `tutti train` writes records.jsonl.")
    colours = term_colours(terms)
    accuracies = [term for term in terms if f"metric/{term}/accuracy" in records]
    marks = phase_marks(inputs)
    blocks: list[Block] = [Note(text=SMOOTHED)]
    blocks.append(
        Charts(
            charts=_present(
                _total(records, terms, colours, marks),
                *(_term(records, term, colours, marks) for term in terms),
                _lambdas(records, terms, colours, marks),
                *(_accuracy(records, term, colours) for term in accuracies),
                *_optimizer(records, _clip_norm(inputs), marks),
                *_speed(records),
            )
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
    found: list[tuple[Number, str]] = []
    for (last, before), (_, number) in pairwise(zip(steps, numbers, strict=True)):
        if number > before:  # it begins right behind a record, or between two
            found.append((last, _phase_name(inputs, int(number))))
    return found


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


def term_colours(terms: Iterable[str]) -> dict[str, str]:
    """One colour for each term, the same in every chart."""
    spare = iter(SPARE * 20)
    return {term: COLOURS.get(term) or next(spare) for term in terms}


def _lead(records: Records, terms: Sequence[str]) -> str:
    steps, _ = records.get("loss/total") if "loss/total" in records else records.get(f"loss/{terms[0]}/raw")
    text = f"{len(steps):,} records up to optimizer step {steps[-1]:,}."
    samples = records.last("data/samples")
    return text if samples is None else f"{text} {samples:,.0f} training windows consumed."


def _train(records: Records, name: str, label: str, colour: str) -> list[Series]:
    steps, values = records.get(name)
    if not steps:
        return []
    # While fewer than 30 records exist, smoothing hides more than it shows.
    if len(steps) < 30:
        return [Series(name=label, xs=steps, ys=values, colour=colour)]
    return [
        Series(name=f"{label}, each record", xs=steps, ys=values, colour=colour, kind="faint"),
        Series(name=label, xs=steps, ys=smooth(values), colour=colour),
    ]


def _held_out(records: Records, name: str, colour: str, label: str = "held-out episodes") -> list[Series]:
    steps, values = records.get(name)
    return [Series(name=label, xs=steps, ys=values, colour=colour, kind="points")] if steps else []


def _total(records: Records, terms: Sequence[str], colours: dict[str, str], marks: Marks) -> Chart:
    series = _train(records, "loss/total", "total", "c6")
    for term in terms:
        steps, values = records.get(f"loss/{term}/weighted")
        label = f"lambda x {term}"
        series += [Series(name=label, xs=steps, ys=smooth(values), colour=colours[term])] if steps else []
    series += _held_out(records, "valid/total", "c6", "total, held-out episodes")
    help = f"{describe_metric('loss/total')} The lines below it are the weighted terms that it is the sum of."
    return line_chart("Total and its weighted terms", series, unit="loss", help=help, log=False, marks=marks)


def _term(records: Records, term: str, colours: dict[str, str], marks: Marks) -> Chart:
    series = _train(records, f"loss/{term}/raw", f"{term}, training", colours[term])
    series += _held_out(records, f"valid/{term}", "grey")
    help = f"{describe_metric(f'loss/{term}/raw')} Points: {_lower(describe_metric(f'valid/{term}'))}"
    for reference, (label, meaning, colour) in REFERENCES.items():
        steps, values = records.get(f"metric/{term}/{reference}")
        if steps:
            series.append(Series(name=label, xs=steps, ys=smooth(values), colour=colour, kind="reference"))
            help += f" {label.capitalize()}: {meaning}."
    return line_chart(f"{term}: raw", series, unit="loss", help=help, marks=marks)


def _lambdas(records: Records, terms: Sequence[str], colours: dict[str, str], marks: Marks) -> Chart | None:
    series = []
    for term in terms:
        steps, values = records.get(f"lambda/{term}")
        series += [Series(name=term, xs=steps, ys=values, colour=colours[term])] if steps else []
    help = describe_metric("lambda/action") or ""
    return _chart("Lambdas", series, "lambda", help, log=False, marks=marks)


def _accuracy(records: Records, term: str, colours: dict[str, str]) -> Chart:
    name = f"metric/{term}/accuracy"
    series = _train(records, name, "training", colours[term]) + _held_out(records, f"valid/{name}", "grey")
    return _share(f"{term}: accuracy", series, describe_metric(name) or "")


def _clip_norm(inputs: Inputs) -> float | None:
    norm = config_value(config_of(inputs), "training", "gradients", "clip_norm")
    return float(norm) if isinstance(norm, int | float) else None


def _optimizer(records: Records, clip_norm: float | None, marks: Marks) -> list[Chart | None]:
    names = {"optim/lr": "learning rate", "optim/lr_adamw": "learning rate of AdamW"}
    rates = [
        Series(name=label, xs=records.get(name)[0], ys=records.get(name)[1], colour=colour)
        for (name, label), colour in zip(names.items(), ("c4", "c5"), strict=True)
        if name in records
    ]
    norm = _train(records, "optim/grad_norm", "mean norm", "c5")
    steps, largest = records.get("optim/grad_norm_max")
    if steps:
        norm.append(Series(name="largest", xs=steps, ys=smooth(largest), colour="grey", kind="reference"))
    if norm and clip_norm is not None:
        ends = [norm[0].xs[0], norm[0].xs[-1]]
        label = f"clip norm {plain(clip_norm)}"
        norm.append(Series(name=label, xs=ends, ys=[clip_norm] * 2, colour="c2", kind="reference"))
    clip = _train(records, "optim/clip_share", "clipped steps", "c2")
    help = f"{describe_metric('optim/grad_norm')} Largest: {_lower(describe_metric('optim/grad_norm_max'))}"
    return [
        _chart("Learning rate", rates, "learning rate", describe_metric("optim/lr"), log=False, marks=marks),
        _chart("Gradient norm before clipping", norm, "norm", help, marks=marks),
        _share("Clipped steps", clip, describe_metric("optim/clip_share") or "") if clip else None,
    ]


def _speed(records: Records) -> list[Chart | None]:
    rate = _train(records, "time/samples_per_second", "windows per second", "c1")
    series: list[Series] = []
    for name, colour in zip(SHARES, ("c2", "c1", "c4", "c3", "c5"), strict=True):
        steps, values = records.get(f"time/{name}_share")
        if steps:
            series.append(Series(name=name, xs=steps, ys=smooth(values), colour=colour))
    wait = records.mean("time/data_share")
    waiting = _train(records, "time/data_share", "data wait", "c2")
    title = "Data wait" + ("" if wait is None else f" ({percent(wait, 1)} of the time on average)")
    help = " ".join(f"{n.capitalize()}: {describe_metric(f'time/{n}_share')}" for n in SHARES)
    mean = records.mean("time/samples_per_second")
    head = "Throughput" + ("" if mean is None else f" ({plain(mean)} windows/s on average)")
    return [
        _chart(head, rate, "windows / s", describe_metric("time/samples_per_second")),
        _share(title, waiting, describe_metric("time/data_share") or "") if waiting else None,
        _share("Where a step's time goes", series, help) if series else None,
    ]


def _single(records: Records, name: str) -> Chart:
    steps, values = records.get(name)
    shaped = name.startswith("optim/")  # smoothing would round off a schedule's corners
    series = (
        [Series(name=name, xs=steps, ys=values, colour="c4")] if shaped else _train(records, name, name, "c4")
    )
    return line_chart(name, series, unit="value", help=describe_metric(name) or "", zero=False)


def _share(title: str, series: Sequence[Series], help: str) -> Chart:
    """Fractions, drawn in per cent."""
    scaled = [
        Series(name=s.name, xs=s.xs, ys=[100 * y for y in s.ys], colour=s.colour, kind=s.kind) for s in series
    ]
    return line_chart(title, scaled, unit="%", help=help, log=False)


def _chart(
    title: str,
    series: Sequence[Series],
    unit: str,
    help: str | None,
    *,
    log: bool | None = None,
    marks: Marks = (),
) -> Chart | None:
    return line_chart(title, series, unit=unit, help=help or "", log=log, marks=marks) if series else None


def _present(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


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
