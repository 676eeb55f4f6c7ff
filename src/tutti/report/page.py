"""A run's folder -> report.html: one page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from tutti.data.storage import full_disk_is_a_user_error, megabytes, write_atomically
from tutti.evaluation.starts import TrainingStarts
from tutti.report.blocks import Note, Section
from tutti.report.curves import training_section
from tutti.report.finding import capital
from tutti.report.influence import influence_section, top_notes
from tutti.report.inputs import Inputs, config_of, read_inputs
from tutti.report.numbers import count, duration, percent
from tutti.report.outcome import (
    Evaluation,
    read_evaluation,
    sentences,
    success_section,
    weak_tasks,
)
from tutti.report.probes import alarms, probes_section
from tutti.report.render import Page, Tile, render
from tutti.report.sections import (
    batch_section,
    data_section,
    model_section,
    open_loop_section,
    protocol_section,
    reproduce_section,
    stage_seconds,
    unfinished_stages,
)
from tutti.report.videos import videos_section

MOST_VIDEO_BYTES = 4_500_000  # of base64; with the rest the page stays below 6 MB


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder`/report.html atomically and gives its path.

    The page holds styles, script, drawings and videos itself and asks the network for nothing (its content
    security policy forbids it). A part whose input is absent says that it has not run yet. Everything that
    the run's files say is escaped. Raises FileNotFoundError if there is no such folder.
    """
    inputs = read_inputs(run_folder)
    evaluation = read_evaluation(inputs)
    result, notes = sentences(evaluation)
    sections = [
        success_section(evaluation),
        videos_section(inputs, MOST_VIDEO_BYTES),
        training_section(inputs),
        influence_section(inputs),
        open_loop_section(inputs),
        probes_section(inputs),
        batch_section(inputs),
        model_section(inputs),
        data_section(inputs),
        protocol_section(inputs, evaluation),
        reproduce_section(inputs),
    ]
    html = render(_page(inputs, evaluation, result, notes, sections))
    path = run_folder / "report.html"
    with full_disk_is_a_user_error(run_folder, "the report", lambda: megabytes(len(html))):
        write_atomically(path, html.encode("utf-8"))
    return path


def _page(
    inputs: Inputs, evaluation: Evaluation, result: str, notes: list[Note], sections: list[Section]
) -> Page:
    folder = inputs.folder.resolve().name
    return Page(
        kicker="Tutti: report of a run",
        name=str((inputs.summary or {}).get("name") or config_of(inputs).get("name") or folder),
        result=result,
        tiles=tiles(inputs, evaluation),
        notes=[*notes, *top_notes(inputs)],
        warnings=warnings(inputs, evaluation),
        sections=sections,
        footer=f"Written by tutti report from {folder}/. Intervals: 95 %, two-sided.",
    )


def tiles(inputs: Inputs, evaluation: Evaluation) -> list[Tile]:
    """The run in a handful of numbers; one that is not known is left out."""
    found: list[Tile] = []
    mean = evaluation.mean()
    if mean is not None:
        small = f"95 % interval {mean[1].percent()}"
        found.append(Tile(value=percent(mean[0], 1), name="task-mean success", small=small))
        found.append(
            Tile(value=f"{mean[2]:,}", name="rollouts", small=f"over {len(evaluation.policy)} tasks")
        )
    total = (inputs.summary or {}).get("seconds")
    if not isinstance(total, int | float):
        total = sum(stage_seconds(inputs).values())
    if total:
        found.append(Tile(value=duration(total), name="whole pipeline", small=f"{total:,.0f} s"))
    trained = inputs.records.last("time/seconds")
    steps, _ = inputs.records.get("loss/total")
    if steps:
        small = "" if trained is None else f"in {duration(trained)}"
        found.append(Tile(value=f"{steps[-1]:,}", name="optimizer steps", small=small))
    rows = (inputs.model or {}).get("modules", (inputs.model or {}).get("rows"))
    if (
        isinstance(rows, list)
        and rows
        and isinstance(rows[0], dict)
        and isinstance(rows[0].get("parameters"), int)
    ):
        found.append(Tile(value=count(rows[0]["parameters"]), name="parameters"))
    return found


def warnings(inputs: Inputs, evaluation: Evaluation) -> list[str]:
    """What a reader must know before believing the numbers above."""
    found = [*alarms(inputs), *inputs.failures, *weak_tasks(evaluation)]
    records = inputs.records
    if records.not_finite:
        found.append(f"Values that are not finite were recorded in {', '.join(records.not_finite)}.")
    if records.restarts:
        steps = ", ".join(f"{step:,}" for step in records.restarts)
        found.append(f"The run was resumed: its records go back to step {steps}. The later values are shown.")
    for stage in unfinished_stages(inputs):
        found.append(f"The stage '{stage}' has not finished: this page shows what it has left so far.")
    if records.broken_lines:
        found.append(
            f"records.jsonl: {records.broken_lines} torn line(s) left out, as a killed run leaves its last."
        )
    unknown = evaluation.protocol.get("starts_not_known")
    if isinstance(unknown, list) and unknown:
        found.append(capital(TrainingStarts(unknown=tuple(map(str, unknown))).warning))
    if evaluation.resumed:
        found.append(
            f"The evaluation was resumed: {evaluation.resumed} of its rollouts come from an interrupted run."
        )
    return found + [f"{problem}." for problem in inputs.problems]
