"""The tables of a study as blocks of a report page, as Markdown, and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tutti.evaluation.statistics.intervals import Interval, wilson
from tutti.report.formatting import NOTHING, count, duration, plain
from tutti.report.tables import Cell, Table, texts
from tutti.runs.terminal import print_table
from tutti.studies.config import Level
from tutti.studies.costs import StepCost
from tutti.studies.scores import ArmScore, resolution

WIDE = ("p", "McNemar, each seed", "to resolve")
"""Columns left out on the terminal; the notes below the tables have the same numbers."""
MOODS = {"better": "good", "worse": "bad", "unresolved": "quiet"}


def level_words(level: Level) -> str:
    """As a title's end: ", 10 demonstrations a task"; nothing where a study has no levels."""
    if level == "base":
        return ""
    return ", all demonstrations" if level == "all" else f", {level} demonstrations a task"


def success_table(scores: Sequence[ArmScore], level: Level) -> Table:
    """The task mean of each seed, their mean, its two intervals."""
    heads = [
        ("arm", ""),
        ("each seed, %", "Task mean of every training seed, in the order of the seeds."),
        ("mean, %", "Mean over the training seeds."),
        ("t over seeds", "95 %: what other seeds would give; wide at three seeds, and honestly so."),
        ("bootstrap", "95 %: resamples seeds and, for all of them alike, starts. Too narrow at three seeds."),
    ]
    rows = [
        [
            Cell(text=score.arm),
            Cell(text=", ".join(f"{100 * value:.1f}" for value in score.seed_means)),
            Cell(text=f"{100 * score.mean:.1f}"),
            Cell(text=_interval(score.over_seeds)),
            Cell(text=_interval(score.bootstrap)),
        ]
        for score in scores
    ]
    return Table(heads=heads, rows=rows, caption=f"Success in the simulator, task mean{level_words(level)}.")


def difference_table(scores: Sequence[ArmScore], baseline: str, level: Level) -> Table:
    """Each arm minus the baseline, in points of success."""
    heads = [
        ("arm", ""),
        ("points", f"Task mean minus that of {baseline}, over the shared seeds."),
        ("paired bootstrap", "95 %: resamples seeds and, for all of them alike, starts; both arms together."),
        ("t over seeds", "95 %: of the seeds' differences."),
        ("p", "Two-sided t-test of the seeds' differences."),
        ("p, Holm", "The same, adjusted for all comparisons of the study."),
        ("McNemar, each seed", "Exact, over the seed's starts. It compares two trainings, not two methods."),
        ("verdict", "Better or worse only where both intervals lie on one side of 0."),
        ("to resolve", "What a difference as large as this one would take, with a power of 80 %."),
    ]
    rows: list[list[Cell]] = []
    for score in scores:
        against = score.against
        if against is None:
            continue
        rows.append(
            [
                Cell(text=score.arm),
                Cell(text=f"{100 * against.difference.value:+.1f}"),
                Cell(text=_interval(against.difference.interval, signed=True)),
                Cell(text=_interval(against.over_seeds, signed=True)),
                Cell(text=_p(against.p)),
                Cell(text=_p(score.adjusted_p)),
                Cell(text=", ".join(map(_p, against.mcnemar))),
                Cell(text=against.verdict, mood=MOODS[against.verdict]),
                Cell(text=resolution(score) or NOTHING, mood="quiet"),
            ]
        )
    return Table(heads=heads, rows=rows, caption=f"Minus {baseline}{level_words(level)}.")


def task_table(scores: Sequence[ArmScore], level: Level) -> Table:
    """k/n of each task over all seeds, with Wilson's interval."""
    tasks = list(scores[0].tasks)
    rows = [
        [
            Cell(text=score.arm),
            *(_fraction(*score.tasks[task]) for task in tasks),
        ]
        for score in scores
    ]
    caption = (
        f"Successes of each task, all seeds together{level_words(level)}, with Wilson's 95 % interval: it "
        "takes the starts of several trainings for independent ones, so it is too narrow for a method."
    )
    return Table(heads=[("arm", ""), *((task, "") for task in tasks)], rows=rows, caption=caption)


def cost_table(scores: Sequence[ArmScore], costs: Mapping[str, StepCost], level: Level) -> Table:
    """What each arm spent, and what its policy costs to run."""
    heads = [
        ("arm", ""),
        ("steps", "Optimiser steps, all phases together."),
        ("windows", "Training windows seen."),
        ("FLOPs a step", "Forward, backward and optimiser; mean over all phases, measured on real steps."),
        ("FLOPs in all", "Steps times the FLOPs of one."),
        ("training", "Wall time of the steps, mean over the seeds; runs side by side disturb each other."),
        ("trained numbers", "Parameters that training moves, the terms' heads included."),
        ("parameters", "Of the policy that acts."),
        ("ms a prediction", "Batch 1, one thread, median; mean over the seeds."),
    ]
    rows: list[list[Cell]] = []
    for score in scores:
        one, cost = score.trained[0], costs[score.arm]
        rows.append(
            [
                Cell(text=score.arm),
                Cell(text=f"{one.steps:,}"),
                Cell(text=f"{one.samples:,}"),
                Cell(text=count(cost.flops)),
                Cell(text=count(cost.flops * one.steps)),
                Cell(text=duration(score.average("seconds") or 0.0)),
                Cell(text=count(cost.parameters)),
                Cell(text=count(one.parameters)),
                Cell(text=plain(score.average("milliseconds") or 0.0)),
            ]
        )
    return Table(heads=heads, rows=rows, caption=f"What it cost{level_words(level)}.")


def held_out_table(scores: Sequence[ArmScore], level: Level) -> Table:
    """Each term on held-out episodes, when it last counted, and the error of the executed actions."""
    terms = list(dict.fromkeys(term for score in scores for one in score.trained for term in one.held_out))
    heads = [
        ("arm", ""),
        (
            "executed actions",
            "Mean absolute error of the executed actions on held-out episodes, normalised units. The same "
            "quantity for every decoder, but no evidence of success.",
        ),
        *((term, "On held-out episodes at its last validation, mean over the seeds.") for term in terms),
    ]
    rows = [
        [
            Cell(text=score.arm),
            Cell(text=_number(score.average("open_loop"))),
            *(Cell(text=_number(score.held_out(term))) for term in terms),
        ]
        for score in scores
    ]
    caption = (
        f"Held-out losses{level_words(level)}. Of arms whose decoders differ, or of other numbers of "
        "demonstrations (which scale the actions), they are no comparison."
    )
    return Table(heads=heads, rows=rows, caption=caption)


def show(table: Table) -> None:
    """The table on the terminal, without the columns in WIDE."""
    print_table(table.caption, *texts(table, without=WIDE))


def _interval(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return NOTHING
    sign = "+" if signed else ""
    return f"{100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f}"


def _fraction(successes: int, episodes: int) -> Cell:
    return Cell(text=f"{successes}/{episodes}", small=f"[{wilson(successes, episodes).percent()}]")


def _p(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 0.9995 else "1"


def _number(value: float | None) -> str:
    return NOTHING if value is None else plain(value, 4)
