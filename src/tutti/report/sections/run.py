"""Descriptive sections: open-loop error, first batch, model, data, protocol, how to reproduce the run."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from tutti.data.formats.lerobot import VIEW
from tutti.evaluation.open_loop import PARTS, GroupError
from tutti.report.blocks import Block, Charts, Code, Facts, Note, Picture, Section
from tutti.report.formatting import NOTHING, anything, count, duration, percent, plain, words
from tutti.report.inputs import Inputs, Json, config_of
from tutti.report.sections.success import not_evaluated
from tutti.report.svg.rows import seconds_chart
from tutti.report.tables import Cell, Column, table

PROTOCOL_WORDS = {
    "suite": "task suite",
    "split": "instructions",
    "chunk": "actions predicted at once (chunk)",
    "executed": "actions executed per query",
    "max_decisions": "longest rollout, control steps",
    "distinct_starts": "distinct starts (task, state after reset)",
}
VALUE_WORDS = {
    ("split", "held_out"): "held-out paraphrases, not in the training data",
    ("split", "train"): "those of the training",
    ("weights", "ema"): "averaged weights (EMA)",
    ("weights", "raw"): "raw weights",
}


def open_loop_section(inputs: Inputs) -> Section:
    """Error of the predicted chunks on held-out episodes, and how far a swapped instruction moves them."""
    section, errors = partial(Section, id="open-loop", title="Open loop"), inputs.open_loop
    if errors is None:
        return section(missing="Not run yet: `tutti evaluate` predicts chunks on held-out episodes.")
    lead = (
        "Mean absolute error of predicted against recorded actions on held-out episodes, without acting: of "
        f"the first action, of the {errors.executed} that are executed, and of the whole chunk of "
        f"{errors.chunk}. A small error here is no evidence of success."
    )
    units = {
        "normalised": ("normalised", "In the units of the training: most training actions lie in [-1, 1]."),
        "data": ("data units", "In the units of the data set, mean over action dimensions."),
    }
    swap = (
        "How far another task's instruction moves the predicted chunk, as a multiple of the error. Near 0 "
        "the model ignores its text."
    )
    columns: list[Column[GroupError]] = [
        ("task", "", lambda row: row.name),
        ("windows", "Held-out windows.", lambda row: f"{row.windows:,}"),
        *(
            (f"{part}, {unit}", help, lambda row, key=key, part=part: plain(getattr(getattr(row, key), part)))
            for key, (unit, help) in units.items()
            for part in PARTS
        ),
        ("instruction swap", swap, lambda row: NOTHING if row.swap is None else f"{row.swap:.2f} x"),
    ]
    rows = (*errors.groups, errors.overall)
    return section(
        lead=lead, blocks=[table(rows, columns, "Mean absolute error.", last_is_total=len(rows) > 1)]
    )


def model_section(inputs: Inputs) -> Section:
    """The modules with parameters and FLOPs, and the token sequence."""
    section, model = partial(Section, id="model", title="Model"), inputs.model
    if model is None:
        return section(missing="No model.json yet: `tutti train` writes it when the model is built.")
    modules = "A module's row contains those below it. The heads of the loss terms are not part of the model."
    flops = "Matrix products and convolutions of one forward pass; a multiply-add counts as two."
    caption = "A training step costs about three times the forward FLOPs."
    rows = table(
        model.modules,
        [
            ("module", modules, lambda row: "\u2003" * row.depth + row.name),
            ("parameters", "Trained numbers.", lambda row: count(row.parameters)),
            ("FLOPs per sample", flops, lambda row: count(row.flops)),
            ("share of FLOPs", "Share of the model's forward FLOPs.", lambda row: percent(row.share, 1)),
        ],
        caption,
    )
    tokens = [(row.name.replace(VIEW, ""), _tokens(row.tokens)) for row in model.tokens]
    tokens.append(("whole sequence", _tokens(sum(row.tokens for row in model.tokens))))
    return section(blocks=[rows, Facts(pairs=tokens, title="Token sequence of the fusion")])


def _tokens(number: int) -> str:
    return f"{number:,} token{'' if number == 1 else 's'}"


def batch_section(inputs: Inputs) -> Section:
    """The first batch of the training."""
    section = partial(Section, id="first-batch", title="First batch")
    if inputs.first_batch is None:
        return section(missing="No first_batch.png yet: `tutti train` draws it before the first step.")
    caption = (
        "Windows of the first batch as the model got them: every view, the window's number, the instruction."
    )
    return section(blocks=[Picture(png=inputs.first_batch, caption=caption)])


def data_section(inputs: Inputs) -> Section:
    """The training data, and how they were recorded."""
    section = partial(Section, id="data", title="Data")
    blocks = _data(inputs.data) if inputs.data else []
    if (recording := inputs.recording) is not None:
        first, last = recording.seeds
        columns: list[Column[str]] = [
            ("recorded task", "", str),
            (
                "demonstrations kept",
                "Episodes in which the scripted expert succeeds.",
                lambda task: f"{recording.successes[task]:,}",
            ),
            (
                "starts tried",
                "Seeds up to the last one that was needed.",
                lambda task: anything(recording.tries.get(task)),
            ),
        ]
        caption = f"Only demonstrations that succeed are kept. Seeds {first} to {last}."
        blocks.append(table(recording.successes, columns, caption))
    if not blocks:
        return section(missing="No data.json yet: `tutti train` describes its data there.")
    return section(blocks=blocks)


def _data(data: Json) -> list[Block]:
    """What `DataBundle.describe` says, in all and of each source."""
    nested = {name: value for name, value in data.items() if isinstance(value, dict)}
    sources: list[Json] = data["sources"]
    totals = {name: value for name, value in data.items() if name not in nested and name != "sources"}
    blocks: list[Block] = [_facts(totals)]
    if len(sources) > 1:
        columns = [(words(key), "", lambda row, key=key: _data_cell(key, row.get(key))) for key in sources[0]]
        blocks.append(table(sources, columns, "sources"))
    else:
        blocks += [_facts(source, "sources") for source in sources]
    return [*blocks, *(_facts(value, words(name)) for name, value in nested.items())]


def _facts(values: Json, title: str = "") -> Facts:
    return Facts(
        pairs=[(words(name), _data_value(name, value)) for name, value in values.items()], title=title
    )


def _data_cell(key: str, value: object) -> Cell:
    return Cell(text=_data_value(key, value), mood="" if isinstance(value, int | float) else "text")


def _data_value(key: str, value: object) -> str:
    if key == "seconds" and isinstance(value, int | float):
        return duration(value)
    return anything(value).replace(VIEW, "")


def protocol_section(inputs: Inputs) -> Section:
    """The protocol of the evaluation, so that another can be compared with it."""
    section = partial(Section, id="protocol", title="Protocol of the evaluation")
    if inputs.evaluation is None:
        return section(missing=not_evaluated(inputs))
    protocol = asdict(inputs.evaluation.protocol)
    environment = protocol.pop("environment")
    seeds = f"{protocol.pop('seed_first')} to {protocol.pop('seed_last')}"
    pairs = [(PROTOCOL_WORDS.get(k, words(k)), _value(k, v)) for k, v in protocol.items()]
    pairs += [("seeds of the starts", seeds), *_circumstances(inputs)]
    blocks: list[Block] = [Facts(pairs=pairs), Code(title="Fingerprint of the simulator", text=environment)]
    blocks += [Note(text=note) for note in inputs.evaluation.notes()[:2]]
    lead = "A rollout ends at its first success. Every control uses the same starts."
    return section(lead=lead, blocks=blocks)


def _value(key: str, value: object) -> str:
    return VALUE_WORDS.get((key, str(value)), anything(value))


def _circumstances(inputs: Inputs) -> list[tuple[str, str]]:
    """What the evaluation's own record does not say: weights, views, control rate."""
    pairs: list[tuple[str, str]] = []
    weights = config_of(inputs, "evaluation").get("weights")
    if weights:
        pairs.append(("weights evaluated", _value("weights", weights)))
    names = [row.name for row in inputs.model.tokens] if inputs.model is not None else []
    views = [name.removeprefix(f"vision: {VIEW}") for name in names if name.startswith("vision: ")]
    if views:
        pairs.append(("views", ", ".join(views)))
    frames, seconds = ((inputs.data or {}).get(key) for key in ("frames", "seconds"))
    if frames and seconds:
        pairs.append(("control rate", f"{plain(frames / seconds)} actions per second"))
    return pairs


def reproduce_section(inputs: Inputs) -> Section:
    """Config, commit, versions, machine, and the time of each stage."""
    seconds, summary = stage_seconds(inputs), inputs.summary
    blocks: list[Block] = []
    if seconds:
        title = f"Time per stage: {duration(sum(seconds.values()))} in all"
        help = "Wall time of each stage, with that of interrupted tries."
        blocks.append(Charts(charts=[seconds_chart(title, seconds, help)]))
    for title, values in (("Versions", summary.versions), ("Machine", summary.machine)):
        if values:
            pairs = [(words(name), anything(value)) for name, value in values.items()]
            blocks.append(Facts(pairs=pairs, title=title))
    if summary.commit:
        blocks.append(Facts(pairs=[("git commit", summary.commit)]))
    if inputs.config_text:
        blocks.append(Code(title="config.yaml, with every default", text=inputs.config_text))
    blocks.append(Code(title="Command", text=_command(inputs), open=True))
    lead = "Same machine, same versions, same config: same bytes."
    return Section(id="reproduce", title="Reproduce", lead=lead, blocks=blocks)


def _command(inputs: Inputs) -> str:
    if inputs.config_text is None:
        return f"tutti report {inputs.folder.name}"
    lines = ["# save config.yaml from above, then, at the commit above:"]
    lines += [f"tutti {stage} config.yaml name=again" for stage in ("record", "train")]
    return "\n".join([*lines, "tutti evaluate runs/again", "tutti report runs/again"])


def stage_seconds(inputs: Inputs) -> dict[str, float]:
    """Stage -> seconds; a stage of no time is left out."""
    return {name: stage.seconds for name, stage in inputs.stages.items() if stage.seconds > 0}


def unfinished_stages(inputs: Inputs) -> list[str]:
    """The stages that began and did not finish; the report's own is always one of them and left out."""
    return [name for name, stage in inputs.stages.items() if not stage.finished and name != "report"]
