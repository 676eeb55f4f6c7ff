"""The report of a run: reads its folder and writes report.html, one self-contained page."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.report.blocks import Section
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
from tutti.report.sections.success import headline, rollouts_of, success_section, weak_tasks
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
    problems: list[str] = []
    parts: dict[str, Callable[[], Section]] = {
        "Success per task": lambda: success_section(inputs),
        "Rollouts": lambda: videos_section(inputs, MAX_VIDEO_BYTES),
        "Training": lambda: training_section(inputs),
        "What trains what": lambda: influence_section(inputs),
        "Open loop": lambda: open_loop_section(inputs),
        "Does it look and listen?": lambda: probes_section(inputs),
        "First batch": lambda: batch_section(inputs),
        "Model": lambda: model_section(inputs),
        "Data": lambda: data_section(inputs),
        "Protocol of the evaluation": lambda: protocol_section(inputs),
        "Reproduce": lambda: reproduce_section(inputs),
    }
    sections = [
        _or(Section(id=f"part-{number}", title=title, missing=UNREADABLE), make, problems)
        for number, (title, make) in enumerate(parts.items())
    ]
    result, notes = _or(("", []), lambda: headline(inputs), problems)
    notes += _or([], lambda: top_notes(inputs), problems)
    tiles = _or([], lambda: _tiles(inputs), problems)
    warnings = _or([], lambda: _warnings(inputs), problems)
    folder = inputs.folder.resolve().name
    html = render(
        Page(
            kicker="Tutti: report of a run",
            name=inputs.summary.name or str(config_of(inputs).get("name") or folder),
            result=result,
            tiles=tiles,
            notes=notes,
            warnings=[*warnings, *problems],
            sections=sections,
            footer=f"Written by tutti report from {folder}/. Intervals: 95 %, two-sided.",
        )
    )
    path = run_folder / "report.html"
    write_atomically(path, html)
    return path


def _or(instead: T, make: Callable[[], T], problems: list[str]) -> T:
    """`make()`; if the run's files have a form that it does not know, a problem, and `instead`."""
    try:
        return make()
    except Exception as error:  # files of another version, or changed by hand, lead anywhere
        log.debug("a part of the report failed", exc_info=error)
        problems.append(f"{UNREADABLE} ({type(error).__name__}: {shown(str(error), 200, quoted=False)})")
        return instead


def _tiles(inputs: Inputs) -> list[Tile]:
    """The run in a handful of numbers; one that is not known is left out."""
    tiles: list[Tile] = []
    if inputs.evaluation is not None:
        score = inputs.evaluation.policy
        small = f"95 % interval {score.interval.percent()}"
        tiles.append(Tile(value=percent(score.mean, 1), name="task-mean success", small=small))
        small = f"over {len(score.tasks)} tasks"
        tiles.append(Tile(value=f"{rollouts_of(score):,}", name="rollouts", small=small))
    if total := inputs.summary.seconds or sum(stage_seconds(inputs).values()):
        tiles.append(Tile(value=duration(total), name="whole pipeline", small=f"{total:,.0f} s"))
    trained = inputs.records.last("time/seconds")
    steps, _ = inputs.records.get("loss/total")
    if steps:
        small = "" if trained is None else f"in {duration(trained)}"
        tiles.append(Tile(value=f"{steps[-1]:,}", name="optimizer steps", small=small))
    if inputs.model is not None and inputs.model.modules:
        tiles.append(Tile(value=count(inputs.model.parameters), name="parameters"))
    return tiles


def _warnings(inputs: Inputs) -> list[str]:
    """What a reader must know before believing the numbers above."""
    warnings = [*probe_problems(inputs), *inputs.failures]
    records, result = inputs.records, inputs.evaluation
    if result is not None:
        warnings += weak_tasks(result)
    if records.not_finite:
        warnings.append(f"Non-finite values were recorded in {', '.join(records.not_finite)}.")
    if records.restarts:
        steps = ", ".join(f"{step:,}" for step in records.restarts)
        warnings.append(
            f"The run was resumed: its records go back to step {steps}. The later values are shown."
        )
    warnings += [
        f"The stage '{stage}' has not finished: this page shows its results so far."
        for stage in unfinished_stages(inputs)
    ]
    if records.broken_lines:
        warnings.append(
            f"records.jsonl: {records.broken_lines} torn line(s) left out; a killed run leaves one."
        )
    if result is not None and result.protocol.starts_not_known:
        warnings.append(capitalised(TrainingStarts(unknown=result.protocol.starts_not_known).warning))
    if result is not None and result.resumed:
        warnings.append(
            f"The evaluation was resumed: {result.resumed} of its rollouts come from an interrupted run."
        )
    return warnings + [f"{problem}." for problem in inputs.problems]
