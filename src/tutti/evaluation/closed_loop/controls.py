"""Controls of an evaluation: does the policy use its text and images, and is the task solvable.

| condition | who acts | what it is for |
|---|---|---|
| policy | the policy, its own instruction | the success rate |
| other_wording | the policy, same starts and task, other sentences for it | does the wording matter? |
| wrong_instruction | the policy, same starts, another task's text | no fall: the text is ignored |
| no_image | the policy, vision tokens removed by `image_mask` | blind baseline (a black image is an input) |
| noop | actions that leave the robot where it is | chance level |
| expert | the scripted expert that made the demonstrations | ceiling |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutti.evaluation.closed_loop.rollouts import CONDITIONS, Condition, PlannedRollout, Rollout
from tutti.evaluation.config import EvaluationConfig
from tutti.evaluation.statistics.intervals import SIGNIFICANT, Interval, mcnemar, paired_interval, wilson
from tutti.suites.environment import Suite
from tutti.types import UserError

Outcome = Literal[
    "falls to chance",
    "falls; not told apart from chance",
    "falls, but stays above chance",
    "falls",
    "does not fall",
    "not resolved",
]

SENSES: dict[Condition, tuple[str, str]] = {
    "other_wording": ("other sentences for the same tasks", "the wording"),
    "wrong_instruction": ("the wrong instruction", "the text"),
    "no_image": ("no image", "the image"),
}
"""What a control changes, and what its fall shows to be used."""
MARGIN = 0.1
"""Two success rates count as equal where the 95 % interval of their difference stays within 10 points: some
30 starts at least. That a difference was not found does not make two rates equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a control shows about the success rate, as a sentence with numbers. k/n are over all its tasks.

    `p` compares control and policy, `chance_p` control and no-op (exact McNemar, each on the starts that both
    ran). `fall` is the interval of control minus policy, `above_chance` that of control minus no-op. The
    no-op's values are None where it did not run on these starts.
    """

    control: Condition
    tasks: tuple[str, ...]
    outcome: Outcome
    sentence: str
    normal: tuple[int, int]
    altered: tuple[int, int]
    chance: tuple[int, int] | None
    p: float
    chance_p: float | None
    fall: Interval
    above_chance: Interval | None


def plan(config: EvaluationConfig, environments: Suite) -> list[PlannedRollout]:
    """Every rollout, by condition, task and seed.

    Start `seed` gets paraphrase number `seed mod count` of the split, so a text does not depend on how many
    rollouts are played. Every control uses the policy's first starts.

    Raises UserError for a task that the suite does not know.
    """
    tasks = environments.tasks if config.tasks == "suite" else config.tasks
    if len(set(tasks)) != len(tasks):
        raise UserError(f"evaluation.tasks names a task twice: {', '.join(tasks)}. Name each once.")
    controls = config.controls
    named = controls.wrong_instruction_tasks
    listed = {"all": tasks, "suite": environments.same_scene}[named] if isinstance(named, str) else named
    swapped = [task for task in tasks if task in listed]
    partners = controls.partners_of(environments)
    for task in swapped if controls.wrong_instruction else ():
        if partners.get(task, task) == task:
            raise UserError(
                f"evaluation.controls.partners has no other task for {task!r}: the control lacks a text. "
                f"Add one (evaluation.controls.partners: {{{task}: another-task}}) or take the task out of "
                "evaluation.controls.wrong_instruction_tasks."
            )
    idle = dict.fromkeys(tasks, controls.noop)
    idle |= dict.fromkeys(swapped, controls.noop and max(controls.noop, controls.wrong_instruction))
    wordings = config.wordings(environments)
    counts: dict[Condition, dict[str, int]] = {
        "policy": dict.fromkeys(tasks, config.episodes),
        "other_wording": {task: controls.other_wording for task in tasks if task in wordings},
        "wrong_instruction": dict.fromkeys(swapped, controls.wrong_instruction),
        "no_image": dict.fromkeys(tasks, controls.no_image),
        "noop": idle,
        "expert": dict.fromkeys(tasks, controls.expert if environments.has_expert else 0),
    }
    planned: list[PlannedRollout] = []
    for condition in CONDITIONS:
        for task, count in counts[condition].items():
            instructed = partners[task] if condition == "wrong_instruction" and count else task
            own = environments.instructions(instructed, config.split)
            texts = wordings[task] if condition == "other_wording" else own
            planned += [
                PlannedRollout(condition, task, seed, texts[seed % len(texts)], instructed)
                for seed in config.seeds[:count]
            ]
    return planned


def rollout_blocks(planned: Sequence[PlannedRollout], size: int = 4) -> list[list[PlannedRollout]]:
    """The plan cut into blocks for workers, ordered by task, so that a worker builds few environments."""
    groups: dict[str, dict[Condition, list[PlannedRollout]]] = {}
    for one in planned:
        groups.setdefault(one.task, {}).setdefault(one.condition, []).append(one)
    return [
        group[first : first + size]
        for conditions in groups.values()
        for group in conditions.values()
        for first in range(0, len(group), size)
    ]


def verdict(control: Condition, rollouts: Sequence[Rollout]) -> Verdict | None:
    """Compares `wrong_instruction`, `no_image` or `other_wording` with the policy on the same starts, and the
    first two with the no-op.

    | outcome | what is shown |
    |---|---|
    | falls to chance | below the score; not above the no-op, and less than `MARGIN` above it |
    | falls; not told apart from chance | below the score; about the no-op nothing is shown |
    | falls, but stays above chance | below the score and above the no-op |
    | falls | below the score; no no-op ran on these starts |
    | does not fall | the score is above the no-op; the control is not below the score, by `MARGIN` at most |
    | not resolved | none of these |

    Below and above: exact McNemar, p < .05. Less than `MARGIN`: the whole interval of `paired_interval`. The
    starts of the tasks are pooled; each task has the same number. None if the control did not run. With
    other wordings a success is no less of one: what is asked is whether the rate falls, and by how much.
    """
    success = {(r.condition, r.task, r.seed): r.success for r in rollouts}
    keys = [(r.task, r.seed) for r in rollouts if r.condition == control]
    keys = [key for key in keys if ("policy", *key) in success]
    if not keys:
        return None

    def pair(first: Condition, second: Condition, starts: Sequence[tuple[str, int]]) -> _Pair:
        return _Pair(*(np.array([success[one, *start] for start in starts]) for one in (first, second)))

    worded = control == "other_wording"
    idle = [] if worded else [key for key in keys if ("noop", *key) in success]
    fall = pair("policy", control, keys)
    left, score = (pair("noop", other, idle) if idle else None for other in (control, "policy"))
    tasks = tuple(dict.fromkeys(task for task, _ in keys))
    cause, sense = SENSES[control]
    starts, margin = f"n = {len(fall.first)}", f"{100 * MARGIN:.0f} points"
    no_evidence = f"this score is no evidence that the policy uses {sense}"
    outcome: Outcome = "not resolved"
    if worded:
        outcome, ending = _of_wording(fall)
    elif fall.below and left is None:
        outcome = "falls"
        ending = f"it falls, so the policy uses {sense}; without no-op rollouts chance is not known."
    elif fall.below and left is not None and left.above:
        outcome = "falls, but stays above chance"
        ending = f"it falls, but stays above chance (p = {left.p:.2g}): the policy uses {sense} in part."
    elif fall.below and left is not None and left.interval.high < MARGIN:
        outcome = "falls to chance"
        ending = f"it falls to chance, less than {margin} above it, so the policy acts on {sense}."
    elif fall.below and left is not None:
        outcome = "falls; not told apart from chance"
        ending = f"it falls; not told apart from chance (n = {len(left.first)}, at most "
        ending += f"{_points(left.interval.high)} above it), so the policy uses {sense}."
    elif fall.interval.low > -MARGIN and (fall.first.any() if score is None else score.above):
        outcome = "does not fall"
        ending = f"it does not fall by more than {margin}, so {no_evidence}."
    elif score is not None and not score.above:
        ending = f"not resolved, since the score itself is not told apart from chance ({starts})."
    else:
        ending = f"not resolved, since no fall is shown and one of {_points(-fall.interval.low)} is not "
        ending += f"ruled out ({starts}): {no_evidence}."
    chance = "" if left is None else f" (doing nothing: {_rate(left.first)})"
    names = " and ".join(filter(None, (", ".join(tasks[:-1]), tasks[-1])))
    names = f"{len(tasks)} tasks" if len(tasks) > 3 else names
    head = f"With {cause}, success on {names} goes from {_rate(fall.first)} to {_rate(fall.second)}"
    return Verdict(
        control=control,
        tasks=tasks,
        outcome=outcome,
        sentence=f"{head}{chance}: {ending}",
        normal=_count(fall.first),
        altered=_count(fall.second),
        chance=None if left is None else _count(left.first),
        p=fall.p,
        chance_p=None if left is None else left.p,
        fall=fall.interval,
        above_chance=None if left is None else left.interval,
    )


def _of_wording(fall: _Pair) -> tuple[Outcome, str]:
    low, high = fall.interval.low, fall.interval.high
    points = f"difference {100 * low:+.0f} to {100 * high:+.0f} points, 95 %"
    if fall.below:
        return "falls", f"it falls ({points}), so success depends on the wording."
    if low > -MARGIN and fall.first.any():
        return "does not fall", f"it does not fall by more than {100 * MARGIN:.0f} points ({points})."
    starts = f"n = {len(fall.first)}"
    return "not resolved", f"not resolved, since a fall of {_points(-low)} is not ruled out ({starts})."


class _Pair:
    """Two conditions on the same starts: McNemar's test and interval of second minus first."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        self.first, self.second = first, second
        self.p = mcnemar(first, second)
        self.interval = paired_interval(first, second)
        self.above = self.p < SIGNIFICANT and bool(second.sum() > first.sum())
        self.below = self.p < SIGNIFICANT and bool(second.sum() < first.sum())


def _points(difference: float) -> str:
    return f"{100 * difference:.0f} points"


def _count(bits: np.ndarray) -> tuple[int, int]:
    return int(bits.sum()), len(bits)


def _rate(bits: np.ndarray) -> str:
    k, n = _count(bits)
    return f"{k}/{n} [{wilson(k, n).percent()}]"
