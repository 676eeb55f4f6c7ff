"""From the rollouts of many trainings to tables: each arm with its intervals, and held against `all`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from tables import Table

from tutti.evaluation.statistics.comparison import Comparison, compare_arms
from tutti.evaluation.statistics.intervals import Interval, seeds_and_starts, t_interval

Budget = Literal["steps", "time"]
BASE = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One training and its rollouts: `successes[task]` holds 0 or 1 for each start.

    `seconds` are those of its steps, `valid_action` the action term on held-out episodes at the end.
    """

    arm: str
    seed: int
    steps: int
    seconds: float
    valid_action: float | None
    successes: dict[str, list[int]]
    commit: str | None

    @property
    def mean(self) -> float:
        """The mean of the tasks' rates."""
        return float(np.mean([np.mean(bits) for bits in self.successes.values()]))

    @property
    def bits(self) -> list[list[int]]:
        """The successes, task by task."""
        return list(self.successes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmScore:
    """An arm at a budget: the task mean of each seed, their mean and its two intervals, k and n per task."""

    arm: str
    budget: Budget
    steps: int
    seconds: float
    valid_action: float | None
    seed_means: tuple[float, ...]
    mean: float
    over_seeds: Interval | None
    bootstrap: Interval
    tasks: dict[str, tuple[int, int]]
    against: Comparison | None


def compare(base: Sequence[Trained], other: Sequence[Trained]) -> Comparison:
    """Holds an arm against `all`, seed by seed and start by start.

    Raises: ValueError where the seeds or the tasks differ.
    """
    if [(t.seed, list(t.successes)) for t in base] != [(t.seed, list(t.successes)) for t in other]:
        raise ValueError("paired arms need the same training seeds and tasks in the same order")
    return compare_arms([t.bits for t in base], [t.bits for t in other])


def score(budget: Budget, trained: Sequence[Trained], base: Sequence[Trained]) -> ArmScore:
    """Scores the trainings of one arm, one for each seed, beside those of `all`."""
    means = [one.mean for one in trained]
    held_out = [one.valid_action for one in trained if one.valid_action is not None]
    return ArmScore(
        arm=trained[0].arm,
        budget=budget,
        steps=trained[0].steps,
        seconds=float(np.mean([one.seconds for one in trained])),
        valid_action=float(np.mean(held_out)) if held_out else None,
        seed_means=tuple(means),
        mean=float(np.mean(means)),
        over_seeds=_t_interval(means),
        bootstrap=seeds_and_starts([one.bits for one in trained]),
        tasks={
            task: (
                sum(sum(one.successes[task]) for one in trained),
                sum(len(one.successes[task]) for one in trained),
            )
            for task in trained[0].successes
        },
        against=None if trained[0].arm == BASE else compare(base, trained),
    )


def _t_interval(values: Sequence[float]) -> Interval | None:
    return t_interval(values) if len(values) > 1 else None


def mean_table(scores: Sequence[ArmScore], labels: dict[str, str]) -> Table:
    """Task means: each seed's, their mean and its intervals, and what each arm cost."""
    rows = [
        (
            f"{labels[s.arm]}, equal {s.budget}" if s.arm != BASE else labels[s.arm],
            *(str(s.steps), f"{s.seconds:.0f}", "-" if s.valid_action is None else f"{s.valid_action:.4f}"),
            ", ".join(f"{100 * mean:.1f}" for mean in s.seed_means),
            *(f"{100 * s.mean:.1f}", _percent(s.over_seeds), _percent(s.bootstrap)),
        )
        for s in scores
    ]
    heads = (
        *("terms", "steps", "training s", "held-out action L1", "task mean of each seed, %"),
        *("mean, %", "t over seeds", "bootstrap"),
    )
    return Table(title="Success in the simulator, task mean", heads=heads, rows=tuple(rows))


def difference_table(scores: Sequence[ArmScore], labels: dict[str, str]) -> Table:
    """Each arm minus `all`, in points of success."""
    rows = [
        (
            f"{labels[s.arm]}, equal {s.budget}",
            *(f"{100 * s.against.difference.value:+.1f}", _percent(s.against.difference.interval)),
            *(_percent(s.against.over_seeds), s.against.verdict),
        )
        for s in scores
        if s.against is not None
    ]
    heads = ("terms", "minus all, points", "paired bootstrap", "t over seeds", "verdict")
    return Table(title="Without them, against all four terms", heads=heads, rows=tuple(rows))


def task_table(scores: Sequence[ArmScore], labels: dict[str, str]) -> Table:
    """k/n per task, summed over the seeds."""
    tasks = list(scores[0].tasks)
    rows = [
        (
            f"{labels[s.arm]}, equal {s.budget}" if s.arm != BASE else labels[s.arm],
            *("{}/{}".format(*s.tasks[task]) for task in tasks),
        )
        for s in scores
    ]
    return Table(title="Successes per task, all seeds", heads=("terms", *tasks), rows=tuple(rows))


def plain(scores: Sequence[ArmScore]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(one) for one in scores]


def _percent(interval: Interval | None) -> str:
    return "-" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
