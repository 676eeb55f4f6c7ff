"""The report of a run: reads its folder and writes report.html, one self-contained page."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.report.blocks import Page, Section, Tile, render
from tutti.report.chinese import Language, in_language
from tutti.report.formatting import capitalised, count, duration, percent
from tutti.report.inputs import Inputs, read_inputs
from tutti.report.sections.evaluation import (
    headline,
    protocol_section,
    rollouts_of,
    success_section,
    videos_section,
    weak_tasks,
)
from tutti.report.sections.gradients import TITLE, influence_section, top_notes
from tutti.report.sections.held_out import open_loop_section, probes_section
from tutti.report.sections.run import batch_section, data_section, model_section, reproduce_section
from tutti.report.sections.training import training_section
from tutti.storage.files import write_atomically
from tutti.storage.reading import shown

log = logging.getLogger("tutti.report")
T = TypeVar("T")

SECTIONS: dict[str, tuple[str, Callable[[Inputs], Section]]] = {
    "success": ("Success per task", success_section),
    "videos": ("Rollouts", videos_section),
    "training": ("Training", training_section),
    "what-trains-what": (TITLE, influence_section),
    "open-loop": ("Open loop", open_loop_section),
    "probes": ("Does it look and listen?", probes_section),
    "first-batch": ("First batch", batch_section),
    "model": ("Model", model_section),
    "data": ("Data", data_section),
    "protocol": ("Protocol of the evaluation", protocol_section),
    "reproduce": ("Reproduce", reproduce_section),
}
UNREADABLE = "Left out: the run's files have another form than this version of Tutti writes."


def write_report(run_folder: Path, language: Language = "en") -> Path:
    """Writes `run_folder`/report.html, or report.zh.html in Chinese, atomically and gives its path. Raises:
    as `report_page`."""
    path = run_folder / ("report.html" if language == "en" else f"report.{language}.html")
    write_atomically(path, in_language(render(report_page(run_folder)), language))
    return path


def report_page(run_folder: Path) -> Page:
    """The report of a run as its files are now.

    The page holds styles, script, drawings and videos itself and asks the network for nothing (its content
    security policy forbids it). A part whose input is absent says that it has not run yet. Everything that
    the run's files say is escaped. Raises FileNotFoundError if there is no such folder.
    """
    inputs = read_inputs(run_folder)
    problems: list[str] = []

    def attempt(make: Callable[[Inputs], T], instead: T) -> T:
        """`make(inputs)`; if the run's files have a form that it does not know, a problem, and `instead`."""
        try:
            return make(inputs)
        except Exception as error:  # files of another version, or changed by hand, lead anywhere
            log.debug("a part of the report failed", exc_info=error)
            problems.append(f"{UNREADABLE} ({type(error).__name__}: {shown(str(error), 200, quoted=False)})")
            return instead

    sections = [
        replace(attempt(make, Section(missing=UNREADABLE)), id=id, title=title)
        for id, (title, make) in SECTIONS.items()
    ]
    result, notes = attempt(headline, ("", []))
    folder = inputs.folder.resolve().name
    return Page(
        kicker="Tutti: report of a run",
        name=inputs.summary.name or str(inputs.config.get("name") or folder),
        result=result,
        tiles=attempt(_tiles, []),
        notes=[*notes, *attempt(top_notes, [])],
        warnings=[*attempt(_warnings, []), *problems],
        sections=sections,
        footer=f"Written by tutti report from {folder}/. Intervals: 95 %, two-sided.",
    )


def _tiles(inputs: Inputs) -> list[Tile]:
    """The run in a handful of numbers; one that is not known is left out."""
    tiles: list[Tile] = []
    if inputs.evaluation is not None:
        score = inputs.evaluation.policy
        interval, tasks = score.interval.percent(), f"over {len(score.tasks)} tasks"
        tiles += [
            Tile(
                value=percent(score.mean, 1),
                name="task-mean success",
                small=f"95 % interval {interval}, one training",
            ),
            Tile(value=f"{rollouts_of(score):,}", name="rollouts", small=tasks),
        ]
    if total := inputs.summary.seconds or sum(inputs.stage_seconds.values()):
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
    records, result = inputs.records, inputs.evaluation
    warnings = [finding.text for finding in inputs.data_findings if finding.is_problem]
    warnings += [finding.text for finding in (inputs.probes.problems if inputs.probes is not None else ())]
    warnings += [*inputs.failures, *(weak_tasks(result) if result is not None else ())]
    if records.not_finite:
        warnings.append(f"Non-finite values were recorded in {', '.join(records.not_finite)}.")
    if records.restarts:
        steps = ", ".join(f"{step:,}" for step in records.restarts)
        back = f"its records go back to step {steps}. The later values are shown."
        warnings.append(f"The run was resumed: {back}")
    for name, stage in inputs.stages.items():
        if not stage.finished and name != "report":  # which is being made
            warnings.append(f"The stage '{name}' has not finished: this page shows its results so far.")
    if records.broken_lines:
        torn = f"{records.broken_lines} torn line(s) left out; a killed run leaves one."
        warnings.append(f"records.jsonl: {torn}")
    if result is not None and result.protocol.starts_not_known:
        warnings.append(capitalised(TrainingStarts(unknown=result.protocol.starts_not_known).warning))
    return warnings + [f"{problem}." for problem in inputs.problems]
