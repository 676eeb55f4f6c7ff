"""The section of the probes: does it look and listen, or could it be copying?"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

from tutti.report.blocks import MOODS, Block, Cell, Fold, Note, Picture, Section, Table
from tutti.report.formatting import NOTHING, Number, anything
from tutti.report.inputs import Inputs, Json
from tutti.report.json_tables import blocks_of

MISSING = "Not run yet: `tutti probe RUN` asks the checkpoint, without a simulator, within minutes."
CAPTION = (
    "Illustrative: where the executed actions come from, and which tokens they are read from. It shows that "
    "a patch moves the action, not that it should."
)


def probe_problems(inputs: Inputs) -> list[str]:
    """The faults and warnings for the top of the page: what the model ignores or may be copying."""
    return [_text(one) for one in _findings(inputs.probes) if one["severity"] in ("fault", "warning")]


def probes_section(inputs: Inputs) -> Section:
    """Every sentence, then the figures behind them, then the occlusion maps."""
    probes = inputs.probes
    section = partial(Section, id="probes", title="Does it look and listen?")
    if not probes:
        return section(missing=MISSING)
    findings = _findings(probes)
    if not findings:
        return section(blocks=blocks_of(probes))
    name, windows, episodes = (anything(probes.get(key)) for key in ("checkpoint", "windows", "episodes"))
    lead = (
        f"{name} on {windows} windows of {episodes} held-out episodes, without acting. Intervals: 95 %, over "
        "episodes. A probe finds a model that is broken in a way the loss does not show; it does not replace "
        "rollouts."
    )
    blocks: list[Block] = [
        Note(text=_text(one), mood=MOODS.get(str(one["severity"]), "")) for one in findings
    ]
    tables = [_ablations(probes), _baselines(probes), _linear(probes)]
    blocks.append(Fold(title="The figures", blocks=[table for table in tables if table is not None]))
    if inputs.occlusion:
        source = "data:image/png;base64," + base64.b64encode(inputs.occlusion).decode("ascii")
        blocks.append(Picture(source=source, caption=CAPTION))
    return section(lead=lead, blocks=blocks)


def _findings(probes: Json | None) -> list[Json]:
    rows = _rows(probes, "findings")
    return [one for one in rows if {"sentence", "severity"} <= set(one)]


def _text(finding: Json) -> str:
    """The sentence and the cure of a finding in probes.json."""
    return f"{finding['sentence']} {finding.get('cure') or ''}".rstrip()


def _ablations(probes: Json) -> Table | None:
    heads = [
        ("taken away", "Removed as tokens, by their masks; the state is set to 0 in normalised units."),
        ("actions move", "sum |a - a'| / sum |a - a*| over the executed part: in units of the error."),
        ("error grows", "sum |a' - a*| / sum |a - a*| - 1."),
    ]
    rows = [
        [
            Cell(text=str(row.get("name", ""))),
            _estimate(row.get("action_shift"), " x"),
            _estimate(row.get("increase"), " %", 0),
        ]
        for row in _rows(probes.get("ablations"), "rows")
    ]
    return Table(heads=heads, rows=rows, caption="What the actions owe to each input.") if rows else None


def _baselines(probes: Json) -> Table | None:
    heads = [
        ("regression from", "Closed form, fitted on training windows, scored on held-out ones."),
        ("error", "Masked mean |a - a*| of the executed part, normalised units."),
        ("over the model's", "Above 1 the model is better."),
    ]
    rows = [
        [
            Cell(text=str(row.get("name", ""))),
            _estimate(row.get("error"), decimals=3),
            _estimate(row.get("ratio"), " x"),
        ]
        for row in _rows(probes.get("baselines"))
    ]
    return Table(heads=heads, rows=rows, caption="What one input alone would do.") if rows else None


def _linear(probes: Json) -> Table | None:
    heads = [
        ("features", "Frozen; masked means of tokens, or the readout."),
        ("target", "R2 on held-out windows; for the task the share named rightly."),
        ("trained", ""),
        ("untrained", "The same model with fresh weights."),
    ]
    rows = [
        [
            Cell(text=str(row.get("features", ""))),
            Cell(text=str(row.get("target", "")), mood="text"),
            _estimate(row.get("trained")),
            _estimate(row.get("untrained")),
        ]
        for row in _rows(probes.get("probes"))
    ]
    return (
        Table(heads=heads, rows=rows, caption="What a linear map reads from the features.") if rows else None
    )


def _rows(value: Any, key: str | None = None) -> Sequence[Json]:
    if key is not None:
        value = value.get(key) if isinstance(value, dict) else None
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _estimate(value: Any, unit: str = "", decimals: int = 2) -> Cell:
    """A number with its interval; fractions become per cent where that is the unit."""
    number = value.get("value") if isinstance(value, dict) else None
    if not isinstance(number, int | float):
        return Cell(text=NOTHING, mood="quiet")
    scale = 100 if unit == " %" else 1

    def text(number: Number) -> str:
        return f"{round(scale * number, decimals) + 0.0:.{decimals}f}"  # + 0.0: no "-0"

    interval = value.get("interval")
    small = ""
    if isinstance(interval, dict) and all(isinstance(interval.get(k), int | float) for k in ("low", "high")):
        small = f"[{text(interval['low'])}, {text(interval['high'])}]"
    return Cell(text=text(number) + unit, small=small)
