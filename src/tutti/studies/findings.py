"""The findings of a study in sentences: the headline, one for each comparison, and the cautions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tutti.report.blocks import Note
from tutti.studies.cells import Cell
from tutti.studies.config import StudyConfig
from tutti.studies.scores import ArmScore, mcnemar_statement, resolution
from tutti.studies.tables import MOODS, level_words

MIN_SEEDS = 3


def headline(study: StudyConfig, scores: Sequence[ArmScore]) -> str:
    """Counts the verdicts of all comparisons."""
    verdicts = Counter(score.against.verdict for score in scores if score.against is not None)
    total = sum(verdicts.values())
    budget = {"steps": "steps", "samples": "samples", "flops": "FLOPs", "time": "time"}[study.budget.kind]
    if not total:
        return "No arm can be compared yet: no training seed is finished in both an arm and the baseline."
    parts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in MOODS)
    plural = "comparison" if total == 1 else "comparisons"
    return f"{total} {plural} with {study.baseline} at equal {budget}: {parts}."


def notes(study: StudyConfig, scores: Sequence[ArmScore]) -> list[Note]:
    """One sentence for each comparison."""
    found: list[Note] = []
    for score in scores:
        against = score.against
        if against is None:
            continue
        interval = against.difference.interval
        where = f"{score.arm}{level_words(score.level)}"
        how = f"{100 * against.difference.value:+.1f} points (paired bootstrap {100 * interval.low:+.1f} to "
        how += f"{100 * interval.high:+.1f}"
        if against.over_seeds is not None:
            seeds = against.over_seeds
            how += f", t over seeds {100 * seeds.low:+.1f} to {100 * seeds.high:+.1f}"
        takes = resolution(score)
        more = f" To resolve it: {takes}." if takes and against.difference.value != 0 else ""
        tested = mcnemar_statement(score, study.baseline)
        text = f"{where}: {against.verdict}, {how}); {tested}.{more}"
        mood = MOODS[against.verdict]
        found.append(Note(text=text, mood=mood if mood != "quiet" else ""))
    return found


def cautions(study: StudyConfig, scores: Sequence[ArmScore], missing: Sequence[Cell]) -> list[str]:
    """Limits of the study that a reader must know."""
    found: list[str] = []
    if missing:
        names = "; ".join(cell.name for cell in missing[:6])
        more = f"; and {len(missing) - 6} more" if len(missing) > 6 else ""
        whole = len(study.arms) * len(study.levels) * len(study.seed_list)
        found.append(f"{len(missing)} of {whole} cells are missing: {names}{more}.")
    fewest = min((len(score.seeds) for score in scores), default=0)
    if scores and fewest < MIN_SEEDS:
        found.append(
            "Some arms have 1 training seed: nothing is known about other trainings, so every verdict on "
            "them is unresolved."
            if fewest == 1
            else f"Some arms have {fewest} training seeds, which resolve hardly any difference."
        )
    trained = [one for score in scores for one in score.trained]
    commits = sorted({str(one.commit) for one in trained})
    if len(commits) > 1:
        found.append(f"Cells were trained at different commits: {', '.join(commits)}.")
    versions = {tuple(sorted(one.versions.items())) for one in trained}
    if len(versions) > 1:
        found.append("Cells were trained with different versions of packages: results.json has each cell's.")
    return found


def basis(study: StudyConfig, scores: Sequence[ArmScore]) -> list[str]:
    """The assumptions of the tables."""
    compared = sum(score.against is not None for score in scores)
    comparisons = "comparison" if compared == 1 else f"{compared} comparisons"
    played = next((sum(map(len, one.bits)) for score in scores for one in score.trained), 0)
    return [
        f"Fixed beforehand: the mean of the tasks' success rates over {played} starts a training, the same "
        "for every arm and seed. Better or worse only where both the paired bootstrap and the t-interval of "
        "the seeds' differences lie on one side of 0. Intervals are 95 % and not adjusted for the "
        f"{comparisons}; the p beside them is (Holm).",
        "Within a seed all arms of a level see the same episodes in the same order, and those with the same "
        "model start from the same weights; held-out episodes are the same at every level.",
    ]
