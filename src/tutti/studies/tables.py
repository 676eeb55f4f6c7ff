"""The findings of a study: in sentences, and in tables for each data level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tutti.evaluation.closed_loop.results import BLIND_RATE, ONE_TRAINING
from tutti.evaluation.statistics.comparison import Comparison
from tutti.evaluation.statistics.intervals import SIGNIFICANT, Interval, t_interval, wilson
from tutti.report.blocks import Cell, Note, Table, table, texts
from tutti.report.formatting import NOTHING, count, duration, plain
from tutti.runs.terminal import print_table
from tutti.studies.cells import Cell as StudyCell
from tutti.studies.cells import Trained, level_words
from tutti.studies.config import Level, StudyConfig
from tutti.studies.costs import StepCost
from tutti.studies.scores import ArmScore, ContrastScore, mcnemar_statement, resolution

WIDE = ("p", "seeds", "McNemar, each seed", "to resolve")
"""Columns left out on the terminal; the notes below the tables have the same numbers."""
VERDICTS = ("better", "better before Holm", "worse", "worse before Holm", "unresolved")
MOODS = {"better": "good", "worse": "bad"}
HELP = {
    "each seed, %": "Task mean of every training seed, in the order of the seeds.",
    "mean, %": "Mean over the training seeds.",
    "t over seeds": "95 %: what other seeds would give; wide at three seeds, and honestly so.",
    "bootstrap": "95 %: resamples seeds and, for all of them alike, starts. Too narrow at three seeds.",
    "comparison": "As fixed in the study's file, or a factor's main effect; interactions are exploratory.",
    "points": "Task mean minus that of the baseline, over the shared seeds.",
    "paired bootstrap": "95 %: resamples seeds and, for all of them alike, starts; both arms together.",
    "p": "Two-sided t-test of the seeds' differences.",
    "p, Holm": "The same, adjusted for all comparisons of the study.",
    "McNemar, each seed": "Exact, over the seed's starts. It compares two trainings, not two methods.",
    "verdict": "Better, worse: both intervals on one side of 0. Before Holm: p after Holm is .05 or more.",
    "to resolve": "What a difference as large as this one would take, with a power of 80 %.",
    "steps": "Optimiser steps, all phases together.",
    "windows": "Training windows seen.",
    "FLOPs a step": "Forward, backward and optimiser; mean over all phases, measured on real steps.",
    "FLOPs in all": "Steps times the FLOPs of one.",
    "training": "Wall time of the steps, mean over the seeds; runs side by side disturb each other.",
    "trained numbers": "Parameters that training moves, the terms' heads included.",
    "parameters": "Of the policy that acts.",
    "ms a prediction": "Batch 1, one thread, median; mean over the seeds.",
    "executed actions": "Mean absolute error of the executed actions on held-out episodes, normalised "
    "units. The same quantity for every decoder, but no evidence of success.",
}
"""What each column of the tables holds; a column of a task or a term is named after it."""
T = TypeVar("T")
Columns = dict[str, Callable[[T], Cell | str]]
MIN_SEEDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that the tables of a study are made from, and what they say in words."""

    study: StudyConfig
    data: str
    costs: Mapping[str, StepCost]
    found: Mapping[StudyCell, Trained]
    missing: Sequence[StudyCell]
    scores: Sequence[ArmScore]
    contrasts: Sequence[ContrastScore] = ()

    def at(self, level: Level) -> list[ArmScore]:
        """The scores of one data level."""
        return [score for score in self.scores if score.level == level]

    @property
    def finished_levels(self) -> list[Level]:
        """The levels that have a score."""
        return [level for level in self.study.levels if self.at(level)]

    @property
    def headline(self) -> str:
        """Counts the verdicts of all comparisons."""
        verdicts = Counter(score.verdict for score in self.scores if score.against is not None)
        if self.study.contrasts:
            verdicts = Counter(one.verdict for one in self.contrasts if not one.exploratory)
        total = sum(verdicts.values())
        if len(self.study.arms) == 1:
            return f"One arm, {self.study.baseline}: there is nothing to compare it with."
        if not total:
            return "No arm can be compared yet: no training seed is finished in both an arm and the baseline."
        parts = ", ".join(f"{verdicts[of]} {of}" for of in VERDICTS if verdicts[of] or "Holm" not in of)
        plural, budget = "s" if total > 1 else "", self.study.budget.text
        what = "fixed beforehand" if self.study.contrasts else f"with {self.study.baseline}"
        return f"{total} comparison{plural} {what} at equal {budget}: {parts}."

    @property
    def notes(self) -> list[Note]:
        """One sentence for each comparison."""
        found = [_contrast_note(one) for one in self.contrasts if not one.exploratory]
        if blind := self.solvable_blind:
            text = f"Solvable without pictures: {', '.join(blind)}. A policy that was trained without them "
            text += f"reaches {100 * BLIND_RATE:.0f} % there, so success says little about looking."
            found.append(Note(text=text, mood="bad"))
        for score in self.scores:
            against = score.against
            if against is None or self.study.contrasts:
                continue
            where, gain = f"{score.arm}{level_words(score.level)}", against.difference
            how = f"{100 * gain.value:+.1f} points (paired bootstrap {points(gain.interval, '+')}"
            if against.over_seeds is not None:
                how += f", t over seeds {points(against.over_seeds, '+')}"
            takes, tested = resolution(score), mcnemar_statement(score, self.study.baseline)
            more = f" To resolve it: {takes}." if takes and gain.value != 0 else ""
            text = f"{where}: {score.verdict}, {how}); {tested}.{more}"
            found.append(Note(text=text, mood=MOODS.get(score.verdict, "")))
        return found

    @property
    def solvable_blind(self) -> tuple[str, ...]:
        """Tasks on which an arm that never sees a picture reaches `BLIND_RATE` over `MIN_SEEDS` seeds."""
        found: dict[str, None] = {}
        for score in self.scores:
            if len(score.seeds) >= MIN_SEEDS and all(one.blind for one in score.trained):
                found |= dict.fromkeys(t for t, (k, n) in score.tasks.items() if k >= BLIND_RATE * n)
        return tuple(found)

    @property
    def cautions(self) -> list[str]:
        """Limits of the study that a reader must know."""
        found: list[str] = []
        if self.missing:
            names = "; ".join(cell.name for cell in self.missing[:6])
            more = f"; and {len(self.missing) - 6} more" if len(self.missing) > 6 else ""
            whole = len(self.study.arms) * len(self.study.levels) * len(self.study.seed_list)
            found.append(f"{len(self.missing)} of {whole} cells are missing: {names}{more}.")
        fewest = min((len(score.seeds) for score in self.scores), default=MIN_SEEDS)
        if fewest == 1:
            found.append(
                "Some arms have 1 training seed: nothing is known about other trainings, so every verdict on "
                "them is unresolved."
            )
        elif fewest < MIN_SEEDS:
            found.append(f"Some arms have {fewest} training seeds, which resolve hardly any difference.")
        trained = [one for score in self.scores for one in score.trained]
        commits = sorted({str(one.commit) for one in trained})
        if len(commits) > 1:
            found.append(f"Cells were trained at different commits: {', '.join(commits)}.")
        if len({tuple(sorted(one.versions.items())) for one in trained}) > 1:
            found.append(
                "Cells were trained with different versions of packages: results.json has each cell's."
            )
        return found

    @property
    def basis(self) -> tuple[str, str]:
        """The assumptions of the tables: of the differences, and of the training."""
        compared = sum(score.against is not None for score in self.scores)
        if self.study.contrasts:
            compared = sum(not one.exploratory for one in self.contrasts)
        comparisons = "comparison" if compared == 1 else f"{compared} comparisons"
        played = next((sum(map(len, one.bits)) for score in self.scores for one in score.trained), 0)
        return (
            f"Fixed beforehand: the mean of the tasks' success rates over {played} starts a training, the "
            "same for every arm and seed. Better or worse only where both the paired bootstrap and the "
            "t-interval of the seeds' differences lie on one side of 0; before Holm where p, adjusted for "
            f"the {comparisons}, is {SIGNIFICANT:g} or more. Intervals are 95 % and not adjusted.",
            "Within a seed all arms of a level see the same episodes in the same order, and those with the "
            "same model start from the same weights; held-out episodes are the same at every level.",
        )


def success_table(findings: Findings, level: Level) -> Table:
    """The task mean of each seed, their mean, its two intervals."""
    columns: Columns[ArmScore] = {
        "arm": lambda score: score.arm,
        "each seed, %": lambda score: ", ".join(f"{100 * value:.1f}" for value in score.seed_means),
        "mean, %": lambda score: f"{100 * score.mean:.1f}",
        "t over seeds": lambda score: points(score.over_seeds),
        "bootstrap": lambda score: points(score.bootstrap),
    }
    caption = f"Success in the simulator, task mean{level_words(level)}."
    if any(len(score.seeds) == 1 for score in findings.at(level)):
        caption += f" Where there is one seed: {ONE_TRAINING}."
    return _table(findings.at(level), columns, caption)


def contrast_table(findings: Findings, level: Level) -> Table:
    """The comparisons fixed beforehand, main effects and interactions, in points of success."""
    rows = [one for one in findings.contrasts if one.level == level]
    columns: Columns[ContrastScore] = {
        "comparison": lambda row: row.name,
        "seeds": lambda row: str(len(row.seeds)),
        "points": lambda row: f"{100 * row.found.difference.value:+.1f}",
        "paired bootstrap": lambda row: points(row.found.difference.interval, "+"),
        "t over seeds": lambda row: points(row.found.over_seeds, "+"),
        "p": lambda row: p_text(row.found.p),
        "p, Holm": lambda row: p_text(row.adjusted_p),
        "verdict": lambda row: Cell(text=row.verdict, mood=MOODS.get(row.verdict, "quiet")),
    }
    caption = f"Fixed beforehand{level_words(level)}."
    if findings.study.factors:
        caption += (
            " A factor's row is its main effect: the mean of all arms with it minus that of all without."
        )
    return _table(rows, columns, caption)


def _contrast_note(one: ContrastScore) -> Note:
    found = one.found
    text = f"{one.name}{level_words(one.level)}: {one.verdict}, {100 * found.difference.value:+.1f} points "
    text += f"(paired bootstrap {points(found.difference.interval, '+')}, t over {len(one.seeds)} seeds "
    text += f"{points(found.over_seeds, '+')}, p after Holm {p_text(one.adjusted_p)})."
    return Note(text=text, mood=MOODS.get(one.verdict, ""))


def difference_table(findings: Findings, level: Level) -> Table:
    """Each arm minus the baseline, in points of success."""
    compared = [(score, score.against) for score in findings.at(level) if score.against is not None]
    columns: Columns[tuple[ArmScore, Comparison]] = {
        "arm": lambda row: row[0].arm,
        "points": lambda row: f"{100 * row[1].difference.value:+.1f}",
        "paired bootstrap": lambda row: points(row[1].difference.interval, "+"),
        "t over seeds": lambda row: points(row[1].over_seeds, "+"),
        "p": lambda row: p_text(row[1].p),
        "p, Holm": lambda row: p_text(row[0].adjusted_p),
        "McNemar, each seed": lambda row: ", ".join(map(p_text, row[1].mcnemar)),
        "verdict": lambda row: Cell(text=row[0].verdict, mood=MOODS.get(row[0].verdict, "quiet")),
        "to resolve": lambda row: Cell(text=resolution(row[0]) or NOTHING, mood="quiet"),
    }
    more = " Exploratory: the study has fixed other comparisons." if findings.study.contrasts else ""
    return _table(compared, columns, f"Minus {findings.study.baseline}{level_words(level)}.{more}")


def task_table(findings: Findings, level: Level) -> Table:
    """k/n of each task over all seeds, with Wilson's interval."""

    def fraction(task: str) -> Callable[[ArmScore], Cell]:
        def make(score: ArmScore) -> Cell:
            k, n = score.tasks[task]
            mark = "solvable without pictures" if task in findings.solvable_blind else ""
            return Cell(text=f"{k}/{n}", small=f"[{wilson(k, n).percent()}] {mark}".rstrip())

        return make

    caption = (
        f"Successes of each task, all seeds together{level_words(level)}, with Wilson's 95 % interval: it "
        "takes the starts of several trainings for independent ones, so it is too narrow for a method."
    )
    scores = findings.at(level)
    columns: Columns[ArmScore] = {"arm": lambda score: score.arm}
    columns |= {task: fraction(task) for task in scores[0].tasks}
    return _table(scores, columns, caption)


def cost_table(findings: Findings, level: Level) -> Table:
    """What each arm spent, and what its policy costs to run."""
    rows = [(score, score.trained[0], findings.costs[score.arm]) for score in findings.at(level)]
    columns: Columns[tuple[ArmScore, Trained, StepCost]] = {
        "arm": lambda row: row[0].arm,
        "steps": lambda row: f"{row[1].steps:,}",
        "windows": lambda row: f"{row[1].samples:,}",
        "FLOPs a step": lambda row: count(row[2].flops),
        "FLOPs in all": lambda row: count(row[2].flops * row[1].steps),
        "training": lambda row: duration(row[0].average("seconds") or 0.0),
        "trained numbers": lambda row: count(row[2].parameters),
        "parameters": lambda row: count(row[1].parameters),
        "ms a prediction": lambda row: plain(row[0].average("milliseconds") or 0.0),
    }
    return _table(rows, columns, f"What it cost{level_words(level)}.")


def held_out_table(findings: Findings, level: Level) -> Table:
    """Each term on held-out episodes, when it last counted, and the error of the executed actions."""

    def value(term: str) -> Callable[[ArmScore], str]:
        return lambda score: _number(score.held_out(term))

    scores = findings.at(level)
    columns: Columns[ArmScore] = {
        "arm": lambda score: score.arm,
        "executed actions": lambda score: _number(score.average("open_loop")),
    }
    columns |= {term: value(term) for score in scores for one in score.trained for term in one.held_out}
    caption = (
        f"Held-out losses{level_words(level)}, of terms at their last validation, mean over the seeds. Of "
        "arms whose decoders differ, or of other numbers of demonstrations (which scale the actions), they "
        "are no comparison."
    )
    return _table(scores, columns, caption)


def measure_table(findings: Findings, level: Level) -> Table:
    """What was measured beside success, each with its difference from the baseline over the shared seeds."""
    scores = findings.at(level)
    base = {one.seed: one.measures for s in scores if s.arm == findings.study.baseline for one in s.trained}

    def value(name: str) -> Callable[[ArmScore], Cell | str]:
        def make(score: ArmScore) -> Cell | str:
            values = [one.measures[name] for one in score.trained if name in one.measures]
            pairs = [
                one.measures[name] - base[one.seed][name]
                for one in score.trained
                if name in one.measures and name in base.get(one.seed, {})
            ]
            if not values:
                return NOTHING
            small = ""
            if score.arm != findings.study.baseline and len(pairs) > 1:
                ends = t_interval(pairs)
                small = f"{sum(pairs) / len(pairs):+.3f} [{ends.low:+.3f}, {ends.high:+.3f}]"
            return Cell(text=f"{sum(values) / len(values):.3f}", small=small)

        return make

    names = dict.fromkeys(name for score in scores for one in score.trained for name in one.measures)
    caption = (
        f"Beside success{level_words(level)}: mean over the seeds, and the difference from "
        f"{findings.study.baseline} with its t-interval over the seeds. Exploratory; docs/how-to/studies.md "
        "says what each is."
    )
    columns: Columns[ArmScore] = {"arm": lambda score: score.arm} | {name: value(name) for name in names}
    return _table(scores if names else [], columns, caption)


def _table(rows: Iterable[T], columns: Columns[T], caption: str) -> Table:
    return table(rows, [(head, HELP.get(head, ""), make) for head, make in columns.items()], caption)


def show(table: Table) -> None:
    """The table on the terminal, without the columns in WIDE."""
    print_table(table.caption, *texts(table, without=WIDE))


def points(interval: Interval | None, sign: str = "") -> str:
    """The bounds in points, as "12.5 to 40.0"; with the sign "+" of positive ones too."""
    if interval is None:
        return NOTHING
    return f"{100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f}"


def p_text(value: float | None) -> str:
    """A p as ".021" or "<.001"; a dash for none."""
    if value is None:
        return NOTHING
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 0.9995 else "1"


def _number(value: float | None) -> str:
    return NOTHING if value is None else plain(value, 4)
