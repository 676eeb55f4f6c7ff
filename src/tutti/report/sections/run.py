"""What a run is made of: first batch, model, data, and how to reproduce it."""

from __future__ import annotations

from collections.abc import Sequence

from tutti.data.formats.lerobot import VIEW
from tutti.report.blocks import (
    Block,
    Cell,
    Charts,
    Code,
    Column,
    Facts,
    Fold,
    Picture,
    Section,
    column,
    note_of,
    table,
)
from tutti.report.curves import Line, Plot, draw
from tutti.report.formatting import NOTHING, anything, count, duration, percent, plain, words
from tutti.report.inputs import Inputs, Json
from tutti.report.records import Records
from tutti.report.svg.rows import seconds_chart


def batch_section(inputs: Inputs) -> Section:
    """The first batch of the training."""
    if inputs.first_batch is None:
        return Section(missing="No first_batch.png yet: `tutti train` draws it before the first step.")
    caption = (
        "Windows of the first batch as the model got them: every view, the window's number, the instruction."
    )
    window: Column[tuple[int, str]] = column("window", lambda row: str(row[0]))
    texts = table(
        inputs.first_texts, [window, column("instruction", lambda row: Cell(text=row[1], mood="text"))]
    )
    folded: list[Block] = [Fold(title="Instructions of these windows", blocks=[texts])]
    picture = Picture(png=inputs.first_batch, caption=caption)
    return Section(blocks=[picture, *(folded if inputs.first_texts else [])])


def model_section(inputs: Inputs) -> Section:
    """The modules with parameters and FLOPs, and the token sequence."""
    model = inputs.model
    if model is None:
        return Section(missing="No model.json yet: `tutti train` writes it when the model is built.")
    rows = table(
        model.modules,
        [
            column("module", lambda row: "\u2003" * row.depth + row.name),
            column("parameters", lambda row: count(row.parameters)),
            column("FLOPs per sample", lambda row: count(row.flops)),
            column("share of FLOPs", lambda row: percent(row.share, 1)),
        ],
        "A training step costs about three times the forward FLOPs.",
    )
    tokens = {row.name.replace(VIEW, ""): row.tokens for row in model.tokens}
    tokens["whole sequence"] = sum(row.tokens for row in model.tokens)
    pairs = [(name, f"{number:,} token{'' if number == 1 else 's'}") for name, number in tokens.items()]
    return Section(blocks=[rows, Facts(pairs=pairs, title="Token sequence of the fusion")])


def data_section(inputs: Inputs) -> Section:
    """The training data, and how they were recorded."""
    blocks: list[Block] = [note_of(finding) for finding in inputs.data_findings]
    blocks += _data(inputs.data) if inputs.data else []
    blocks += _mixture(inputs.data.get("mixture", ()), inputs.records) if inputs.data else []
    if (recording := inputs.recording) is not None:
        columns: list[Column[str]] = [
            column("recorded task", str),
            column("demonstrations kept", lambda task: f"{recording.successes[task]:,}"),
            column("starts tried", lambda task: anything(recording.tries.get(task))),
        ]
        first, last = recording.seeds
        caption = f"Only demonstrations that succeed are kept. Seeds {first} to {last}."
        blocks.append(table(recording.successes, columns, caption))
    if not blocks:
        return Section(missing="No data.json yet: `tutti train` describes its data there.")
    return Section(blocks=blocks)


def _data(data: Json) -> list[Block]:
    """What `DataBundle.describe` says, in all and of each source."""
    nested = {name: value for name, value in data.items() if isinstance(value, dict)}
    sources: list[Json] = data["sources"]
    listed = ("sources", "mixture")
    totals = {name: value for name, value in data.items() if name not in nested and name not in listed}
    blocks: list[Block] = [facts_of(totals)]
    if len(sources) > 1:
        columns = [(words(key), "", lambda row, key=key: _data_cell(key, row.get(key))) for key in sources[0]]
        blocks.append(table(sources, columns, "sources"))
    else:
        blocks += [facts_of(source, "sources") for source in sources]
    return [*blocks, *(facts_of(value, words(name)) for name, value in nested.items())]


def _mixture(shares: Sequence[Json], records: Records) -> list[Block]:
    """What each of several sources has of the batches, and the loss of each term on it."""
    if not shares:
        return []
    terms = list(dict.fromkeys(term for term, _ in records.named("loss/*/raw@*")))

    def loss(term: str, source: str) -> Cell:
        training, held = (
            records.last(name) for name in (f"loss/{term}/raw@{source}", f"valid/{term}@{source}")
        )
        shown = [plain(one) if one is not None else "" for one in (training, held)]
        return Cell(text=shown[0] or NOTHING, small=f"{shown[1]} held out" if shown[1] else "")

    def epochs(source: str) -> str:
        drawn = records.last(f"data/epochs@{source}")
        return NOTHING if drawn is None else plain(drawn)

    columns: list[Column[Json]] = [
        column("source", lambda row: Cell(text=row["name"], mood="text")),
        column("training windows", lambda row: f"{row['windows']:,}"),
        column("weight", lambda row: plain(row["weight"])),
        column("share of a batch", lambda row: percent(row["share"], 1)),
        column("epochs so far", lambda row: epochs(row["name"])),
        *(column(f"{term} loss", lambda row, term=term: loss(term, row["name"])) for term in terms),
    ]
    colours = {row["name"]: f"c{1 + number % 6}" for number, row in enumerate(shares)}
    plots = [
        Plot(
            f"{term} by source",
            "loss",
            [
                Line(f"loss/{term}/raw@*", style="curve"),
                Line(f"valid/{term}@*", "*, held-out episodes", style="points"),
            ],
            f"loss/{term}/raw@*",
            each=colours,
        )
        for term in terms
    ]
    drawn = [Line("data/epochs@*", style="exact")]
    plots.append(Plot("Epochs by source", "epochs", drawn, "data/epochs@*", each=colours, log=False))
    caption = "Mixture: losses are those of the last record, of the windows of each source alone."
    return [table(shares, columns, caption), Charts(charts=draw(records, plots))]


def facts_of(values: Json, title: str = "") -> Facts:
    """Keys of JSON in words, each with its value."""
    pairs = [(words(name), _data_cell(name, value).text) for name, value in values.items()]
    return Facts(pairs=pairs, title=title)


def _data_cell(key: str, value: object) -> Cell:
    number = isinstance(value, int | float)
    text = duration(value) if key == "seconds" and number else anything(value).replace(VIEW, "")
    return Cell(text=text, mood="" if number else "text")


def reproduce_section(inputs: Inputs) -> Section:
    """Config, commit, versions, machine, and the time of each stage."""
    seconds, summary = inputs.stage_seconds, inputs.summary
    blocks: list[Block] = []
    if seconds:
        title = f"Time per stage: {duration(sum(seconds.values()))} in all"
        help = "Wall time of each stage, with that of interrupted tries."
        blocks.append(Charts(charts=[seconds_chart(title, seconds, help)]))
    commit = {"git commit": summary.commit} if summary.commit else {}
    for title, values in (("Versions", summary.versions), ("Machine", summary.machine), ("", commit)):
        if values:
            pairs = [(words(name), anything(value)) for name, value in values.items()]
            blocks.append(Facts(pairs=pairs, title=title))
    commands = [f"tutti report {inputs.folder.name}"]
    if inputs.config_text:
        blocks.append(Code(title="config.yaml, with every default", text=inputs.config_text))
        commands = ["# save config.yaml from above, then, at the commit above:"]
        commands += [f"tutti {stage} config.yaml name=again" for stage in ("record", "train")]
        commands += [f"tutti {stage} runs/again" for stage in ("evaluate", "report")]
    blocks.append(Code(title="Command", text="\n".join(commands), open=True))
    return Section(lead="Same machine, same versions, same config: same bytes.", blocks=blocks)
