"""The findings of a study in sentences: the headline, one for each comparison, and the cautions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tutti.report.blocks import Note
from tutti.studies.cells import Cell, Trained, level_words
from tutti.studies.config import Level, StudyConfig
from tutti.studies.costs import StepCost
from tutti.studies.scores import ArmScore, mcnemar_statement, resolution
from tutti.studies.tables import MOODS, points

MIN_SEEDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that the tables of a study are made from, and what they say in words."""

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

    @property
    def headline(self) -> str:
        """Counts the verdicts of all comparisons."""
        verdicts = Counter(score.against.verdict for score in self.scores if score.against is not None)
        total, kind = sum(verdicts.values()), self.study.budget.kind
        if not total:
            return "No arm can be compared yet: no training seed is finished in both an arm and the baseline."
        parts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in MOODS)
        plural, budget = "s" if total > 1 else "", "FLOPs" if kind == "flops" else kind
        return f"{total} comparison{plural} with {self.study.baseline} at equal {budget}: {parts}."

    @property
    def notes(self) -> list[Note]:
        """One sentence for each comparison."""
        found: list[Note] = []
        for score in self.scores:
            against = score.against
            if against is None:
                continue
            where, gain = f"{score.arm}{level_words(score.level)}", against.difference
            how = f"{100 * gain.value:+.1f} points (paired bootstrap {points(gain.interval, '+')}"
            if against.over_seeds is not None:
                how += f", t over seeds {points(against.over_seeds, '+')}"
            takes, tested = resolution(score), mcnemar_statement(score, self.study.baseline)
            more = f" To resolve it: {takes}." if takes and gain.value != 0 else ""
            text = f"{where}: {against.verdict}, {how}); {tested}.{more}"
            found.append(Note(text=text, mood=MOODS[against.verdict].replace("quiet", "")))
        return found

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
        comparisons = "comparison" if compared == 1 else f"{compared} comparisons"
        played = next((sum(map(len, one.bits)) for score in self.scores for one in score.trained), 0)
        return (
            f"Fixed beforehand: the mean of the tasks' success rates over {played} starts a training, the "
            "same for every arm and seed. Better or worse only where both the paired bootstrap and the "
            "t-interval of the seeds' differences lie on one side of 0. Intervals are 95 % and not adjusted "
            f"for the {comparisons}; the p beside them is (Holm).",
            "Within a seed all arms of a level see the same episodes in the same order, and those with the "
            "same model start from the same weights; held-out episodes are the same at every level.",
        )
