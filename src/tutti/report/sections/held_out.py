"""What held-out episodes tell without acting: open-loop errors, and which inputs the policy uses."""

from __future__ import annotations

from tutti.evaluation.open_loop import PARTS, GroupError
from tutti.evaluation.probes.run import ProbeResult
from tutti.evaluation.statistics.intervals import Estimate
from tutti.report.blocks import MOODS, Block, Cell, Column, Fold, Note, Picture, Section, Table, table
from tutti.report.formatting import NOTHING, plain
from tutti.report.inputs import Inputs

UNITS = {
    "normalised": ("normalised", "In the units of the training: most training actions lie in [-1, 1]."),
    "data": ("data units", "In the units of the data set, mean over action dimensions."),
}
SWAP = (
    "How far another task's instruction moves the predicted chunk, as a multiple of the error. Near 0 the "
    "model ignores its text."
)
CAPTION = (
    "Illustrative: which image patches the executed actions come from, and which tokens they are read from. "
    "It shows that a patch moves the action, not that it should."
)
ABLATED = "Removed as tokens, by their masks; the state is set to 0 in normalised units."
MOVE = "sum |a - a'| / sum |a - a*| over the executed part: in units of the error."
GROWTH = "sum |a' - a*| / sum |a - a*| - 1."
FITTED = "Closed form, fitted on training windows, scored on held-out ones."
GROWTH = "sum |a' - a*| / sum |a - a*| - 1."
MEAN_ERROR = "Masked mean |a - a*| of the executed part, normalised units."
TARGET = "R2 on held-out windows; for the task the share named rightly."


def open_loop_section(inputs: Inputs) -> Section:
    """Error of the predicted chunks on held-out episodes, and how far a swapped instruction moves them."""
    errors = inputs.open_loop
    if errors is None:
        return Section(missing="Not run yet: `tutti evaluate` predicts chunks on held-out episodes.")
    lead = (
        "Mean absolute error of predicted against recorded actions on held-out episodes, without acting: of "
        f"the first action, of the {errors.executed} that are executed, and of the whole chunk of "
        f"{errors.chunk}. A small error here is no evidence of success."
    )
    columns: list[Column[GroupError]] = [
        ("task", "", lambda row: row.name),
        ("windows", "Held-out windows.", lambda row: f"{row.windows:,}"),
        *(
            (f"{part}, {unit}", help, lambda row, key=key, part=part: plain(getattr(getattr(row, key), part)))
            for key, (unit, help) in UNITS.items()
            for part in PARTS
        ),
        ("instruction swap", SWAP, lambda row: NOTHING if row.swap is None else f"{row.swap:.2f} x"),
    ]
    rows = (*errors.groups, errors.overall)
    made = table(rows, columns, "Mean absolute error.", last_is_total=len(rows) > 1)
    return Section(lead=lead, blocks=[made])


def probes_section(inputs: Inputs) -> Section:
    """Every finding, then the numbers behind them, then the occlusion maps."""
    found = inputs.probes
    if found is None:
        missing = "Not run yet: `tutti probe RUN` probes the newest checkpoint without a simulator, within "
        return Section(missing=f"{missing}minutes.")
    lead = (
        f"{found.checkpoint} on {found.windows:,} windows of {found.episodes:,} held-out episodes, without "
        "acting. Intervals: 95 %, over episodes. A probe finds a model that is broken in a way the loss does "
        "not show; it does not replace rollouts."
    )
    blocks: list[Block] = [Note(text=one.text, mood=MOODS[one.severity]) for one in found.findings]
    blocks.append(Fold(title="The numbers", blocks=probe_tables(found)))
    if inputs.occlusion:
        blocks.append(Picture(png=inputs.occlusion, caption=CAPTION))
    return Section(lead=lead, blocks=blocks)


def probe_tables(result: ProbeResult) -> list[Table]:
    """Input ablation, baselines and linear probes, for the page and the terminal."""
    error = " ".join(result.ablations.error.texts(digits=3))
    return [
        table(
            result.ablations.rows,
            [
                ("removed input", ABLATED, lambda row: row.name),
                ("actions move", MOVE, lambda row: _cell(row.action_shift, " x")),
                ("error grows", GROWTH, lambda row: _cell(row.increase, " %", 0)),
            ],
            "How far the actions depend on each input.",
        ),
        table(
            result.baselines,
            [
                ("regression from", FITTED, lambda row: row.name),
                ("error", MEAN_ERROR, lambda row: _cell(row.error, digits=3)),
                ("over the model's", "Above 1 the model is better.", lambda row: _cell(row.ratio, " x")),
            ],
            f"What one input alone would do. The model's own error: {error}.",
        ),
        table(
            result.probes,
            [
                ("features", "Frozen; masked means of tokens, or the readout.", lambda row: row.features),
                ("target", TARGET, lambda row: Cell(text=row.target, mood="text")),
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
