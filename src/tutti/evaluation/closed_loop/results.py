"""Results of an evaluation: success rates with intervals, verdicts of the controls, the protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Self

from pydantic import TypeAdapter

from tutti.evaluation.closed_loop.controls import SENSES, Verdict, verdict
from tutti.evaluation.closed_loop.rollouts import Condition, Rollout
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.evaluation.statistics.intervals import TIER_MEAN, Interval, mean_of_rates, wilson

ONE_TRAINING = "one training: the interval says nothing about other seeds of the same config"
NO_TIERS: Mapping[str, Sequence[str]] = {}
HALF = 0.5
BLIND_RATE = 0.2
"""A task counts as solvable without pictures only if a policy that was trained without them reaches this."""
GOALS = {
    "told": "the goal that the sentence names",
    "own": "the task's own goal against the sentence",
    "another": "another goal",
    "none": "none",
}
"""What `TaskScore.goals` counts, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """k of n rollouts of a task, with Wilson's 95 % interval.

    `decisions` is the mean number of control steps of its successes, `closest` the median over its rollouts
    of the smallest distance of object and goal; None where there is none. Where the scene shows the goals of
    several tasks, `goals` counts which was reached first: that of the sentence ("told"), that of the task if
    the sentence was another's ("own"), "another" or "none".
    """

    task: str
    successes: int
    episodes: int
    interval: Interval
    decisions: float | None
    goals: dict[str, int] = field(default_factory=dict)
    closest: float | None = None

    @property
    def rate(self) -> float:
        """successes / episodes."""
        return self.successes / self.episodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Success of a condition over its tasks. `mean` is the mean of the tasks' rates.

    `interval` is that of `mean_of_rates`, of one training. Where the suite has tiers and all their tasks were
    played, `tiers` has the mean of each, `tier_mean` the mean of these with its interval.
    """

    condition: Condition
    tasks: tuple[TaskScore, ...]
    mean: float
    interval: Interval
    tiers: dict[str, float] = field(default_factory=dict)
    tier_mean: float | None = None
    tier_interval: Interval | None = None

    @property
    def goals(self) -> dict[str, int]:
        """How many rollouts reached which goal first, over all tasks, as in `TaskScore`; or empty."""
        sums = Counter[str]()
        for task in self.tasks:
            sums.update(task.goals)
        return dict(sums)

    @property
    def counts(self) -> dict[str, list[int]]:
        """task -> [k, n]."""
        return {task.task: [task.successes, task.episodes] for task in self.tasks}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProtocol:
    """How the success rates were measured. Of `chunk` predicted actions `executed` are executed, as the
    config `chunks` says.

    A rollout ends at its first success. `distinct_starts` counts different (task, privileged state after the
    reset): a deterministic policy gives no more evidence than that. `policy` is its checkpoint and which
    of its weights ("step-000200, ema"). `trained_seeds` are those of the demonstrations ("10000 to 10052",
    recording by recording); `starts_not_known` names the data sets that do not say theirs. `departures` says
    where it is not how the suite's published numbers were measured.
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
    policy: str = ""
    chunks: str = "queue"
    trained_seeds: tuple[str, ...] = ()
    starts_not_known: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Everything an evaluation measured. `scores["policy"]` is the score, the others are its controls.

    `seconds` is the wall time of this call, in which `resumed` rollouts of an earlier one were not played
    again.
    """

    scores: dict[Condition, Score]
    verdicts: tuple[Verdict, ...]
    protocol: EvaluationProtocol
    rollouts: tuple[Rollout, ...]
    resumed: int
    seconds: float

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        protocol: EvaluationProtocol,
        *,
        resumed: int,
        seconds: float,
        tiers: Mapping[str, Sequence[str]] = NO_TIERS,
    ) -> Self:
        """Scores every condition that was played, and judges the controls."""
        played: list[Condition] = [rollout.condition for rollout in rollouts]
        verdicts = (verdict(control, rollouts) for control in SENSES)
        return cls(
            scores={
                one: score(one, [r for r in rollouts if r.condition == one], tiers)
                for one in dict.fromkeys(played)
            },
            verdicts=tuple(one for one in verdicts if one is not None),
            protocol=protocol,
            rollouts=tuple(rollouts),
            resumed=resumed,
            seconds=seconds,
        )

    @property
    def policy(self) -> Score:
        """The score of the policy itself."""
        return self.scores["policy"]

    @property
    def controls(self) -> dict[Condition, Score]:
        """The score of every control that ran."""
        return {condition: score for condition, score in self.scores.items() if condition != "policy"}

    @property
    def solved_without_pictures(self) -> tuple[str, ...]:
        """Tasks whose success says little about looking: the policy without its vision tokens solves them.

        The rule: without them at least half of the starts succeed, and the whole Wilson interval of that rate
        is above half of the policy's own. At a rate of 100 % that takes 4 of 4, 9 of 10 or 15 of 20.
        """
        own = {one.task: one.rate for one in self.policy.tasks}
        blind = self.scores["no_image"].tasks if "no_image" in self.scores else ()
        return tuple(
            one.task for one in blind if one.rate >= HALF and one.interval.low > HALF * own.get(one.task, 1.0)
        )

    def notes(self) -> list[str]:
        """The protocol and the verdicts, in sentences."""
        p = self.protocol
        text, how = p.split.replace("_", "-"), f" ({p.chunks})" * (p.chunks != "queue")
        first = (
            f"{len(self.policy.tasks)} tasks of {p.suite}, seeds {p.seed_first}-{p.seed_last}, "
            f"{p.distinct_starts} distinct starts, {text} instructions; {p.chunk} actions predicted, "
            f"{p.executed} executed{how}, at most {p.max_decisions} control steps, first success counts."
        )
        interval = self.policy.interval
        intervals = (
            f"Per task: Wilson 95 %. Task mean, 95 %: {interval.percent()} ({interval.rule}); {ONE_TRAINING}."
        )
        tiers = self.policy.tier_interval
        if tiers is not None:
            means = ", ".join(f"{tier} {100 * mean:.1f} %" for tier, mean in self.policy.tiers.items())
            intervals += (
                f" Tiers: {means}; mean of the tiers {100 * (self.policy.tier_mean or 0):.1f} %, 95 %: "
            )
            intervals += f"{tiers.percent()} ({tiers.rule})."
        unknown = TrainingStarts(unknown=p.starts_not_known).warning
        sentences = (
            first,
            intervals,
            unknown,
            departures_note(p),
            blind_note(self.solved_without_pictures),
            goals_note(self.scores),
            *(verdict.sentence for verdict in self.verdicts),
        )
        return [sentence for sentence in sentences if sentence]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the executed actions, which lie in the rollouts' own records."""
        rollouts = [rollout.about() for rollout in self.rollouts]
        return asdict(replace(self, rollouts=())) | {"rollouts": rollouts, "notes": self.notes()}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """What `to_dict` gave, without its rollouts.

        Raises: ValueError, KeyError or TypeError where the values have another form.
        """
        scores = TypeAdapter(dict[Condition, Score]).validate_python(values["scores"])
        if not all(
            score.tasks and all(task.episodes > 0 for task in score.tasks) for score in scores.values()
        ):
            raise ValueError("scores: expected at least one task with at least one rollout each")
        return cls(
            scores={"policy": scores["policy"], **scores},
            verdicts=TypeAdapter(tuple[Verdict, ...]).validate_python(values["verdicts"]),
            protocol=TypeAdapter(EvaluationProtocol).validate_python(values["protocol"]),
            rollouts=(),
            resumed=int(values["resumed"]),
            seconds=float(values["seconds"]),
        )


def departures_note(protocol: EvaluationProtocol) -> str:
    """What differs from the suite's own protocol; empty where nothing does."""
    what = ", ".join(protocol.departures)
    return f"Not the protocol of published numbers for {protocol.suite}: {what}." if what else ""


def first_goal(rollout: Rollout) -> str:
    """Whose goal was reached first, as `TaskScore.goals` names it."""
    first = (rollout.reached or (None,))[0]
    if first is None:
        return "none"
    return "told" if first == rollout.told else "own" if first == rollout.task else "another"


def goals_note(scores: Mapping[Condition, Score]) -> str:
    """Which goal the policy went to, told its own sentence and the wrong one; empty without such goals."""
    parts: list[str] = []
    sentences: dict[Condition, str] = {"policy": "their own", "wrong_instruction": "another goal's"}
    for condition, whose in sentences.items():
        if condition in scores and (goals := scores[condition].goals):
            count = [f"{goals.get(key, 0)} {words}" for key, words in GOALS.items() if goals.get(key)]
            played, what = sum(goals.values()), ", ".join(count)
            parts.append(f"Told {whose} sentence, of {played} rollouts reached first: {what}.")
    return " ".join(parts)


def blind_note(tasks: Sequence[str]) -> str:
    """What `solved_without_pictures` means for these tasks; empty for none."""
    rule = (
        "no image succeeds at half of its starts or more, and its 95 % interval is above half of the policy's"
    )
    says = f"{', '.join(tasks)}. This success says little about looking ({rule} rate)."
    return f"Solved without pictures: {says}" if tasks else ""


def score(
    condition: Condition, rollouts: Sequence[Rollout], tiers: Mapping[str, Sequence[str]] = NO_TIERS
) -> Score:
    """Scores the rollouts of one condition, tasks in the order of their first rollout."""
    tasks: list[TaskScore] = []
    for name in dict.fromkeys(rollout.task for rollout in rollouts):
        played = [rollout for rollout in rollouts if rollout.task == name]
        solved = [rollout.decisions for rollout in played if rollout.success]
        distances = [rollout.closest for rollout in played if rollout.closest is not None]
        tasks.append(
            TaskScore(
                task=name,
                successes=len(solved),
                episodes=len(played),
                interval=wilson(len(solved), len(played)),
                decisions=sum(solved) / len(solved) if solved else None,
                goals=dict(Counter(first_goal(r) for r in played if r.reached is not None)),
                closest=median(distances) if distances else None,
            )
        )
    return Score(
        condition=condition,
        tasks=tuple(tasks),
        mean=sum(task.rate for task in tasks) / len(tasks),
        interval=mean_of_rates([(task.successes, task.episodes) for task in tasks]),
        **_of_tiers({task.task: task for task in tasks}, tiers),
    )


def _of_tiers(tasks: Mapping[str, TaskScore], tiers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The tiers' fields of a `Score`; none where a task of theirs was not played."""
    if not tiers or any(task not in tasks for members in tiers.values() for task in members):
        return {}
    means = {tier: sum(tasks[t].rate for t in members) / len(members) for tier, members in tiers.items()}
    weights = {t: 1 / len(members) / len(tiers) for members in tiers.values() for t in members}
    counts = [(tasks[t].successes, tasks[t].episodes) for t in weights]
    return {
        "tiers": means,
        "tier_mean": sum(means.values()) / len(means),
        "tier_interval": mean_of_rates(counts, list(weights.values()), TIER_MEAN),
    }
