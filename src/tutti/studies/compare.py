"""Runs a study from start to end: data, costs, cells, scores, tables. Start reading the studies here.

runs/studies/NAME/
  study.yaml      the study with its whole base           plan.json       every cell, every arm's steps
  costs.json      FLOPs and time of a step of each arm    cells/          a run for each arm, level, seed
  recorded/       demonstrations, if it recorded its own
  results.json    every start of every cell, the scores   results.md, report.html   for people
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config
from tutti.data.sources import SourceConfig
from tutti.evaluation.closed_loop.starts import DATASET, TrainingStarts, check_seeds
from tutti.runs.build import build_data
from tutti.runs.folder import RunFolder
from tutti.runs.provenance import circumstances
from tutti.runs.terminal import print_line, progress_bar
from tutti.storage.files import exclusive_lock, explain_full_disk, write_atomically, write_json
from tutti.storage.reading import read_valid
from tutti.studies.cells import (
    CELLS,
    SHARED,
    Cell,
    arm_config,
    cell_config,
    check_same_starts,
    data_fingerprint,
    plan_cells,
)
from tutti.studies.config import StudyConfig, study_yaml
from tutti.studies.costs import StepCost, affordable_steps, measure_costs
from tutti.studies.page import publish
from tutti.studies.pool import Command, Work, number_of_jobs, own_command, run_cells
from tutti.studies.run_cell import describe_cell
from tutti.studies.scores import score_contrasts, score_study
from tutti.studies.tables import Findings, show
from tutti.types import UserError

PLAN, RECORDED = "plan.json", "recorded"
AGAIN = "Run the same command again: what is finished is kept."
SHOWN = 2
"""Kinds of table that the terminal shows: success; the comparisons fixed beforehand, or the differences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decisions before the first cell runs: data, costs and cells."""

    study: dict[str, Any]
    data: str
    costs: dict[str, StepCost]
    cells: tuple[Cell, ...]

    def moved(self, folder: Path) -> Plan:
        """With the folders of the cells in `folder`."""
        return replace(
            self, cells=tuple(replace(c, folder=folder / CELLS / c.folder.name) for c in self.cells)
        )


PLANS = TypeAdapter(Plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedData:
    """`fingerprint` is a hash of the data sets' contents; `starts` are those of the demonstrations."""

    sources: tuple[SourceConfig, ...]
    fingerprint: str
    starts: TrainingStarts


def compare(
    study: StudyConfig,
    folder: Path | None = None,
    *,
    report_only: bool = False,
    command: Command = own_command,
) -> Path:
    """Runs the cells that have no result yet, and makes the tables. Returns the path of the page.

    Run again, it keeps finished cells and continues interrupted ones. `report_only` makes the tables of the
    finished cells, also while another process runs the rest.

    Raises: UserError, for a mistake in the study, or, after all others have run, if cells failed.
    """
    folder = folder or Path("runs/studies") / study.name
    failures: list[str] = []
    if report_only:
        plan = read_plan(folder)
        if plan.study != study.model_dump(mode="json"):
            print_line(
                f"the study's file has changed since {folder / PLAN}: the tables show the study as it was run"
            )
    else:
        for arm in study.arms:
            arm_config(study, arm)  # finds every mistake before anything slow
        folder.mkdir(parents=True, exist_ok=True)
        busy = (
            f"{folder}: another process is running this study. Wait for it, or look at what is finished with "
            "--report-only."
        )
        with exclusive_lock(folder, busy), explain_full_disk(folder, "the study"):
            plan, configs = make_plan(study, folder)
            failures = _finish(study, configs, folder, command)
    page = _report(plan, folder)
    if failures:
        raise UserError(
            "\n\n".join([f"{len(failures)} of {len(plan.cells)} cells failed:", *failures, AGAIN])
        )
    return page


def make_plan(study: StudyConfig, folder: Path) -> tuple[Plan, dict[Cell, RunConfig]]:
    """Prepares the data, measures the cost of each arm's step, and derives the steps of every cell.

    Costs are measured at the base's own number of demonstrations, on which a step does not depend, and with
    the first seed.
    """
    base = arm_config(study, study.baseline)
    steps = base.training.steps if study.budget.steps == "base" else study.budget.steps
    base.record.spec.check_rendering()
    data = share_data(study, base, folder)
    configs = {
        arm: cell_config(study, arm, level="base", seed=study.seed_list[0], steps=steps, sources=data.sources)
        for arm in study.arms
    }
    check_same_starts(study, configs)
    check_seeds(configs[study.baseline].evaluation, data.starts)
    if data.starts.unknown:
        print_line(data.starts.warning)
    for config in {(c.data.image_size, c.data.sources): c for c in configs.values()}.values():
        build_data(config, folder)  # decodes every size once, before parallel runs would each do it
    what = "FLOPs and time" if study.budget.kind == "time" else "FLOPs"
    print_line(f"measuring {what} of a step of each arm, if not known yet ...")
    costs = measure_costs(configs, study.baseline, study.budget, fingerprint=data.fingerprint, folder=folder)
    allowed = affordable_steps(study.budget, steps, costs, study.baseline)
    planned = plan_cells(study, allowed, data.sources, data.fingerprint, folder.resolve())
    plan = Plan(study=study.model_dump(mode="json"), data=data.fingerprint, costs=costs, cells=tuple(planned))
    write_atomically(folder / "study.yaml", study_yaml(study))
    write_json(folder / PLAN, PLANS.dump_python(plan.moved(Path()), mode="json"))  # the study may move
    return plan, planned


def read_plan(folder: Path) -> Plan:
    """The plan of a study that was started.

    Raises: UserError if there is none, or it cannot be read.
    """
    path, cure = folder / PLAN, "Run the study again without --report-only."
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file: this study was never started. Run it without --report-only.")
    plan = read_valid(path, PLANS.validate_python, cure)
    try:
        study = StudyConfig.model_validate(plan.study)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: study.{where}: {first['msg']}. {cure}") from None
    for cell in plan.cells:
        if cell.arm not in study.arms or cell.arm not in plan.costs or cell.level not in study.levels:
            raise UserError(f"{path}: its cell {cell.name} is of no arm and level of its study. {cure}")
    return plan.moved(folder.resolve())


def share_data(study: StudyConfig, config: RunConfig, folder: Path) -> SharedData:
    """Finds the data of `study.data_from`, or records them into `folder`. `config` is the baseline's.

    Raises: UserError, if the run there has recorded nothing, or a data set cannot be opened.
    """
    named = config.data.sources
    if any(source.path == SHARED for source in named):  # the baseline uses parts of what the base names
        named = tuple(s for s in build_config(study.base, "the base").data.sources if s.path != SHARED)
    if study.data_from == "base" and named:
        sources = tuple(s.model_copy(update={"path": s.path.resolve()}) for s in named)
    else:
        home = (folder / RECORDED if study.data_from == "base" else study.data_from).resolve()
        if study.data_from == "base":
            pipeline.record(config, home)
        else:
            RunFolder(home, new=False).require("record", "Make it first: tutti record CONFIG.")
        sources = (SourceConfig(path=home / DATASET),)
    return SharedData(
        sources=sources,
        fingerprint=data_fingerprint(sources),
        starts=TrainingStarts.union(TrainingStarts.of_data(source.path) for source in sources),
    )


def _finish(
    study: StudyConfig, configs: Mapping[Cell, RunConfig], folder: Path, command: Command
) -> list[str]:
    missing = [cell for cell in configs if cell.result() is None]
    jobs, found = number_of_jobs(study.jobs, len(missing)), len(configs) - len(missing)
    print_line(
        f"{len(configs)} cells, {found} found, {len(missing)} to do, {jobs} at a time, one thread each"
    )
    for cell in missing:
        describe_cell(cell, configs[cell])
    with progress_bar("training and evaluating, steps") as bar:
        return run_cells({cell: Work.of(configs[cell]) for cell in missing}, jobs, bar, command=command)


def _report(plan: Plan, folder: Path) -> Path:
    results = {cell: cell.result() for cell in plan.cells}
    found = {cell: one for cell, one in results.items() if one is not None}
    study = StudyConfig.model_validate(plan.study)
    scores = score_study(study, found)
    findings = Findings(
        study=study,
        data=plan.data,
        costs=plan.costs,
        found=found,
        missing=[cell for cell in results if cell not in found],
        scores=scores,
        contrasts=score_contrasts(study, scores),
    )
    tables = publish(findings, folder, circumstances())
    for table in tables[: SHOWN * len(findings.finished_levels)]:
        show(table)
    cautions = [f"warning: {caution}" for caution in findings.cautions]
    notes = [note.text for note in findings.notes]
    for line in (*notes, *cautions, findings.headline, f"Report: {folder / 'report.html'}"):
        print_line(line)
    return folder / "report.html"
