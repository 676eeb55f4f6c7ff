"""Probes: which inputs the policy uses, and whether it could be copying its state."""

from __future__ import annotations

from functools import partial

from tutti.evaluation.probes.run import ProbeResult
from tutti.evaluation.statistics.intervals import Estimate
from tutti.report.blocks import MOODS, Block, Fold, Note, Picture, Section
from tutti.report.inputs import Inputs
from tutti.report.tables import Cell, Table, table

MISSING = "Not run yet: `tutti probe RUN` probes the newest checkpoint without a simulator, within minutes."
CAPTION = (
    "Illustrative: which image patches the executed actions come from, and which tokens they are read from. "
    "It shows that a patch moves the action, not that it should."
)


def probe_problems(inputs: Inputs) -> list[str]:
    """The faults and warnings for the top of the page: inputs that the model ignores or may be copying."""
    return [] if inputs.probes is None else [finding.text for finding in inputs.probes.result.problems]


def probes_section(inputs: Inputs) -> Section:
    """Every finding, then the numbers behind them, then the occlusion maps."""
    section = partial(Section, id="probes", title="Does it look and listen?")
    if inputs.probes is None:
        return section(missing=MISSING)
    result = inputs.probes.result
    lead = (
        f"{inputs.probes.checkpoint} on {result.windows:,} windows of {result.episodes:,} held-out episodes, "
        "without acting. Intervals: 95 %, over episodes. A probe finds a model that is broken in a way the "
        "loss does not show; it does not replace rollouts."
    )
    blocks: list[Block] = [
        Note(text=finding.text, mood=MOODS[finding.severity]) for finding in result.findings
    ]
    blocks.append(Fold(title="The numbers", blocks=probe_tables(result)))
    if inputs.occlusion:
        blocks.append(Picture(png=inputs.occlusion, caption=CAPTION))
    return section(lead=lead, blocks=blocks)


def probe_tables(result: ProbeResult) -> list[Table]:
    """Input ablation, baselines and linear probes, for the page and the terminal."""
    ablated = "Removed as tokens, by their masks; the state is set to 0 in normalised units."
    error = " ".join(result.ablations.error.texts(digits=3))
    fitted = "Closed form, fitted on training windows, scored on held-out ones."
    return [
        table(
            result.ablations.rows,
            [
                ("removed input", ablated, lambda row: row.name),
                (
                    "actions move",
                    "sum |a - a'| / sum |a - a*| over the executed part: in units of the error.",
                    lambda row: _cell(row.action_shift, " x"),
                ),
                (
                    "error grows",
                    "sum |a' - a*| / sum |a - a*| - 1.",
                    lambda row: _cell(row.increase, " %", 0),
                ),
            ],
            "How far the actions depend on each input.",
        ),
        table(
            result.baselines,
            [
                ("regression from", fitted, lambda row: row.name),
                (
                    "error",
                    "Masked mean |a - a*| of the executed part, normalised units.",
                    lambda row: _cell(row.error, digits=3),
                ),
                ("over the model's", "Above 1 the model is better.", lambda row: _cell(row.ratio, " x")),
            ],
            f"What one input alone would do. The model's own error: {error}.",
        ),
        table(
            result.probes,
            [
                ("features", "Frozen; masked means of tokens, or the readout.", lambda row: row.features),
                (
                    "target",
                    "R2 on held-out windows; for the task the share named rightly.",
                    lambda row: Cell(text=row.target, mood="text"),
                ),
                ("trained", "", lambda row: _cell(row.trained)),
                ("untrained", "The same model with fresh weights.", lambda row: _cell(row.untrained)),
            ],
            "What a linear map reads from the features.",
        ),
    ]


def _cell(estimate: Estimate, unit: str = "", digits: int = 2) -> Cell:
    """A number with its interval; fractions become per cent where that is the unit."""
    value, interval = estimate.texts(100 if unit == " %" else 1, digits)
    return Cell(text=value + unit, small=interval)
