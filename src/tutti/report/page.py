"""A run's folder -> report.html: one page that needs nothing but itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.report.blocks import Note, Section
from tutti.report.formatting import capitalised, count, duration, percent
from tutti.report.inputs import Inputs, config_of, read_inputs
from tutti.report.render import Page, Tile, render
from tutti.report.sections.gradients import influence_section, top_notes
from tutti.report.sections.probes import probe_problems, probes_section
from tutti.report.sections.run import (
    batch_section,
    data_section,
    model_section,
    open_loop_section,
    protocol_section,
    reproduce_section,
    stage_seconds,
    unfinished_stages,
)
from tutti.report.sections.success import (
    Evaluation,
    read_evaluation,
    sentences,
    success_section,
    weak_tasks,
)
from tutti.report.sections.training import training_section
from tutti.report.sections.videos import videos_section
from tutti.storage.files import write_atomically
from tutti.storage.reading import shown

log = logging.getLogger("tutti.report")
T = TypeVar("T")

UNREADABLE = "Left out: the run's files have another form than this version of Tutti writes."
MAX_VIDEO_BYTES = 4_500_000  # of base64; with the rest the page stays below 6 MB


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder`/report.html atomically and gives its path.

    The page holds styles, script, drawings and videos itself and asks the network for nothing (its content
    security policy forbids it). A part whose input is absent says that it has not run yet. Everything that
    the run's files say is escaped. Raises FileNotFoundError if there is no such folder.
    """
    inputs = read_inputs(run_folder)
    remarks: list[str] = []
    nothing = read_evaluation(replace(inputs, results=None, summary=None))
    evaluation = _or(nothing, lambda: read_evaluation(inputs), remarks)
    result, notes = _or(("", []), lambda: sentences(evaluation), remarks)
    parts: dict[str, Callable[[], Section]] = {
        "Success per task": lambda: success_section(evaluation),
        "Rollouts": lambda: videos_section(inputs, MAX_VIDEO_BYTES),
        "Training": lambda: training_section(inputs),
        "Influence": lambda: influence_section(inputs),
        "Open loop": lambda: open_loop_section(inputs),
        "Does it look and listen?": lambda: probes_section(inputs),
        "First batch": lambda: batch_section(inputs),
        "Model": lambda: model_section(inputs),
        "Data": lambda: data_section(inputs),
        "Protocol of the evaluation": lambda: protocol_section(inputs, evaluation),
        "Reproduce": lambda: reproduce_section(inputs),
    }
    sections = [
        _or(Section(id=f"part-{number}", title=title, missing=UNREADABLE), make, remarks)
        for number, (title, make) in enumerate(parts.items())
    ]
    html = render(_page(inputs, evaluation, result, notes, sections, remarks=remarks))
    path = run_folder / "report.html"
    write_atomically(path, html)
    return path


def _or(instead: T, make: Callable[[], T], remarks: list[str]) -> T:
    """`make()`; where the run's files have a form that it does not know, a remark, and `instead`."""
    try:
        return make()
    except Exception as error:  # files of another version, or changed by hand, lead anywhere
        log.debug("a part of the report failed", exc_info=error)
        remarks.append(f"{UNREADABLE} ({type(error).__name__}: {shown(str(error), 200, quoted=False)})")
        return instead


def _page(
    inputs: Inputs,
    evaluation: Evaluation,
    result: str,
    notes: list[Note],
    sections: list[Section],
    *,
    remarks: list[str],
) -> Page:
    found = _or([], lambda: top_notes(inputs), remarks)
    shown_tiles = _or([], lambda: tiles(inputs, evaluation), remarks)
    warned = _or([], lambda: warnings(inputs, evaluation), remarks)
    folder = inputs.folder.resolve().name
    return Page(
        kicker="Tutti: report of a run",
        name=str((inputs.summary or {}).get("name") or config_of(inputs).get("name") or folder),
        result=result,
        tiles=shown_tiles,
        notes=[*notes, *found],
        warnings=[*warned, *remarks],
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
    found = [*probe_problems(inputs), *inputs.failures, *weak_tasks(evaluation)]
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
        found.append(capitalised(TrainingStarts(unknown=tuple(map(str, unknown))).warning))
    if evaluation.resumed:
        found.append(
            f"The evaluation was resumed: {evaluation.resumed} of its rollouts come from an interrupted run."
        )
    return found + [f"{problem}." for problem in inputs.problems]
