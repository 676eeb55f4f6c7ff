"""The controls beside a score, and what they say: does the policy listen, does it look, is the task possible.

| condition | who acts | what it is for |
|---|---|---|
| policy | the policy, its own instruction | the score |
| wrong_instruction | the policy, same starts, another task's text | who ignores the text scores as before |
| no_image | the policy, vision tokens removed by `image_mask` | blind baseline (black is a picture) |
| noop | zero actions | chance: what physics gives for nothing |
| expert | the scripted expert that made the demonstrations | ceiling |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutti.evaluation.config import EvaluationConfig
from tutti.evaluation.environments import EnvironmentFactory
from tutti.evaluation.rollouts import CONDITIONS, Condition, Rollout, Unit
from tutti.evaluation.statistics import mcnemar, wilson
from tutti.types import UserError

Outcome = Literal["falls to chance", "falls", "does not fall", "unresolved"]
Starts = dict[str, tuple[tuple[int, str], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a control says about the score, with the sentence for the report. k/n are over all its tasks."""

    control: Condition
    tasks: tuple[str, ...]
    outcome: Outcome
    sentence: str
    normal: tuple[int, int]
    altered: tuple[int, int]
    chance: tuple[int, int] | None
    p: float


def plan(config: EvaluationConfig, environments: EnvironmentFactory) -> dict[Condition, Starts]:
    """For each condition and task, the (seed, instruction) of every rollout.

    Start `seed` is told paraphrase number `seed mod count` of the split, so a text does not depend on how
    many rollouts are played. Every control uses the first starts of the score.

    Raises UserError for a task that the suite's words do not know.
    """
    tasks = environments.tasks if config.tasks == "suite" else config.tasks
    if len(set(tasks)) != len(tasks):
        raise UserError(f"evaluation.tasks names a task twice: {', '.join(tasks)}. Name each once.")
    controls = config.controls
    listed = controls.wrong_instruction_tasks
    swapped = tasks if listed == "all" else tuple(task for task in tasks if task in listed)
    counts: dict[Condition, dict[str, int]] = {
        "policy": dict.fromkeys(tasks, config.episodes),
        "wrong_instruction": dict.fromkeys(swapped, controls.wrong_instruction),
        "no_image": dict.fromkeys(tasks, controls.no_image),
        "noop": {
            task: max(controls.noop, controls.wrong_instruction if task in swapped else 0)
            if controls.noop
            else 0
            for task in tasks
        },
        "expert": dict.fromkeys(tasks, controls.expert),
    }
    planned: dict[Condition, Starts] = {}
    for condition in CONDITIONS:
        starts: Starts = {}
        for task, count in counts[condition].items():
            told = _partner(config, task) if condition == "wrong_instruction" and count else task
            if count:
                words = environments.instructions(told, config.split)
                starts[task] = tuple(
                    (s, words[s % len(words)]) for s in config.seeds[: min(count, config.episodes)]
                )
        if starts:
            planned[condition] = starts
    return planned


def units(planned: dict[Condition, Starts], block: int = 4) -> list[Unit]:
    """The plan cut into blocks for workers, task by task, so that a worker builds few environments."""
    tasks = list(planned["policy"])
    return [
        Unit(task=task, condition=condition, starts=starts[task][first : first + block])
        for task in tasks
        for condition, starts in planned.items()
        if task in starts
        for first in range(0, len(starts[task]), block)
    ]


def verdict(
    control: Condition, rollouts: Sequence[Rollout], tasks: Sequence[str] | None = None
) -> Verdict | None:
    """Holds `wrong_instruction` or `no_image` against the score and the no-op policy, on the same starts.

    With Wilson 95 % intervals over the pooled rollouts of the tasks (each has the same number of starts):

    * falls to chance: the control's interval overlaps the no-op's, and its upper bound is below the score's
      lower bound;
    * falls: only the latter;
    * does not fall: the score is above chance, and the control succeeds as often, or more often than chance
      without differing from the score (exact McNemar on the same starts, p >= .05);
    * unresolved: none of these, or the score itself is at chance.

    None if the control did not run.
    """
    found: dict[tuple[str, str, int], bool] = {(r.condition, r.task, r.seed): r.success for r in rollouts}
    keys = [
        (r.task, r.seed) for r in rollouts if r.condition == control and (tasks is None or r.task in tasks)
    ]
    keys = [key for key in keys if ("policy", *key) in found]
    if not keys:
        return None
    normal = np.array([found["policy", task, seed] for task, seed in keys])
    altered = np.array([found[control, task, seed] for task, seed in keys])
    idle = np.array(
        [found["noop", task, seed] for task, seed in keys if ("noop", task, seed) in found], dtype=bool
    )
    return _judge(control, tuple(dict.fromkeys(task for task, _ in keys)), normal, altered, idle)


def _judge(
    control: Condition, tasks: tuple[str, ...], normal: np.ndarray, altered: np.ndarray, idle: np.ndarray
) -> Verdict:
    n = len(normal)
    score, changed = wilson(int(normal.sum()), n), wilson(int(altered.sum()), n)
    chance = wilson(int(idle.sum()), len(idle)) if len(idle) else None
    p = mcnemar(normal, altered)
    outcome: Outcome
    if changed.high < score.low:
        outcome = "falls to chance" if chance is not None and changed.overlaps(chance) else "falls"
    elif not normal.any() or (chance is not None and score.overlaps(chance)):
        outcome = "unresolved"  # a score that is itself at chance cannot fall
    elif altered.sum() >= normal.sum() or (p >= 0.05 and chance is not None and changed.low > chance.high):
        outcome = "does not fall"
    else:
        outcome = "unresolved"
    idle_count = (int(idle.sum()), len(idle)) if len(idle) else None
    text = _sentence(control, tasks, outcome, normal=normal, altered=altered, idle=idle)
    return Verdict(
        control=control,
        tasks=tasks,
        outcome=outcome,
        sentence=text,
        normal=(int(normal.sum()), n),
        altered=(int(altered.sum()), n),
        chance=idle_count,
        p=p,
    )


def _sentence(
    control: Condition,
    tasks: tuple[str, ...],
    outcome: Outcome,
    *,
    normal: np.ndarray,
    altered: np.ndarray,
    idle: np.ndarray,
) -> str:
    """One plain sentence with the numbers behind it."""
    cause, sense = (
        ("the wrong instruction", "the text")
        if control == "wrong_instruction"
        else ("no image", "the picture")
    )
    chance = f" (doing nothing: {_rate(idle)})" if len(idle) else ""
    head = f"With {cause}, success on {_names(tasks)} goes from {_rate(normal)} to {_rate(altered)}{chance}: "
    endings: dict[Outcome, str] = {
        "falls to chance": f"it falls to chance, so the policy acts on {sense}.",
        "falls": f"it falls, but not down to chance: the policy uses {sense} in part.",
        "does not fall": f"it does not fall, so this score is no evidence that the policy uses {sense}.",
        "unresolved": f"too few rollouts, or too low a score, to say whether the policy uses {sense}.",
    }
    return head + endings[outcome]


def _names(tasks: tuple[str, ...]) -> str:
    if len(tasks) > 3:
        return f"{len(tasks)} tasks"
    return " and ".join([", ".join(tasks[:-1]), *tasks[-1:]] if tasks[1:] else tasks)


def _rate(bits: np.ndarray) -> str:
    k, n = int(bits.sum()), len(bits)
    return f"{k}/{n} [{wilson(k, n).percent()}]"


def _partner(config: EvaluationConfig, task: str) -> str:
    try:
        return config.controls.partners[task]
    except KeyError:
        raise UserError(
            f"evaluation.controls.partners has no entry for {task!r}: the control lacks a text. "
            f"Add one (evaluation.controls.partners: {{{task}: another-task}}) or take the task out of "
            "evaluation.controls.wrong_instruction_tasks."
        ) from None
