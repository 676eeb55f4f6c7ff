"""Runs a study from start to end: data, costs, cells, scores, tables. Start reading the studies here.

runs/studies/NAME/
  study.yaml      the study with its whole base           plan.json       every cell, every arm's steps
  costs.json      FLOPs and time of a step of each arm    cells/          a run for each arm, level, seed
  recorded/       demonstrations, if it recorded its own  cache/          decoded pictures
  results.json    every start of every cell, the scores   results.md, report.html   for people
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tutti.config.run_config import RunConfig
from tutti.evaluation.closed_loop.starts import check_seeds
from tutti.runs.provenance import circumstances
from tutti.runs.terminal import print_line
from tutti.storage.files import exclusive_lock, explain_full_disk, write_atomically, write_json
from tutti.studies.arms import arm_config, cell_config, check_same_starts
from tutti.studies.cells import CELLS, Cell, plan_cells, unfinished
from tutti.studies.config import StudyConfig, study_yaml
from tutti.studies.costs import StepCost, affordable_steps, measure_costs
from tutti.studies.findings import cautions, headline, notes
from tutti.studies.page import Findings, publish
from tutti.studies.pool import Command, Failure, number_of_jobs, own_command, run_cells
from tutti.studies.run_cell import Trained, describe_cell, load_trained
from tutti.studies.scores import score_study
from tutti.studies.shared_data import SharedData, decode, link_cache, share_data
from tutti.studies.status import StudyProgress, Work
from tutti.studies.tables import show
from tutti.types import UserError

PLAN = "plan.json"
BUSY = (
    "{folder}: another process is running this study. Wait for it, or look at what is finished with "
    "--report-only."
)
SHOWN = 2
"""How many of the five kinds of table the terminal shows: success and differences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decisions before the first cell runs: data, costs and cells."""

    study: dict[str, Any]
    data: str
    costs: dict[str, StepCost]
    cells: tuple[Cell, ...]


PLANS = TypeAdapter(Plan)


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
    failures: list[Failure] = []
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
        with exclusive_lock(folder, BUSY.format(folder=folder)), explain_full_disk(folder, "the study"):
            plan, configs = make_plan(study, folder)
            failures = _finish(study, configs, folder, command)
    page = _report(plan, folder)
    if failures:
        texts = "\n\n".join(failure.text for failure in failures)
        raise UserError(
            f"{len(failures)} of {len(plan.cells)} cells failed:\n\n{texts}\n\n"
            "Run the same command again: what is finished is kept."
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
    costs = _costs(study, configs, data, folder)
    allowed = affordable_steps(study.budget, steps, costs, study.baseline)
    planned = plan_cells(study, allowed, data.sources, data.fingerprint, folder.resolve())
    plan = Plan(study=study.model_dump(mode="json"), data=data.fingerprint, costs=costs, cells=tuple(planned))
    write_atomically(folder / "study.yaml", study_yaml(study))
    cells = tuple(replace(cell, folder=Path(CELLS) / cell.folder.name) for cell in plan.cells)
    write_json(
        folder / PLAN, PLANS.dump_python(replace(plan, cells=cells), mode="json")
    )  # the study may move
    return plan, planned


def read_plan(folder: Path) -> Plan:
    """The plan of a study that was started.

    Raises: UserError if there is none, or it cannot be read.
    """
    path = folder / PLAN
    if not path.is_file():
        raise UserError(f"{path}: no such file: this study was never started. Run it without --report-only.")
    try:
        plan = PLANS.validate_json(path.read_bytes())
        return replace(plan, cells=tuple(replace(c, folder=folder.resolve() / c.folder) for c in plan.cells))
    except ValidationError as error:
        raise UserError(
            f"{path}: cannot be read ({error.errors()[0]['msg']}). Run the study again without --report-only."
        ) from None


def _costs(
    study: StudyConfig, configs: Mapping[str, RunConfig], data: SharedData, folder: Path
) -> dict[str, StepCost]:
    decode(configs.values(), folder)
    what = "FLOPs and time" if study.budget.kind == "time" else "FLOPs"
    print_line(f"measuring {what} of a step of each arm, if not known yet ...")
    costs = measure_costs(configs, study.baseline, study.budget, fingerprint=data.fingerprint, folder=folder)
    return costs


def _finish(
    study: StudyConfig, configs: Mapping[Cell, RunConfig], folder: Path, command: Command
) -> list[Failure]:
    missing = unfinished(list(configs))
    jobs = number_of_jobs(study.jobs, len(missing))
    found = len(configs) - len(missing)
    print_line(
        f"{len(configs)} cells, {found} found, {len(missing)} to do, {jobs} at a time, one thread each"
    )
    for cell in missing:
        describe_cell(cell, configs[cell])
        link_cache(folder, cell.folder)
    with StudyProgress({cell: Work.of(configs[cell]) for cell in missing}, found) as progress:
        return run_cells(missing, jobs, progress, command=command)


def _report(plan: Plan, folder: Path) -> Path:
    results = {cell: load_trained(cell) for cell in plan.cells}
    found: dict[Cell, Trained] = {cell: one for cell, one in results.items() if one is not None}
    study = StudyConfig.model_validate(plan.study)
    findings = Findings(
        study=study,
        data=plan.data,
        costs=plan.costs,
        found=found,
        missing=[cell for cell, one in results.items() if one is None],
        scores=score_study(study, found),
    )
    tables = publish(findings, folder, circumstances())
    for table in tables[: SHOWN * len(findings.finished_levels)]:
        show(table)
    for note in notes(study, findings.scores):
        print_line(note.text)
    for caution in cautions(study, findings.scores, findings.missing):
        print_line(f"warning: {caution}")
    print_line(headline(study, findings.scores))
    print_line(f"Report: {folder / 'report.html'}")
    return folder / "report.html"
