"""`tutti doctor CONFIG`: what a training would begin with is built and examined, before it costs time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich import box
from rich.table import Table

from tutti.config.run_config import RunConfig
from tutti.data.bundle import DataBundle
from tutti.debug import activation_checks as activity
from tutti.debug import gradient_checks as gradients
from tutti.debug.activation_checks import Activity
from tutti.debug.data_checks import check_leak, check_recordings
from tutti.debug.gradient_checks import Rehearsal, ShareTable, phase_tables
from tutti.debug.remarks import Remark, note
from tutti.debug.text_test import TextTest, check_text
from tutti.evaluation.closed_loop.starts import DATASET
from tutti.evaluation.probes.baselines import Leak
from tutti.models.vla import VLA
from tutti.objectives.unified import UnifiedLoss
from tutti.runs.build import build_parts, training_threads
from tutti.runs.terminal import console, print_line, progress_bar
from tutti.serving.policy import Policy, find_checkpoint
from tutti.training.diagnostics.reach import ReachTable
from tutti.types import Batch, UserError

UPDATES = 100
BATCHES = 4
SAMPLES = 64
PARTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The tables and every remark. `activity` is by the model looked at."""

    reach: Sequence[tuple[str, ReachTable]]
    shares: Sequence[ShareTable]
    activity: Sequence[tuple[str, Sequence[Activity]]]
    text: TextTest | None
    leak: Leak
    remarks: Sequence[Remark]

    @property
    def problems(self) -> tuple[Remark, ...]:
        """What must be mended; empty if nothing is wrong."""
        return tuple(remark for remark in self.remarks if remark.problem)


def doctor(config: RunConfig, folder: Path | None = None, *, updates: int = UPDATES) -> Diagnosis:
    """Builds data, model and objective as `tutti train` would and examines them, and the newest checkpoint.

    Nothing is written into the run's folder but the cache of decoded pictures, which the training will use.

    Raises: UserError if there are no data yet, or anything that `tutti train` would raise at its start.
    """
    folder = folder or Path("runs") / config.name
    if not config.data.sources and not (folder / DATASET).is_dir():
        raise UserError(
            f"{folder / DATASET}: there are no data to look at yet. Record first (tutti record CONFIG), or "
            "name data sets in data.sources."
        )
    with training_threads(config):
        data, model, objective = build_parts(config, folder)
        return examine(config, data, model, objective, updates=updates, checkpoint=_newest(folder))


def examine(
    config: RunConfig,
    data: DataBundle,
    model: VLA,
    objective: UnifiedLoss,
    *,
    updates: int = UPDATES,
    checkpoint: Path | None = None,
) -> Diagnosis:
    """All that is looked at. `model` and `objective` are used up: `updates` updates are made with them."""
    remarks: list[Remark] = []
    with progress_bar("examining") as bar:
        remarks += check_recordings(data)
        leak, found = check_leak(data)
        remarks += found
        bar(1, PARTS)
        text, found = check_text(data, config.seed)
        remarks += found
        bar(2, PARTS)
        with Rehearsal(config, data, model, objective) as rehearsal:
            device = rehearsal.trainer.machine.device
            batches = [data.train.batch_at(number).to(device) for number in range(BATCHES)]
            samples = _enough(batches, data)
            tables, found = phase_tables(config, model, objective, batches)
            remarks += found
            bar(3, PARTS)
            looks = [("at initialisation", activity.activity(model, samples))]
            start = rehearsal.shares(batches, at_end=False)
            found = rehearsal.run(updates)
            remarks += found
            bar(4, PARTS)
            if rehearsal.updates and not found:
                looks.append((f"after {rehearsal.updates} updates", activity.activity(model, samples)))
            shares = [start]
            if not found:
                shares.append(rehearsal.shares(batches, at_end=True))
                remarks += gradients.judge(config, *shares)
        bar(5, PARTS)
        if checkpoint is not None:
            remarks += _look_at_checkpoint(checkpoint, config, data, samples, looks)
        for when, rows in looks:
            remarks += activity.judge(when, rows)
        bar(6, PARTS)
    return Diagnosis(
        reach=tables,
        shares=tuple(shares),
        activity=tuple(looks),
        text=text,
        leak=leak,
        remarks=tuple(remarks),
    )


def print_diagnosis(found: Diagnosis) -> None:
    """The tables, the notes, and last the problems or that there are none."""
    for phase, table in found.reach:
        _print(f"Reach, phase '{phase}': norm of each raw term's gradient (. none)", table.rows())
    for shares in found.shares:
        head = ("part", *(f"{term} x {shares.lambdas[term]:g}" for term in shares.terms))
        rows = [
            (part, *(f"{100 * own.get(term, 0):.1f} %" for term in shares.terms))
            for part, own in shares.shares.items()
        ]
        _print(shares.title, [head, *rows])
    rows = [
        (row.features, when, f"{100 * row.dead:.0f} %", "" if row.rank is None else f"{row.rank:.1f}")
        for when, looked in found.activity
        for row in looked
    ]
    _print("Features", [("features", "model", "dead units", "effective rank"), *rows])
    if found.text is not None:
        print_line(
            f"Text: {found.text.texts} instructions over {found.text.episodes} episodes; independent of the "
            f"episode p = {found.text.dependence_p:.2g}; R2 of the action from state and pictures "
            f"{found.text.without_text:.2f}, and with the text {found.text.with_text:.2f}."
        )
    print_line(f"State: R2 {found.leak.now:.3f} of a linear map to the next action.")
    for remark in found.remarks:
        if not remark.problem:
            print_line(f"- {remark.about}: {remark.text}")
    for remark in found.problems:
        print_line(f"! {remark.about}: {remark.text}")
    count = len(found.problems)
    notes = len(found.remarks) - count
    weaker = f" The {notes} note{'s' if notes > 1 else ''} above may be meant so." if notes else ""
    problems = f"{count} problem{'s' if count > 1 else ''}, marked with !."
    print_line(f"{problems if count else 'Nothing is wrong.'}{weaker}")


def _look_at_checkpoint(
    checkpoint: Path,
    config: RunConfig,
    data: DataBundle,
    samples: Sequence[Batch],
    looks: list[tuple[str, tuple[Activity, ...]]],
) -> list[Remark]:
    """Adds the checkpoint's features to `looks`; a note where it is of other data or cannot be read."""
    try:
        model = Policy.load(checkpoint, "raw", trust_code=config.classes).model
    except UserError as error:
        return [note("checkpoint", f"{checkpoint.name} was not looked at: {str(error).splitlines()[0]}")]
    if model.spec != data.spec:
        return [note("checkpoint", f"{checkpoint.name} was not looked at: it was trained on other data.")]
    looks.append((f"in {checkpoint.name}", activity.activity(model, [batch.to("cpu") for batch in samples])))
    return []


def _newest(folder: Path) -> Path | None:
    try:
        return find_checkpoint(folder)
    except UserError:
        return None


def _enough(batches: Sequence[Batch], data: DataBundle) -> list[Batch]:
    """Batches with `SAMPLES` windows at least, so that a small batch size does not look like a collapse."""
    found: list[Batch] = []
    device = batches[0].window.device
    more: Iterator[Batch] = (
        data.train.batch_at(number).to(device) for number in range(len(batches), SAMPLES + 1)
    )
    for batch in chain(batches, more):
        found.append(batch)
        if sum(len(one.window) for one in found) >= SAMPLES:
            break
    return found


def _print(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    layout = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}  # narrow enough for 80
    table = Table(title=title, title_justify="left", **layout)
    for number, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
