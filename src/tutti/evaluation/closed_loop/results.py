"""What an evaluation found: scores with intervals, verdicts, the protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tutti.evaluation.closed_loop.controls import Verdict
from tutti.evaluation.closed_loop.rollouts import Condition, Rollout
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.evaluation.statistics.intervals import Interval, mean_of_rates, wilson


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """k of n rollouts of a task, with Wilson's 95 % interval; `decisions` is the mean over the successes."""

    task: str
    successes: int
    episodes: int
    interval: Interval
    decisions: float | None

    @property
    def rate(self) -> float:
        """successes / episodes."""
        return self.successes / self.episodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A condition over its tasks. `mean` is the mean of the tasks' rates, each task counting once.

    `interval` is that of `mean_of_rates`: it says nothing about other trainings of the same config.
    """

    condition: Condition
    tasks: tuple[TaskScore, ...]
    mean: float
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProtocol:
    """How the score was taken. `chunk` actions are predicted at once, `executed` of them carried out.

    Success latches at its first moment and ends the rollout. `distinct_starts` counts different (task,
    privileged state after the reset): a deterministic policy gives no more evidence than that.
    `trained_seeds` are those of the demonstrations ("10000 to 10052", recording by recording);
    `starts_not_known` names the data sets that do not say theirs.
    """

    suite: str
    split: str
    seed_first: int
    seed_last: int
    chunk: int
    executed: int
    max_decisions: int
    distinct_starts: int
    environment: str
    trained_seeds: tuple[str, ...] = ()
    starts_not_known: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Everything an evaluation found. `scores["policy"]` is the score, the others are its controls.

    `seconds` is the wall time of this call, in which `resumed` rollouts of an earlier one were not played
    again.
    """

    scores: dict[Condition, Score]
    verdicts: tuple[Verdict, ...]
    protocol: EvaluationProtocol
    rollouts: tuple[Rollout, ...]
    resumed: int
    seconds: float

    @property
    def policy(self) -> Score:
        """The score itself."""
        return self.scores["policy"]

    def success(self) -> dict[str, list[int]]:
        """task -> [k, n], as summary.json wants it."""
        return counts(self.policy)

    def controls(self) -> dict[str, dict[str, list[int]]]:
        """condition -> task -> [k, n] of every control that ran."""
        return {name: counts(found) for name, found in self.scores.items() if name != "policy"}

    def notes(self) -> list[str]:
        """The protocol and the verdicts, in sentences."""
        p = self.protocol
        text = p.split.replace("_", "-")
        first = (
            f"{len(self.policy.tasks)} tasks of {p.suite}, seeds {p.seed_first}-{p.seed_last}, "
            f"{p.distinct_starts} distinct starts, {text} instructions; {p.chunk} actions predicted, "
            f"{p.executed} executed, at most {p.max_decisions} decisions, first success counts."
        )
        interval = self.policy.interval
        intervals = f"Per task: Wilson 95 %. Task mean, 95 %: {interval.percent()} ({interval.rule})."
        unknown = TrainingStarts(unknown=p.starts_not_known).warning
        return [
            first,
            intervals,
            *([unknown] if unknown else []),
            *(found.sentence for found in self.verdicts),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; of the rollouts everything but the executed actions, which lie in the
        records.
        """
        slim = [
            {k: v for k, v in json.loads(r.to_json()).items() if not k.startswith("action")}
            for r in self.rollouts
        ]
        return {
            "scores": {name: _plain(found) for name, found in self.scores.items()},
            "verdicts": [asdict(found) for found in self.verdicts],
            "protocol": asdict(self.protocol),
            "rollouts": slim,
            "notes": self.notes(),
            "resumed": self.resumed,
            "seconds": self.seconds,
        }


def _plain(found: Score) -> dict[str, Any]:
    """A score with its tasks as rows of task, k, n, low, high, decisions."""
    rows = [
        {
            "task": task.task,
            "k": task.successes,
            "n": task.episodes,
            "low": task.interval.low,
            "high": task.interval.high,
            "decisions": task.decisions,
        }
        for task in found.tasks
    ]
    return asdict(found) | {"tasks": rows}


def counts(found: Score) -> dict[str, list[int]]:
    """task -> [k, n]."""
    return {task.task: [task.successes, task.episodes] for task in found.tasks}


def score(condition: Condition, rollouts: Sequence[Rollout]) -> Score:
    """Scores the rollouts of one condition, tasks in the order of their first rollout."""
    tasks: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        tasks.setdefault(rollout.task, []).append(rollout)
    scored = tuple(_task_score(task, played) for task, played in tasks.items())
    return Score(
        condition=condition,
        tasks=scored,
        mean=sum(task.rate for task in scored) / len(scored),
        interval=mean_of_rates([(task.successes, task.episodes) for task in scored]),
    )


def _task_score(task: str, played: Sequence[Rollout]) -> TaskScore:
    solved = [r.decisions for r in played if r.success]
    return TaskScore(
        task=task,
        successes=len(solved),
        episodes=len(played),
        interval=wilson(len(solved), len(played)),
        decisions=sum(solved) / len(solved) if solved else None,
    )
