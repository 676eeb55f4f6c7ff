"""Writes the scores of a study to report.html, results.md and results.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutti.evaluation.statistics.intervals import Interval
from tutti.report.blocks import Block, Charts, Code, Facts, Note, Section
from tutti.report.formatting import anything
from tutti.report.render import Page, Tile, render
from tutti.report.svg.elements import Chart
from tutti.report.svg.rows import ForestRow, forest_chart
from tutti.report.tables import Table, markdown
from tutti.runs.provenance import made_with
from tutti.storage.files import write_atomically, write_json
from tutti.studies.cells import Cell
from tutti.studies.config import Level, StudyConfig, study_yaml
from tutti.studies.costs import StepCost
from tutti.studies.findings import basis, cautions, headline, notes
from tutti.studies.run_cell import Trained
from tutti.studies.scores import ArmScore
from tutti.studies.tables import (
    cost_table,
    difference_table,
    held_out_table,
    level_words,
    success_table,
    task_table,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that the tables of a study are made from."""

    study: StudyConfig
    data: str
    costs: Mapping[str, StepCost]
    found: Mapping[Cell, Trained]
    missing: Sequence[Cell]
    scores: Sequence[ArmScore]

    def at(self, level: Level) -> list[ArmScore]:
        """The scores of one data level."""
        return [score for score in self.scores if score.level == level]

    @property
    def finished_levels(self) -> list[Level]:
        """The levels that have a score."""
        return [level for level in self.study.levels if self.at(level)]


def publish(findings: Findings, folder: Path, made: dict[str, Any]) -> list[Table]:
    """Writes the three files into `folder`, each atomically. Returns the tables in their order."""
    tables = _tables(findings)
    write_json(folder / "results.json", as_json(findings, made))
    flat = [table for kind in tables.values() for table in kind]
    write_atomically(folder / "results.md", as_markdown(findings, flat, made))
    write_atomically(folder / "report.html", render(_page(findings, tables, made)))
    return flat


def as_json(findings: Findings, made: dict[str, Any]) -> dict[str, Any]:
    """Plain data: every start of every cell, the scores, the costs, what is missing."""
    scores = []
    for score in findings.scores:
        plain = asdict(score)
        plain["seeds"] = list(score.seeds)
        del plain["trained"]
        scores.append(plain)
    return {
        "study": findings.study.model_dump(mode="json"),
        "made": made,
        "data": findings.data,
        "costs": {arm: asdict(cost) for arm, cost in findings.costs.items()},
        "scores": scores,
        "missing": [cell.name for cell in findings.missing],
        "cells": [asdict(one) | {"folder": cell.folder.name} for cell, one in findings.found.items()],
    }


def as_markdown(findings: Findings, tables: Sequence[Table], made: dict[str, Any]) -> str:
    """The study as Markdown: headline, tables, notes."""
    study, scores = findings.study, findings.scores
    parts = [
        f"# Study {study.name}",
        headline(study, scores),
        *(f"Warning: {caution}" for caution in cautions(study, scores, findings.missing)),
        *(markdown(table) for table in tables),
        *(note.text for note in notes(study, scores)),
        *basis(study, scores),
        f"{made_with(made)} Data {findings.data}.",
    ]
    return "\n\n".join(parts) + "\n"


def _tables(findings: Findings) -> dict[str, list[Table]]:
    """The tables of each kind, one for each finished level."""
    baseline, costs = findings.study.baseline, findings.costs
    makers: dict[str, Callable[[list[ArmScore], Level], Table]] = {
        "success": success_table,
        "difference": lambda scores, level: difference_table(scores, baseline, level),
        "task": task_table,
        "cost": lambda scores, level: cost_table(scores, costs, level),
        "held_out": held_out_table,
    }
    tables = {
        kind: [make(findings.at(level), level) for level in findings.finished_levels]
        for kind, make in makers.items()
    }
    return {kind: [table for table in several if table.rows] for kind, several in tables.items()}


def _page(findings: Findings, tables: Mapping[str, Sequence[Table]], made: dict[str, Any]) -> Page:
    study, scores = findings.study, findings.scores
    nothing = "" if scores else "No cell is finished yet: `tutti compare STUDY.yaml` runs them."
    forests = [_forest(findings, level) for level in findings.finished_levels]
    differences: list[Block] = [Charts(charts=[chart]) for chart in forests if chart is not None]
    sections = [
        Section(
            id="differences",
            title="Differences",
            lead="" if nothing else basis(study, scores)[0],
            blocks=[*differences, *tables["difference"], *notes(study, scores)],
            missing=nothing,
        ),
        Section(id="success", title="Success", blocks=[*tables["success"]], missing=nothing),
        Section(id="tasks", title="Success per task", blocks=[*tables["task"]], missing=nothing),
        Section(id="cost", title="Cost", blocks=[*tables["cost"]], missing=nothing),
        Section(id="held-out", title="Held-out losses", blocks=[*tables["held_out"]], missing=nothing),
        _protocol(findings),
        _reproduce(findings, made),
    ]
    return Page(
        kicker="Tutti: report of a study",
        name=study.name,
        result=headline(study, scores),
        tiles=_tiles(findings),
        notes=[],
        warnings=cautions(study, scores, findings.missing),
        sections=sections,
        footer=f"Written by tutti compare from {study.name}/. Intervals: 95 %, two-sided.",
    )


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _tiles(findings: Findings) -> list[Tile]:
    study = findings.study
    done, whole = len(findings.found), len(findings.found) + len(findings.missing)
    levels = "" if study.levels == ("base",) else f" x {len(study.levels)} levels"
    rollouts = sum(len(bits) for one in findings.found.values() for bits in one.bits)
    return [
        Tile(
            value=f"{done} of {whole}",
            name="cells finished",
            small=f"{len(study.arms)} arms{levels} x {_seeds(len(study.seed_list))}",
        ),
        Tile(value=f"{rollouts:,}", name="rollouts"),
        Tile(value=study.baseline, name="baseline"),
        Tile(value=study.budget.kind, name="equal budget"),
    ]


def _forest(findings: Findings, level: Level) -> Chart | None:
    rows: list[ForestRow] = []
    for score in findings.at(level):
        against = score.against
        if against is None:
            continue
        base = {one.seed: one.mean for s in findings.at(level) if s.against is None for one in s.trained}
        verdict, value = against.verdict, 100 * against.difference.value
        rows.append(
            ForestRow(
                name=score.arm,
                value=value,
                interval=_points(against.difference.interval),
                wide=_points(against.over_seeds) if against.over_seeds is not None else None,
                seeds=[100 * (o.mean - base[o.seed]) for o in score.trained if o.seed in score.shared_seeds],
                label=f"{value:+.1f}  {verdict}",
                mood={"better": "good", "worse": "bad"}.get(verdict, ""),
            )
        )
    if not rows:
        return None
    help = "Right of 0: better than the baseline. A verdict needs both intervals on one side of 0."
    title = f"Against {findings.study.baseline}{level_words(level)}"
    return forest_chart(title, rows, baseline=findings.study.baseline, help=help)


def _points(interval: Interval) -> tuple[float, float]:
    return 100 * interval.low, 100 * interval.high


def _protocol(findings: Findings) -> Section:
    study = findings.study
    pairs = [(arm, "; ".join(changes) or "the base as it is") for arm, changes in study.arms.items()]
    facts = [
        ("baseline", study.baseline),
        ("training seeds", ", ".join(map(str, study.seed_list))),
        ("demonstrations a task", ", ".join(map(str, study.levels)).replace("base", "as in the base")),
        ("equal budget", f"{study.budget.kind}, of {study.budget.steps} steps of the baseline"),
        ("for every arm", "; ".join(study.overrides) or "nothing"),
        ("fingerprint of the data", findings.data),
    ]
    blocks: list[Block] = [Facts(pairs=pairs, title="Arms"), Facts(pairs=facts, title="Study")]
    first = next(iter(findings.found.values()), None)
    if first is not None:
        told = [(str(key).replace("_", " "), anything(value)) for key, value in first.protocol.items()]
        blocks.append(Facts(pairs=told, title="Evaluation"))
    return Section(id="protocol", title="Protocol", blocks=[*blocks, *_basis_notes(findings)])


def _basis_notes(findings: Findings) -> list[Note]:
    return [Note(text=text) for text in basis(findings.study, findings.scores)[1:]]


def _reproduce(findings: Findings, made: dict[str, Any]) -> Section:
    blocks: list[Block] = [
        Code(title="Command", text=str(made["command"]), open=True),
        Facts(pairs=[("git commit", anything(made["commit"])), ("load before", f"{made['load']:.1f}")]),
        Facts(pairs=[(str(k), anything(v)) for k, v in made["machine"].items()], title="Machine"),
        Facts(pairs=[(str(k), anything(v)) for k, v in made["versions"].items()], title="Versions"),
        Code(title="study.yaml, its base spelled out", text=study_yaml(findings.study)),
    ]
    return Section(id="reproduce", title="Reproduce", blocks=blocks)
