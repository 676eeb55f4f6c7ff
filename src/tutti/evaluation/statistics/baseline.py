"""A policy against a named baseline: better, worse or unresolved, and how many rollouts would tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutti.evaluation.statistics.intervals import (
    SIGNIFICANT,
    Difference,
    barnard,
    difference_of_rates,
    discordant,
    episodes_needed,
    mcnemar,
    paired_episodes_needed,
    paired_interval,
)
from tutti.evaluation.statistics.sequential import Sequential, confidence_sequence, rounds_of

Outcomes = Mapping[str, Mapping[int, tuple[bool, str]]]
"""task -> seed -> success, and the hash of the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """The difference of the task means, policy - baseline, over the tasks that both played.

    `paired`: both met the same starts, pair by pair, so McNemar's test; else Barnard's. `needed`: rollouts of
    each (paired starts, or per arm) that would resolve a difference of this size with a power of 80 %; None
    where there is none. `sequential` holds at every look: an evaluation may be extended until it tells.
    `differs` says what else is not the same, as "executed 8, not 4".
    """

    baseline: str
    tasks: tuple[str, ...]
    paired: bool
    rollouts: tuple[int, int]
    difference: Difference
    test: str
    p: float
    needed: int | None
    sequential: Sequential
    verdict: Literal["better", "worse", "unresolved"]
    differs: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What an evaluation prints of it."""
        low, high = 100 * self.difference.interval.low, 100 * self.difference.interval.high
        starts = "the same starts" if self.paired else "other starts"
        needed = f"{self.needed:,} would tell" if self.needed else "no number would tell"
        rounds, told = self.sequential, self.sequential.resolved_after
        resolved = (f"resolved after {told} of" if told else "unresolved after") + f" {rounds.rounds}"
        bounds = f"[{100 * rounds.interval.low:+.0f}, {100 * rounds.interval.high:+.0f}]"
        return [
            f"{self.verdict.capitalize()} than {self.baseline}"
            if self.verdict != "unresolved"
            else f"Unresolved against {self.baseline}",
            f"  {100 * self.difference.value:+.1f} points [{low:+.1f}, {high:+.1f}] "
            f"({self.difference.interval.rule}), {self.test} p = {self.p:.2g}; {self.rollouts[1]} against "
            f"{self.rollouts[0]} rollouts on {len(self.tasks)} tasks, {starts}; "
            f"{needed} a difference of this size (power 80 %)",
            f"  at every look: {bounds} points, {resolved} rounds ({rounds.interval.rule})",
            *(f"  not the same: {one}" for one in self.differs),
        ]


def against(baseline: Outcomes, policy: Outcomes, name: str) -> Against:
    """Compares over the tasks that both played, with as many starts of each as both have of it.

    Raises: ValueError if they share no task.
    """
    tasks = tuple(task for task in policy if task in baseline)
    if not tasks:
        raise ValueError("no task in common")
    shared = {
        task: [s for s in policy[task] if s in baseline[task] and policy[task][s][1] == baseline[task][s][1]]
        for task in tasks
    }
    paired = all(shared.values()) and all(
        2 * len(shared[task]) >= min(len(policy[task]), len(baseline[task])) for task in tasks
    )
    before, after = (
        {task: [arm[task][seed][0] for seed in (shared[task] if paired else arm[task])] for task in tasks}
        for arm in (baseline, policy)
    )
    count = {
        task: min(map(len, (before[task], after[task], *([*before.values()] if paired else ()))))
        for task in tasks
    }
    one = [np.array(before[task][: count[task]] if paired else before[task], bool) for task in tasks]
    two = [np.array(after[task][: count[task]] if paired else after[task], bool) for task in tasks]
    # Rounded, for a sum of floats is not quite 0 where as much is gained as is lost.
    value = round(float(np.mean([b.mean() - a.mean() for a, b in zip(one, two, strict=True)])), 12)
    flat = np.concatenate(one), np.concatenate(two)
    if paired:
        interval, test, p = paired_interval(*flat), "exact McNemar", mcnemar(*flat)
        share = sum(discordant(*flat)) / len(flat[0])
        needed = paired_episodes_needed(value, max(share, abs(value))) if value else None
    else:
        counts = [[(int(bits.sum()), len(bits)) for bits in arm] for arm in (one, two)]
        interval = difference_of_rates(*counts)
        p, test = barnard(*((int(bits.sum()), len(bits)) for bits in flat))
        rates = [float(np.mean([k / n for k, n in arm])) for arm in counts]
        needed = episodes_needed(*rates) if value else None
    told = p < SIGNIFICANT and (interval.low > 0 or interval.high < 0)
    return Against(
        baseline=name,
        tasks=tasks,
        paired=paired,
        rollouts=(len(flat[0]), len(flat[1])),
        difference=Difference(value=value, interval=interval),
        test=test,
        p=p,
        needed=needed,
        sequential=confidence_sequence(rounds_of(one, two)),
        verdict="unresolved" if not told else "better" if value > 0 else "worse",
    )
