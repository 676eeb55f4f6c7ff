"""Writes the findings of a study to report.html, results.md and results.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tutti.evaluation.statistics.comparison import Comparison, Contrast
from tutti.evaluation.statistics.intervals import Interval
from tutti.report.blocks import Block, Charts, Code, Facts, Note, Page, Section, Table, Tile, markdown, render
from tutti.report.formatting import anything, words
from tutti.report.svg.drawing import Chart
from tutti.report.svg.rows import ForestRow, forest_chart
from tutti.runs.provenance import made_with
from tutti.storage.files import write_atomically, write_json
from tutti.studies.cells import level_words
from tutti.studies.config import Level, study_yaml
from tutti.studies.tables import (
    MOODS,
    Findings,
    contrast_table,
    cost_table,
    difference_table,
    held_out_table,
    measure_table,
    success_table,
    task_table,
)

KINDS: dict[str, tuple[str, Callable[[Findings, Level], Table]]] = {
    "success": ("Success", success_table),
    "comparisons": ("Comparisons fixed beforehand", contrast_table),
    "differences": ("Differences", difference_table),
    "tasks": ("Success per task", task_table),
    "measures": ("Beside success", measure_table),
    "cost": ("Cost", cost_table),
    "held-out": ("Held-out losses", held_out_table),
}
"""The tables of a study by the section of the page, with its title; each is made for every level."""


OPTIONAL = ("comparisons", "measures")
"""Sections of which many studies have nothing."""


def publish(findings: Findings, folder: Path, made: dict[str, Any]) -> list[Table]:
    """Writes the three files into `folder`, each atomically. Returns the tables in their order."""
    tables: dict[str, list[Table]] = {}
    for section, (_, make) in KINDS.items():
        of_levels = [make(findings, level) for level in findings.finished_levels]
        tables[section] = [table for table in of_levels if table.rows]
    flat = [table for of_levels in tables.values() for table in of_levels]
    write_json(folder / "results.json", as_json(findings, made))
    write_atomically(folder / "results.md", as_markdown(findings, flat, made))
    write_atomically(folder / "report.html", render(_page(findings, tables, made)))
    return flat


def as_json(findings: Findings, made: dict[str, Any]) -> dict[str, Any]:
    """Plain data: every start of every cell, the scores, the costs, what is missing."""
    scores = [asdict(score) | {"seeds": list(score.seeds)} for score in findings.scores]
    for score in scores:
        del score["trained"]
    return {
        "study": findings.study.model_dump(mode="json"),
        "made": made,
        "data": findings.data,
        "costs": {arm: asdict(cost) for arm, cost in findings.costs.items()},
        "scores": scores,
        "contrasts": [asdict(one) for one in findings.contrasts],
        "solvable_blind": list(findings.solvable_blind),
        "missing": [cell.name for cell in findings.missing],
        "cells": [asdict(one) | {"folder": cell.folder.name} for cell, one in findings.found.items()],
    }


def as_markdown(findings: Findings, tables: Sequence[Table], made: dict[str, Any]) -> str:
    """The study as Markdown: headline, tables, notes."""
    parts = [
        f"# Study {findings.study.name}",
        findings.headline,
        *(f"Warning: {caution}" for caution in findings.cautions),
        *(markdown(table) for table in tables),
        *(note.text for note in findings.notes),
        *findings.basis,
        f"{made_with(made)} Data {findings.data}.",
    ]
    return "\n\n".join(parts) + "\n"


def _page(findings: Findings, tables: Mapping[str, Sequence[Table]], made: dict[str, Any]) -> Page:
    study = findings.study
    nothing = "" if findings.scores else "No cell is finished yet: `tutti compare STUDY.yaml` runs them."
    forests = (_forest(findings, level) for level in findings.finished_levels)
    charts = [Charts(charts=[chart]) for chart in forests if chart is not None]
    first = "comparisons" if study.contrasts else "differences"
    blocks: dict[str, list[Block]] = {section: [*several] for section, several in tables.items()}
    if study.contrasts:
        effects = (_effects(findings, level) for level in findings.finished_levels)
        blocks[first][:0] = [Charts(charts=[chart]) for chart in effects if chart is not None]
    blocks["differences"][:0] = charts
    blocks[first] += findings.notes
    leads = {first: "" if nothing else findings.basis[0]}
    sections = [
        Section(id=name, title=KINDS[name][0], lead=leads.get(name, ""), blocks=blocks[name], missing=nothing)
        for name in sorted(KINDS, key=lambda name: name != first)
        if blocks[name] or (nothing and name not in OPTIONAL)
    ]
    return Page(
        kicker="Tutti: report of a study",
        name=study.name,
        result=findings.headline,
        tiles=_tiles(findings),
        notes=[],
        warnings=findings.cautions,
        sections=[*sections, _protocol(findings), _reproduce(findings, made)],
        footer=f"Written by tutti compare from {study.name}/. Intervals: 95 %, two-sided.",
    )


def _tiles(findings: Findings) -> list[Tile]:
    study, done = findings.study, len(findings.found)
    levels = "" if study.levels == ("base",) else f" x {len(study.levels)} levels"
    seeds = "1 seed" if len(study.seed_list) == 1 else f"{len(study.seed_list)} seeds"
    rollouts = sum(len(bits) for one in findings.found.values() for bits in one.bits)
    cells, arms = f"{done} of {done + len(findings.missing)}", f"{len(study.arms)} arms{levels} x {seeds}"
    return [
        Tile(value=cells, name="cells finished", small=arms),
        Tile(value=f"{rollouts:,}", name="rollouts"),
        Tile(value=study.baseline, name="baseline"),
        Tile(value=study.budget.kind, name="equal budget"),
    ]


def _forest(findings: Findings, level: Level) -> Chart | None:
    baseline, scores = findings.study.baseline, findings.at(level)
    base = {one.seed: one.mean for score in scores if score.arm == baseline for one in score.trained}
    rows = [
        _forest_row(
            score.arm,
            score.verdict,
            against,
            [o.mean - base[o.seed] for o in score.trained if o.seed in base],
        )
        for score in scores
        if (against := score.against) is not None
    ]
    help = "Right of 0: better than the baseline. A verdict needs both intervals on one side of 0."
    title = f"Against {baseline}{level_words(level)}"
    return forest_chart(title, rows, baseline=baseline, help=help) if rows else None


def _effects(findings: Findings, level: Level) -> Chart | None:
    own = [one for one in findings.contrasts if one.level == level and not one.exploratory]
    rows = [_forest_row(one.name, one.verdict, one.found, one.found.of_seeds) for one in own]
    help = "Right of 0: the first arm, or the arms with the factor, are better."
    title, minus = (
        f"Comparisons fixed beforehand{level_words(level)}",
        "the second arm, or without the factor",
    )
    return forest_chart(title, rows, baseline=minus, help=help) if rows else None


def _forest_row(name: str, verdict: str, found: Comparison | Contrast, seeds: Sequence[float]) -> ForestRow:
    value = 100 * found.difference.value
    return ForestRow(
        name=name,
        value=value,
        interval=_points(found.difference.interval),
        wide=_points(found.over_seeds) if found.over_seeds is not None else None,
        seeds=[100 * seed for seed in seeds],
        label=f"{value:+.1f}  {verdict}",
        mood=MOODS.get(verdict, ""),
    )


def _points(interval: Interval) -> tuple[float, float]:
    return 100 * interval.low, 100 * interval.high


def _protocol(findings: Findings) -> Section:
    study = findings.study
    facts = [
        ("baseline", study.baseline),
        ("training seeds", ", ".join(map(str, study.seed_list))),
        ("demonstrations a task", ", ".join(map(str, study.levels)).replace("base", "as in the base")),
        ("equal budget", f"{study.budget.text}, of {study.budget.steps} steps of the baseline"),
        ("for every arm", "; ".join(study.overrides) or "nothing"),
        ("fingerprint of the data", findings.data),
    ]
    arms = [(arm, "; ".join(changes) or "the base as it is") for arm, changes in study.arms.items()]
    blocks: list[Block] = [Facts(pairs=arms, title="Arms"), Facts(pairs=facts, title="Study")]
    first = next(iter(findings.found.values()), None)
    if first is not None:
        blocks.append(_facts("Evaluation", {words(key): value for key, value in first.protocol.items()}))
    blocks.append(Note(text=findings.basis[1]))
    return Section(id="protocol", title="Protocol", blocks=blocks)


def _reproduce(findings: Findings, made: dict[str, Any]) -> Section:
    blocks: list[Block] = [
        Code(title="Command", text=str(made["command"]), open=True),
        Facts(pairs=[("git commit", anything(made["commit"])), ("load before", f"{made['load']:.1f}")]),
        _facts("Machine", made["machine"]),
        _facts("Versions", made["versions"]),
        Code(title="study.yaml, its base spelled out", text=study_yaml(findings.study)),
    ]
    return Section(id="reproduce", title="Reproduce", blocks=blocks)


def _facts(title: str, values: Mapping[str, Any]) -> Facts:
    return Facts(pairs=[(str(key), anything(value)) for key, value in values.items()], title=title)
