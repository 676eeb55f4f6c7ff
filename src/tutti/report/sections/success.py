"""What was measured in the simulator: the headline, success per task with its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutti.evaluation.statistics.intervals import Interval, mean_of_rates, wilson
from tutti.report.blocks import Block, Cell, Charts, Note, Section, Table
from tutti.report.formatting import NOTHING, percent
from tutti.report.inputs import Inputs, Json, config_of
from tutti.report.svg.rows import Estimate, SuccessRow, success_chart

CONDITIONS = {
    "policy": ("policy", "The policy with the task's own, held-out instruction, on starts it was not shown."),
    "expert": (
        "expert",
        "The scripted expert that made the demonstrations, on the same starts: the ceiling.",
    ),
    "noop": ("no-op", "Zero actions on the same starts: what physics gives for nothing, the chance level."),
    "wrong_instruction": (
        "wrong instruction",
        "The policy on the same starts, told another task's instruction.",
    ),
    "no_image": ("no image", "The policy on the same starts with the vision tokens removed."),
}
LEAST = 0.5  # a task below this rate gets a warning
RUN_EVALUATE = "Not run yet: `tutti evaluate` plays the policy in the simulator."
NOT_PLAYED = "Not played: evaluation.suite is none, so only the open-loop error was measured."

Count = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """results.json as the report needs it: (k, n) per condition and task, verdicts, protocol, seconds.

    `missing` is what is said where there is none.
    """

    counts: Mapping[str, Mapping[str, Count]]
    verdicts: tuple[Json, ...]
    protocol: Json
    seconds: float | None
    resumed: int
    missing: str = RUN_EVALUATE

    @property
    def policy(self) -> Mapping[str, Count]:
        """The score of the policy itself."""
        return self.counts.get("policy", {})

    def mean(self, condition: str = "policy") -> tuple[float, Interval, int] | None:
        """(task mean, its 95 % interval, rollouts), or None if the condition did not run."""
        counts = list(self.counts.get(condition, {}).values())
        if not counts:
            return None
        mean = sum(k / n for k, n in counts) / len(counts)
        return mean, mean_of_rates(counts), sum(n for _, n in counts)


def read_evaluation(inputs: Inputs) -> Evaluation:
    """From results.json, or from summary.json's `success` where there is no such file."""
    results = inputs.results or {}
    scores = results.get("scores")
    counts = {str(c): read_counts(v) for c, v in scores.items()} if isinstance(scores, dict) else {}
    counts = {condition: tasks for condition, tasks in counts.items() if tasks}
    summary = inputs.summary or {}
    if not counts.get("policy") and read_counts(summary.get("success")):
        controls = summary.get("controls")
        counts = {"policy": read_counts(summary["success"])} | {
            str(c): read_counts(v) for c, v in (controls.items() if isinstance(controls, dict) else ())
        }
    verdicts = results.get("verdicts")
    protocol = results.get("protocol")
    seconds = results.get("seconds")
    resumed = results.get("resumed")
    return Evaluation(
        counts=counts,
        verdicts=tuple(v for v in verdicts if isinstance(v, dict)) if isinstance(verdicts, list) else (),
        protocol=protocol if isinstance(protocol, dict) else {},
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        resumed=resumed if isinstance(resumed, int) else 0,
        missing=NOT_PLAYED if config_of(inputs, "evaluation").get("suite") == "none" else RUN_EVALUATE,
    )


def read_counts(score: Any) -> dict[str, Count]:
    """{task: (k, n)} of a score: `{"tasks": {...}}` or the mapping itself; values [k, n] or TaskScores."""
    if isinstance(score, dict) and isinstance(score.get("tasks"), dict | list):
        score = score["tasks"]
    if isinstance(score, list):
        score = {str(row.get("task")): row for row in score if isinstance(row, dict)}
    found: dict[str, Count] = {}
    for task, value in score.items() if isinstance(score, dict) else ():
        pair = [value.get(key) for key in ("successes", "episodes")] if isinstance(value, dict) else value
        match pair:
            case [int(k), int(n)] if 0 <= k <= n and n > 0:
                found[str(task)] = (k, n)
    return found


def estimate(k: int, n: int) -> Estimate:
    """The rate with its Wilson 95 % interval."""
    interval = wilson(k, n)
    return Estimate(
        rate=k / n,
        low=interval.low,
        high=interval.high,
        label=f"{k}/{n}  [{interval.percent()}]",
    )


def sentences(evaluation: Evaluation) -> tuple[str, list[Note]]:
    """The sentence of the result, and one for each control, in plain words."""
    mean = evaluation.mean()
    if mean is None:
        return evaluation.missing, []
    rate, interval, rollouts = mean
    head = (
        f"The policy succeeds in {percent(rate, 1)} of the rollouts, mean of {len(evaluation.policy)} tasks "
        f"(95 % interval {interval.percent()}: {interval.rule}; {rollouts} rollouts on "
        "starts it was not shown)."
    )
    moods = {"falls to chance": "good", "does not fall": "bad"}
    notes = [
        Note(text=str(v.get("sentence")), mood=moods.get(str(v.get("outcome")), ""))
        for v in evaluation.verdicts
        if v.get("sentence")
    ]
    if not any(v.get("control") == "wrong_instruction" for v in evaluation.verdicts):
        notes.append(
            Note(text="The wrong-instruction control was not run: nothing here shows that the text is used.")
        )
    return head, notes


def weak_tasks(evaluation: Evaluation) -> list[str]:
    """A warning for each task under 50 %."""
    return [
        f"{task} succeeds in {k}/{n} rollouts ({percent(k / n)}), under 50 %."
        for task, (k, n) in evaluation.policy.items()
        if k / n < LEAST
    ]


def success_section(evaluation: Evaluation) -> Section:
    """A chart and a table of k/n with Wilson intervals, every control beside the score."""
    tasks = list(evaluation.policy)
    if not tasks:
        return Section(id="success", title="Success per task", missing=evaluation.missing)
    wrong, expert = evaluation.counts.get("wrong_instruction", {}), evaluation.counts.get("expert", {})
    rows = [
        SuccessRow(
            task=task,
            policy=estimate(*evaluation.policy[task]),
            wrong=estimate(*wrong[task]) if task in wrong else None,
            expert=expert[task][0] / expert[task][1] if task in expert else None,
        )
        for task in tasks
    ]
    mean = evaluation.mean()
    if mean is not None and len(tasks) > 1:
        rate, interval, _ = mean
        label = f"{percent(rate, 1)}  [{interval.percent()}]"
        rows.append(
            SuccessRow(
                task="task mean",
                policy=Estimate(rate=rate, low=interval.low, high=interval.high, label=label),
                strong=True,
            )
        )
    rule = "" if mean is None else f" (task mean: {mean[1].rule})"
    help = f"Points are success rates, bars their Wilson 95 % intervals{rule}."
    blocks: list[Block] = [
        Charts(charts=[success_chart("Success rate", rows, help)]),
        _table(evaluation, tasks),
    ]
    return Section(id="success", title="Success per task", lead=help, blocks=blocks)


def _table(evaluation: Evaluation, tasks: Sequence[str]) -> Table:
    ran = [c for c in CONDITIONS if evaluation.counts.get(c)]
    ran += [c for c in evaluation.counts if c not in CONDITIONS and evaluation.counts[c]]
    heads = [("task", "")] + [CONDITIONS.get(c, (c.replace("_", " "), "")) for c in ran]
    rows = [
        [Cell(text=task), *(_rate_cell(evaluation.counts[c].get(task), c) for c in ran)] for task in tasks
    ]
    if len(tasks) > 1:
        rows.append([Cell(text="task mean"), *(_mean_cell(evaluation, c, len(tasks)) for c in ran)])
    rules = " or ".join(dict.fromkeys(m[1].rule for c in ran if (m := evaluation.mean(c)) is not None))
    caption = (
        f"k/n successes, with the Wilson 95 % interval; task mean with a 95 % interval by {rules}. "
        "A dash: this control was not run on the task."
    )
    return Table(heads=heads, rows=rows, caption=caption, last_is_total=len(tasks) > 1)


def _rate_cell(pair: Count | None, condition: str) -> Cell:
    if pair is None:
        return Cell(text=NOTHING, mood="quiet")
    interval = wilson(*pair)
    mood = "bad" if condition == "policy" and pair[0] / pair[1] < LEAST else ""
    return Cell(text=f"{pair[0]}/{pair[1]}", small=f"[{interval.percent()}]", mood=mood)


def _mean_cell(evaluation: Evaluation, condition: str, tasks: int) -> Cell:
    mean = evaluation.mean(condition)
    if mean is None:
        return Cell(text=NOTHING, mood="quiet")
    ran = len(evaluation.counts[condition])
    over = "" if ran == tasks else f" of {ran} task{'s' if ran > 1 else ''}"
    return Cell(text=percent(mean[0], 1), small=f"[{mean[1].percent()}]{over}")
