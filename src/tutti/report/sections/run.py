"""The descriptive sections: open loop, first batch, model, data, protocol, how to reproduce the run."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from tutti.report.blocks import Block, Cell, Charts, Code, Facts, Note, Picture, Section, Table
from tutti.report.formatting import NOTHING, anything, count, duration, percent, plain
from tutti.report.inputs import Inputs, Json, config_of
from tutti.report.json_tables import blocks_of, words
from tutti.report.sections.success import Evaluation
from tutti.report.svg.rows import seconds_chart

PROTOCOL_WORDS = {
    "suite": "task suite",
    "split": "instructions",
    "chunk": "actions predicted at once (chunk)",
    "executed": "actions executed before the next look",
    "max_decisions": "longest rollout, decisions",
    "distinct_starts": "distinct starts (task, state after reset)",
}
SPLITS = {"held_out": "held-out paraphrases, never trained on", "train": "those of the training"}
WEIGHTS = {"ema": "averaged weights (EMA)", "raw": "raw weights"}


def open_loop_section(inputs: Inputs) -> Section:
    """Error of the predicted chunks on held-out episodes, and how far a swapped instruction moves them."""
    found = inputs.open_loop
    section = partial(Section, id="open-loop", title="Open loop")
    if not found:
        return section(missing="Not run yet: `tutti evaluate` predicts chunks on held-out episodes.")
    lead = (
        "Mean absolute error of predicted against recorded actions on held-out episodes, without acting: of "
        f"the first action, of the {anything(found.get('executed', ''))} that are executed, and of the whole "
        f"chunk of {anything(found.get('chunk', 'all'))}. A small error here is no evidence of success."
    )
    groups = found.get("groups")
    rows = [*(groups if isinstance(groups, list) else ()), found.get("overall")]
    if not all(isinstance(row, dict) and {"normalised", "data"} <= set(row) for row in rows):
        return section(blocks=blocks_of(found))
    return section(lead=lead, blocks=[_errors(rows)])


def _errors(rows: list[Json]) -> Table:
    parts = ("first", "executed", "chunk")
    units = {"normalised": "normalised", "data": "data units"}
    normalised = "In the units that the model is trained in: most training actions lie in [-1, 1]."
    explained = {
        "normalised": normalised,
        "data": "In the units of the data set, mean over action dimensions.",
    }
    heads = [("task", ""), ("windows", "Held-out windows.")]
    heads += [(f"{part}, {units[unit]}", explained[unit]) for unit in units for part in parts]
    heads.append(
        (
            "instruction swap",
            "How far another task's instruction moves the predicted chunk, as a multiple of the error. Near "
            "0 the model ignores its text.",
        )
    )
    cells = [
        [Cell(text=str(row.get("name", ""))), Cell(text=anything(row.get("windows")))]
        + [Cell(text=_error(row[unit], part)) for unit in units for part in parts]
        + [Cell(text=_times(row.get("swap")))]
        for row in rows
    ]
    return Table(heads=heads, rows=cells, caption="Mean absolute error.", last_is_total=len(rows) > 1)


def _times(ratio: Any) -> str:
    return f"{ratio:.2f} x" if isinstance(ratio, int | float) else NOTHING


def _error(errors: Any, part: str) -> str:
    value = errors.get(part) if isinstance(errors, dict) else None
    return plain(value) if isinstance(value, int | float) else NOTHING


def model_section(inputs: Inputs) -> Section:
    """The modules with parameters and FLOPs, and the token sequence."""
    model = inputs.model
    section = partial(Section, id="model", title="Model")
    if not model:
        return section(missing="No model.json yet: `tutti train` writes it when the model is built.")
    rows = model.get("modules", model.get("rows"))
    tokens = model.get("tokens", model.get("token_sequence"))
    blocks: list[Block] = []
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        blocks.append(_modules(rows))
    if tokens:
        blocks.append(_tokens(tokens))
    rest = {k: v for k, v in model.items() if k not in ("modules", "rows", "tokens", "token_sequence")}
    return section(blocks=blocks + blocks_of(rest))


def _modules(rows: list[Json]) -> Table:
    heads = [
        (
            "module",
            "A module's row contains those below it. The heads of the loss terms are not part of the model.",
        ),
        ("parameters", "Numbers that training moves."),
        (
            "FLOPs per sample",
            "Matrix products and convolutions of one forward pass; a multiply-add counts as two.",
        ),
        ("share of FLOPs", "Share of the model's forward FLOPs."),
    ]
    cells = [
        [
            Cell(text="\u2003" * _integer(row.get("depth")) + str(row.get("name", row.get("module", "")))),
            Cell(text=_count(row.get("parameters"))),
            Cell(text=_count(row.get("flops"))),
            Cell(text=percent(row["share"], 1) if isinstance(row.get("share"), int | float) else NOTHING),
        ]
        for row in rows
    ]
    return Table(
        heads=heads, rows=cells, caption="A training step costs about three times the forward FLOPs."
    )


def _tokens(tokens: Any) -> Facts:
    if isinstance(tokens, list) and all(isinstance(row, dict) for row in tokens):
        pairs = [(_short(row.get("name")), _tokens_of(row.get("tokens"))) for row in tokens]
        total = sum(_integer(row.get("tokens")) for row in tokens)
        return Facts(
            pairs=[*pairs, ("whole sequence", f"{total} tokens")], title="Token sequence of the fusion"
        )
    return Facts(pairs=[("sequence", anything(tokens))], title="Token sequence of the fusion")


def _short(name: Any) -> str:
    return str(name).replace("observation.images.", "")


def _tokens_of(number: Any) -> str:
    return f"{anything(number)} token{'' if number == 1 else 's'}"


def batch_section(inputs: Inputs) -> Section:
    """What the model saw first."""
    section = partial(Section, id="first-batch", title="First batch")
    if inputs.first_batch is None:
        return section(missing="No first_batch.png yet: `tutti train` draws it before the first step.")
    source = "data:image/png;base64," + base64.b64encode(inputs.first_batch).decode("ascii")
    caption = (
        "Windows of the first batch as the model got them: every view, the window's number, the instruction."
    )
    return section(blocks=[Picture(source=source, caption=caption)])


def data_section(inputs: Inputs) -> Section:
    """What was learned from."""
    section = partial(Section, id="data", title="Data")
    blocks = blocks_of(inputs.data) if inputs.data else []
    blocks += _recording(inputs.recording or {})
    if not blocks:
        return section(missing="No data.json yet: `tutti train` describes its data there.")
    return section(blocks=blocks)


def _recording(recording: Json) -> list[Block]:
    """How many demonstrations of each task were kept, of how many starts that the expert tried."""
    successes, tries = recording.get("successes"), recording.get("tries")
    if not isinstance(successes, dict) or not isinstance(tries, dict):
        return []
    heads = [
        ("recorded task", ""),
        ("demonstrations kept", "Episodes in which the scripted expert succeeds."),
        ("starts tried", "Seeds up to the last one that was needed."),
    ]
    rows = [
        [Cell(text=str(task)), Cell(text=anything(kept)), Cell(text=anything(tries.get(task)))]
        for task, kept in successes.items()
    ]
    seeds = recording.get("seeds")
    span = f" Seeds {seeds[0]} to {seeds[1]}." if isinstance(seeds, list) and len(seeds) == 2 else ""
    return [Table(heads=heads, rows=rows, caption=f"Only demonstrations that succeed are kept.{span}")]


def protocol_section(inputs: Inputs, evaluation: Evaluation) -> Section:
    """How the score was taken, so that another can be compared with it."""
    section = partial(Section, id="protocol", title="Protocol of the evaluation")
    found = dict(evaluation.protocol)
    if not found:
        return section(missing="Not run yet: the protocol is known once `tutti evaluate` has run.")
    pairs: list[tuple[str, str]] = []
    if "seed_first" in found and "seed_last" in found:
        pairs.append(("seeds of the starts", f"{found.pop('seed_first')} to {found.pop('seed_last')}"))
    environment = found.pop("environment", None)
    pairs = [(PROTOCOL_WORDS.get(k, words(k)), _protocol_value(k, v)) for k, v in found.items()] + pairs
    pairs += _circumstances(inputs)
    blocks: list[Block] = [Facts(pairs=pairs)]
    if environment:
        blocks.append(Code(title="Fingerprint of the simulator", text=anything(environment)))
    notes = (inputs.results or {}).get("notes")
    if isinstance(notes, list):
        blocks += [Note(text=str(note)) for note in notes[:2]]
    lead = (
        "Success counts from its first moment on and ends the rollout. Every control meets the same starts."
    )
    return section(lead=lead, blocks=blocks)


def _protocol_value(key: str, value: Any) -> str:
    return SPLITS.get(str(value), str(value)) if key == "split" else anything(value)


def _circumstances(inputs: Inputs) -> list[tuple[str, str]]:
    """What the evaluation's own record does not say: weights, views, control rate."""
    pairs: list[tuple[str, str]] = []
    weights = config_of(inputs, "evaluation").get("weights")
    if weights:
        pairs.append(("weights evaluated", WEIGHTS.get(str(weights), str(weights))))
    tokens = (inputs.model or {}).get("tokens")
    names = (
        [str(row.get("name")) for row in tokens if isinstance(row, dict)] if isinstance(tokens, list) else []
    )
    views = [_short(name.removeprefix("vision: ")) for name in names if name.startswith("vision: ")]
    if views:
        pairs.append(("views", ", ".join(views)))
    frames, seconds = ((inputs.data or {}).get(key) for key in ("frames", "seconds"))
    if isinstance(frames, int | float) and isinstance(seconds, int | float) and seconds > 0:
        pairs.append(("control rate", f"{plain(frames / seconds)} actions per second"))
    return pairs


def reproduce_section(inputs: Inputs) -> Section:
    """Config, commit, versions, machine, and where the time went."""
    summary = inputs.summary or {}
    seconds = stage_seconds(inputs)
    blocks: list[Block] = []
    if seconds:
        help = "Wall time of each stage, interrupted parts included where they were kept."
        blocks.append(
            Charts(
                charts=[
                    seconds_chart(f"Time per stage: {duration(sum(seconds.values()))} in all", seconds, help)
                ]
            )
        )
    for key, title in (("versions", "Versions"), ("machine", "Machine")):
        value = summary.get(key)
        if isinstance(value, dict):
            blocks.append(Facts(pairs=[(words(str(k)), anything(v)) for k, v in value.items()], title=title))
        elif value:
            blocks.append(Facts(pairs=[(title.lower(), anything(value))]))
    commit = summary.get("commit", summary.get("git_commit"))
    if commit:
        blocks.append(Facts(pairs=[("git commit", anything(commit))]))
    if inputs.config_text:
        blocks.append(Code(title="config.yaml, every default spelled out", text=inputs.config_text))
    blocks.append(Code(title="Command", text=_command(inputs), open=True))
    return Section(
        id="reproduce",
        title="Reproduce",
        lead="Same machine, same versions, same config: same bytes.",
        blocks=blocks,
    )


def _command(inputs: Inputs) -> str:
    if inputs.config_text is None:
        return f"tutti report {inputs.folder.name}"
    lines = ["# save config.yaml from above, then, at the commit above:"]
    lines += [f"tutti {stage} config.yaml name=again" for stage in ("record", "train")]
    return "\n".join([*lines, "tutti evaluate runs/again", "tutti report runs/again"])


def stage_seconds(inputs: Inputs) -> dict[str, float]:
    """Stage -> seconds, from stages.json or else from summary.json; a stage of no time is left out."""
    found: dict[str, float] = {}
    for stages in (inputs.stages, (inputs.summary or {}).get("stage_seconds")):
        for name, value in stages.items() if isinstance(stages, dict) and not found else ():
            number = value.get("seconds") if isinstance(value, dict) else value
            if isinstance(number, int | float) and not isinstance(number, bool) and number > 0:
                found[str(name)] = float(number)
    return found


def unfinished_stages(inputs: Inputs) -> list[str]:
    """The stages that were begun and not ended; the report's own is always one of them and left out."""
    stages = inputs.stages or {}
    entries = {name: entry for name, entry in stages.items() if isinstance(entry, dict) and name != "report"}
    return [str(name) for name, entry in entries.items() if entry.get("finished") is False]


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _count(value: Any) -> str:
    return count(value) if isinstance(value, int | float) else NOTHING
