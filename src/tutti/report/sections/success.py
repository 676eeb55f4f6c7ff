"""Success in the simulator: the headline, the success rate of each task, and the controls."""

from __future__ import annotations

from tutti.evaluation.closed_loop.results import EvaluationResult, Score, TaskScore
from tutti.evaluation.closed_loop.rollouts import Condition
from tutti.report.blocks import Charts, Note, Section
from tutti.report.formatting import percent
from tutti.report.inputs import Inputs, config_of
from tutti.report.svg.rows import Estimate, SuccessRow, success_chart
from tutti.report.tables import ABSENT, Cell, Column, table

CONDITIONS: dict[Condition, tuple[str, str]] = {
    "policy": ("policy", "With a held-out instruction of the task, on starts outside the training data."),
    "expert": ("expert", "The script that made the demonstrations, on the same starts: the ceiling."),
    "noop": ("no-op", "Zero actions on the same starts: the chance level."),
    "wrong_instruction": ("wrong instruction", "The policy with another task's text, on the same starts."),
    "no_image": ("no image", "The policy on the same starts with the vision tokens removed."),
}
MIN_RATE = 0.5  # a task below this rate gets a warning
RUN_EVALUATE = "Not run yet: `tutti evaluate` runs the policy in the simulator."
NOT_PLAYED = "Not run: evaluation.suite is none, so only the open-loop error was measured."
MEAN = "task mean"


def not_evaluated(inputs: Inputs) -> str:
    """Why there are no success rates."""
    return NOT_PLAYED if config_of(inputs, "evaluation").get("suite") == "none" else RUN_EVALUATE


def headline(inputs: Inputs) -> tuple[str, list[Note]]:
    """The result in one sentence, and a note for each control."""
    result = inputs.evaluation
    if result is None:
        return not_evaluated(inputs), []
    interval, rollouts = result.policy.interval, rollouts_of(result.policy)
    head = (
        f"The policy succeeds in {percent(result.policy.mean, 1)} of the rollouts, mean of "
        f"{len(result.policy.tasks)} tasks (95 % interval {interval.percent()}: {interval.rule}; {rollouts} "
        "rollouts on starts outside the training data)."
    )
    moods = {"falls to chance": "good", "does not fall": "bad"}
    notes = [Note(text=one.sentence, mood=moods.get(one.outcome, "")) for one in result.verdicts]
    if not any(one.control == "wrong_instruction" for one in result.verdicts):
        notes.append(
            Note(text="The wrong-instruction control was not run: nothing here shows that the text is used.")
        )
    return head, notes


def rollouts_of(score: Score) -> int:
    """The number of rollouts of a condition."""
    return sum(task.episodes for task in score.tasks)


def weak_tasks(result: EvaluationResult) -> list[str]:
    """A warning for each task under 50 %."""
    return [
        f"{one.task} succeeds in {one.successes}/{one.episodes} rollouts ({percent(one.rate)}), under 50 %."
        for one in result.policy.tasks
        if one.rate < MIN_RATE
    ]


def success_section(inputs: Inputs) -> Section:
    """A chart and a table of k/n with Wilson intervals, every control beside the policy."""
    result = inputs.evaluation
    if result is None:
        return Section(id="success", title="Success per task", missing=not_evaluated(inputs))
    policy = result.policy
    wrong, expert = (
        {task.task: task for task in result.scores[condition].tasks} if condition in result.scores else {}
        for condition in ("wrong_instruction", "expert")
    )
    rows = [
        SuccessRow(
            task=task.task,
            policy=_estimate(task),
            wrong=_estimate(wrong[task.task]) if task.task in wrong else None,
            expert=expert[task.task].rate if task.task in expert else None,
        )
        for task in policy.tasks
    ]
    low, high = policy.interval.low, policy.interval.high
    label = f"{percent(policy.mean, 1)}  [{policy.interval.percent()}]"
    mean = Estimate(rate=policy.mean, low=low, high=high, label=label)
    several = len(rows) > 1
    help = f"Points are success rates, bars their Wilson 95 % intervals ({MEAN}: {policy.interval.rule})."
    ran: list[Condition] = [condition for condition in CONDITIONS if condition in result.scores]
    columns: list[Column[str]] = [("task", "", str)]
    for condition in ran:
        cells = _cells(result.scores[condition], len(rows))
        columns.append((*CONDITIONS[condition], lambda task, cells=cells: cells.get(task, ABSENT)))
    rules = " or ".join(dict.fromkeys(result.scores[condition].interval.rule for condition in ran))
    caption = (
        f"k/n successes, with the Wilson 95 % interval; {MEAN} with a 95 % interval by {rules}. "
        "A dash: this control was not run on the task."
    )
    tasks = [row.task for row in rows]
    if several:
        rows.append(SuccessRow(task=MEAN, policy=mean, strong=True))
        tasks.append(MEAN)
    chart = success_chart("Success rate", rows, help)
    blocks = [Charts(charts=[chart]), table(tasks, columns, caption, last_is_total=several)]
    return Section(id="success", title="Success per task", lead=help, blocks=blocks)


def _estimate(task: TaskScore) -> Estimate:
    label = f"{task.successes}/{task.episodes}  [{task.interval.percent()}]"
    return Estimate(rate=task.rate, low=task.interval.low, high=task.interval.high, label=label)


def _cells(score: Score, num_tasks: int) -> dict[str, Cell]:
    """What a condition's column has for each task and for their mean."""
    cells = {
        task.task: Cell(
            text=f"{task.successes}/{task.episodes}",
            small=f"[{task.interval.percent()}]",
            mood="bad" if score.condition == "policy" and task.rate < MIN_RATE else "",
        )
        for task in score.tasks
    }
    ran = len(score.tasks)
    over = "" if ran == num_tasks else f" of {ran} task{'s' if ran > 1 else ''}"
    return cells | {MEAN: Cell(text=percent(score.mean, 1), small=f"[{score.interval.percent()}]{over}")}
