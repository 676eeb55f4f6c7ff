"""Scores of finished cells: each arm at each level with its intervals, compared with the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from statistics import mean

from tutti.evaluation.statistics.comparison import (
    Comparison,
    Contrast,
    Verdict,
    compare_arms,
    contrast,
    holm,
)
from tutti.evaluation.statistics.intervals import SIGNIFICANT, Interval, seeds_and_starts, t_interval
from tutti.studies.cells import Cell, Trained
from tutti.studies.config import Level, StudyConfig
from tutti.types import UserError


def in_words(verdict: Verdict, adjusted_p: float | None) -> str:
    """The verdict; "better before Holm" (or worse) where the two intervals say so, but `adjusted_p`,
    Holm's over all comparisons of the study, is not below `SIGNIFICANT`.

    With one comparison it never is above, as the t-interval of a verdict leaves 0 out. Of many comparisons of
    equal arms one in twenty has such an interval, which is why the words say so.

    >>> in_words("better", 0.19), in_words("better", 0.01), in_words("unresolved", 1.0)
    ('better before Holm', 'better', 'unresolved')
    """
    borne_out = verdict == "unresolved" or adjusted_p is None or adjusted_p < SIGNIFICANT
    return verdict if borne_out else f"{verdict} before Holm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmScore:
    """An arm at a level over its finished seeds.

    `seed_means` are the task means, `over_seeds` their t-interval (None with one seed), `bootstrap` that over
    seeds and starts. `tasks` has (k, n) over all seeds. `against` holds the seeds that the baseline has too
    (`shared_seeds`) against it; None for the baseline itself, or without such a seed. `adjusted_p` is Holm's
    over all comparisons of the study, None where it has fixed others beforehand.
    """

    arm: str
    level: Level
    trained: tuple[Trained, ...]
    seed_means: tuple[float, ...]
    mean: float
    over_seeds: Interval | None
    bootstrap: Interval
    tasks: dict[str, tuple[int, int]]
    shared_seeds: tuple[int, ...]
    against: Comparison | None
    adjusted_p: float | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The finished training seeds."""
        return tuple(one.seed for one in self.trained)

    @property
    def verdict(self) -> str:
        """The verdict on the baseline in words; "" without one to compare with."""
        return "" if self.against is None else in_words(self.against.verdict, self.adjusted_p)

    def average(self, key: str) -> float | None:
        """Mean over the seeds of a number of `Trained`; None where a seed has none."""
        values = [getattr(one, key) for one in self.trained]
        return None if any(value is None for value in values) else float(mean(values))

    def held_out(self, term: str) -> float | None:
        """Mean over the seeds of a term's held-out value; None where it was never measured."""
        values = [one.held_out[term] for one in self.trained if term in one.held_out]
        return float(mean(values)) if values else None


def score_study(study: StudyConfig, found: Mapping[Cell, Trained]) -> list[ArmScore]:
    """Every arm at every level that has a finished seed, in the order of the study.

    Raises: UserError if two cells were not judged on the same starts.
    """
    cells = list(found.items())
    for cell, one in cells[1:]:
        if one.starts != cells[0][1].starts:
            raise UserError(
                f"{cell.folder} was judged on other starts than {cells[0][0].folder}: arms are compared on "
                "the same ones. Delete the folder of the wrong one and run the study again."
            )
    scores: list[ArmScore] = []
    for level in study.levels:
        arms = {
            arm: sorted(
                (one for cell, one in cells if (cell.arm, cell.level) == (arm, level)), key=attrgetter("seed")
            )
            for arm in study.arms
        }
        base = arms[study.baseline]
        scores += [
            _score(arm, level, trained, () if arm == study.baseline else base)
            for arm, trained in arms.items()
            if trained
        ]
    if study.contrasts:  # these are then what is judged
        return scores
    adjusted = holm([score.against.p if score.against else None for score in scores])
    return [replace(score, adjusted_p=p) for score, p in zip(scores, adjusted, strict=True)]


def _score(arm: str, level: Level, trained: Sequence[Trained], base: Sequence[Trained]) -> ArmScore:
    means = tuple(one.mean for one in trained)
    before = {one.seed: one for one in base}
    pairs = [(before[one.seed], one) for one in trained if one.seed in before]
    return ArmScore(
        arm=arm,
        level=level,
        trained=tuple(trained),
        seed_means=means,
        mean=float(mean(means)),
        over_seeds=t_interval(means) if len(means) > 1 else None,
        bootstrap=seeds_and_starts([one.bits for one in trained]),
        tasks={
            task: (sum(sum(bits) for bits in played), sum(map(len, played)))
            for task in trained[0].successes
            for played in [[one.successes[task] for one in trained]]
        },
        shared_seeds=tuple(one.seed for _, one in pairs),
        against=compare_arms([a.bits for a, _ in pairs], [b.bits for _, b in pairs]) if pairs else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastScore:
    """A comparison fixed beforehand, a main effect, or an interaction, over the seeds that all its arms have.

    `adjusted_p` is Holm's over all of the study's but the interactions, which are exploratory.
    """

    name: str
    level: Level
    exploratory: bool
    weights: dict[str, float]
    seeds: tuple[int, ...]
    found: Contrast
    adjusted_p: float | None = None

    @property
    def verdict(self) -> str:
        """In words; "exploratory" where none is passed."""
        return "exploratory" if self.exploratory else in_words(self.found.verdict, self.adjusted_p)


def score_contrasts(study: StudyConfig, scores: Sequence[ArmScore]) -> list[ContrastScore]:
    """Every contrast of the study at every level at which its arms have a seed in common."""
    made: list[ContrastScore] = []
    for level in study.levels:
        arms = {
            score.arm: {one.seed: one.bits for one in score.trained}
            for score in scores
            if score.level == level
        }
        for exploratory, contrasts in ((False, study.contrasts), (True, study.interactions)):
            for name, weights in contrasts.items():
                seeds = sorted(set[int].intersection(*({*arms.get(arm, {})} for arm in weights)))
                if seeds:
                    bits = [[arms[arm][seed] for seed in seeds] for arm in weights]
                    made.append(
                        ContrastScore(
                            name=name,
                            level=level,
                            exploratory=exploratory,
                            weights=weights,
                            seeds=tuple(seeds),
                            found=contrast(bits, [*weights.values()]),
                        )
                    )
    adjusted = holm([None if one.exploratory else one.found.p for one in made])
    return [replace(one, adjusted_p=p) for one, p in zip(made, adjusted, strict=True)]


def mcnemar_statement(score: ArmScore, baseline: str) -> str:
    """Counts the exact tests of the seeds.

    They are not pooled: each compares two trainings, and the starts of several trainings are no independent
    trials of a method.
    """
    assert score.against is not None
    tests = list(zip(score.against.mcnemar, score.against.discordant, strict=True))
    won = sum(p < SIGNIFICANT and c > b for p, (b, c) in tests)
    lost = sum(p < SIGNIFICANT and b > c for p, (b, c) in tests)
    pairs = "1 pair" if len(tests) == 1 else f"{len(tests)} pairs"
    return (
        f"of {pairs} of trainings {score.arm} is the better one in {won}, {baseline} in {lost}, "
        f"and {len(tests) - won - lost} cannot be told apart (exact McNemar, p < .05)"
    )


def resolution(score: ArmScore) -> str:
    """The starts or seeds that would resolve a difference of this size; empty if it is resolved."""
    against = score.against
    if against is None or against.verdict != "unresolved":
        return ""
    needed = against.needed
    if against.difference.value == 0:
        return "no difference was seen"
    played = sum(len(bits) for bits in score.trained[0].bits)
    starts = f"{needed.starts:,} paired starts (now {played:,} a seed)"
    if needed.seeds is None and needed.seeds_dominate is None:
        return f"more seeds; {starts}"
    seeds = "over 100,000 seeds" if needed.seeds is None else f"{needed.seeds:,} seeds"
    return f"{seeds} (seeds dominate)" if needed.seeds_dominate else f"{starts}, or {seeds}"
