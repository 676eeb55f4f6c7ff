"""The evaluation in the simulator: headline, success of each task beside the controls, videos, protocol."""

from __future__ import annotations

from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

from tutti.data.formats.lerobot import VIEW
from tutti.evaluation.closed_loop.results import (
    ONE_TRAINING,
    EvaluationResult,
    Score,
    TaskScore,
    blind_note,
    goals_note,
)
from tutti.evaluation.closed_loop.rollouts import Condition
from tutti.report.blocks import (
    ABSENT,
    Block,
    Cell,
    Charts,
    Code,
    Column,
    Facts,
    Note,
    Section,
    Video,
    Videos,
    data_address,
    table,
)
from tutti.report.formatting import WORDS, anything, percent, plain, words
from tutti.report.inputs import VIDEOS, Inputs, Json, VideoEntry, config_value, own_bytes
from tutti.report.svg.drawing import Chart, Scale, line
from tutti.report.svg.rows import WIDTH, Row, row_chart, whisker
from tutti.types import UserError

CONDITIONS: dict[Condition, list[str]] = WORDS["conditions"]
MAX_VIDEO_BYTES = 4_500_000  # of base64; with the rest the page stays below 6 MB
MIN_RATE = 0.5  # a task below this rate gets a warning
MEAN = "task mean"


def not_evaluated(inputs: Inputs) -> str:
    """Why there are no success rates."""
    if config_value(inputs.config, "evaluation", "suite") == "none":
        return "Not run: evaluation.suite is none, so only the open-loop error was measured."
    return "Not run yet: `tutti evaluate` runs the policy in the simulator."


def headline(inputs: Inputs) -> tuple[str, list[Note]]:
    """The result in one sentence, and a note for each control."""
    result = inputs.evaluation
    if result is None:
        return not_evaluated(inputs), []
    policy, interval = result.policy, result.policy.interval
    head = (
        f"The policy succeeds in {percent(policy.mean, 1)} of the rollouts, mean of "
        f"{len(policy.tasks)} tasks (95 % interval {interval.percent()}: {interval.rule}; "
        f"{rollouts_of(policy)} rollouts on starts outside the training data; {ONE_TRAINING})."
    )
    moods = {"falls to chance": "good", "does not fall": "bad"}
    worded = {"falls": "bad", "does not fall": "good"}
    notes = [
        Note(text=v.sentence, mood=(worded if v.control == "other_wording" else moods).get(v.outcome, ""))
        for v in result.verdicts
    ]
    if goals := goals_note(result.scores):
        notes.append(Note(text=goals))
    if blind := blind_note(result.solved_without_pictures):
        notes.append(Note(text=blind, mood="bad"))
    if not any(one.control == "wrong_instruction" for one in result.verdicts):
        missing = "The wrong-instruction control was not run: nothing here shows that the text is used."
        notes.append(Note(text=missing))
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
    others = [_others(inputs)] if inputs.other_evaluations else []
    if result is None:
        return Section(missing=not_evaluated(inputs), blocks=others)
    ran: dict[Condition, Score] = {name: result.scores[name] for name in CONDITIONS if name in result.scores}
    tasks = [task.task for task in result.policy.tasks]
    blind = dict.fromkeys(result.solved_without_pictures, "solved without pictures")
    columns: list[Column[str]] = [("task", "", lambda task: Cell(text=task, small=blind.get(task, "")))]
    for condition, score in ran.items():
        cells = _cells(score, len(tasks))
        name, help = CONDITIONS[condition]
        columns.append((name, help, lambda task, cells=cells: cells.get(task, ABSENT)))
    rules = " or ".join(dict.fromkeys(score.interval.rule for score in ran.values()))
    caption = (
        f"k/n successes, with the Wilson 95 % interval; {MEAN} with a 95 % interval by {rules}. "
        "A dash: this control was not run on the task."
    )
    several = len(tasks) > 1
    rule = result.policy.interval.rule
    help = f"Points are success rates, bars their Wilson 95 % intervals ({MEAN}: {rule})."
    rows = table([*tasks, MEAN] if several else tasks, columns, caption, last_is_total=several)
    return Section(lead=help, blocks=[Charts(charts=[_success_chart(result, help)]), rows, *others])


def _others(inputs: Inputs) -> Block:
    """The run's evaluations under other names."""
    of, words_of = inputs.other_evaluations, WORDS["values"]["split"]
    columns: list[Column[str]] = [
        ("evaluation", "", str),
        ("task-mean success", "", lambda name: _mean_cell(of[name].policy)),
        ("policy", "", lambda name: of[name].protocol.policy),
        ("suite", "", lambda name: of[name].protocol.suite),
        ("seeds", "", lambda name: f"{of[name].protocol.seed_first} to {of[name].protocol.seed_last}"),
        ("instructions", "", lambda name: words_of.get(of[name].protocol.split, of[name].protocol.split)),
    ]
    return table(of, columns, "Other evaluations of this run, by name (tutti evaluate RUN --name NAME).")


def _mean_cell(score: Score, over: str = "") -> Cell:
    return Cell(text=percent(score.mean, 1), small=f"[{score.interval.percent()}]{over}")


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
    return cells | {MEAN: _mean_cell(score, over)}


def _success_chart(result: EvaluationResult, help: str) -> Chart:
    """Point and interval of each task, its wrong-instruction control below, the expert as a tick."""
    policy = result.policy
    controls: dict[str, dict[str, TaskScore]] = {
        condition: {task.task: task for task in score.tasks} for condition, score in result.scores.items()
    }
    wrong, expert = (controls.get(condition, {}) for condition in ("wrong_instruction", "expert"))

    def draw(across: Scale) -> list[Row]:
        rows: list[Row] = []
        for task in policy.tasks:
            marks, tips = "", [f"policy {_words(task)}"]
            if (ceiling := expert.get(task.task)) is not None:
                x = across.pixel(ceiling.rate)
                marks += line("ceiling", (x, -11), (x, 11))
                tips.append(f"expert {percent(ceiling.rate)}")
            if (control := wrong.get(task.task)) is not None:
                marks += whisker("c2 hollow", across, _bounds(control), (6, 4))
                tips.append(f"wrong instruction {_words(control)}")
            marks += whisker("c1", across, _bounds(task), (0 if control is None else -5, 5.5))
            rows.append(Row(task.task, _words(task), tips, marks))
        if len(rows) > 1:
            label = f"{percent(policy.mean, 1)}  [{policy.interval.percent()}]"
            bounds = (policy.interval.low, policy.interval.high, policy.mean)
            mark = whisker("c1 strong", across, bounds, (0, 5.5))
            rows.append(Row(MEAN, label, [f"policy {label}"], mark, strong=True))
        return rows

    legend = [("policy", "c1", "points")]
    legend += [("wrong instruction", "c2", "hollow")] if wrong else []
    legend += [("expert's ceiling", "grey", "tick")] if expert else []
    ticks = [("grid", tick, percent(tick)) for tick in (0, 0.25, 0.5, 0.75, 1)]
    title, axis = "Success rate", "success rate"
    across = Scale(low=0, high=1, start=150, end=WIDTH - 170)
    return row_chart(title, draw, across, 34, ticks=ticks, axis=axis, legend=legend, help=help)


def _words(task: TaskScore) -> str:
    return f"{task.successes}/{task.episodes}  [{task.interval.percent()}]"


def _bounds(task: TaskScore) -> tuple[float, float, float]:
    return task.interval.low, task.interval.high, task.rate


def videos_section(inputs: Inputs, budget: int = MAX_VIDEO_BYTES) -> Section:
    """Each task's videos, as many as fit in `budget` bytes of page, one of each task first."""
    if not inputs.videos:
        missing = "No videos yet: `tutti evaluate` records some of each task (evaluation.videos_per_task)."
        return Section(missing=missing)
    tasks: dict[str, list[VideoEntry]] = {}
    for entry in inputs.videos:
        tasks.setdefault(entry.task, []).append(entry)
    videos: dict[str, list[Video]] = {task: [] for task in tasks}
    for turn in zip_longest(*tasks.values()):
        for entry in filter(None, turn):
            source, why = _embed(inputs.folder, entry.file, budget)
            budget -= len(source)
            texts = {"label": _label(entry), "instruction": entry.instruction, "source": source, "why": why}
            videos[entry.task].append(Video(success=entry.success, **texts))
    groups = [(task, sorted(some, key=lambda video: video.success)) for task, some in videos.items()]
    wins = sum(entry.success for entry in inputs.videos)
    lead = (
        f"{wins} of the evaluation's rollouts that succeed and {len(inputs.videos) - wins} that fail, chosen "
        "to show both: not a sample to read a rate from. A video plays while it is visible."
    )
    return Section(lead=lead, blocks=[Videos(groups=groups)])


def _label(entry: VideoEntry) -> str:
    parts = [
        f"seed {entry.seed}" if entry.seed is not None else "",
        f"{entry.decisions} control steps" if entry.decisions is not None else "",
        CONDITIONS[entry.condition][0] if entry.condition != "policy" else "",
    ]
    return ", ".join(part for part in parts if part)


def _embed(run: Path, file: str, budget: int) -> tuple[str, str]:
    """(data address, "") or ("", why not). Only files inside the videos folder are read."""
    folder = run / VIDEOS
    path = folder / Path(file).name
    if not file or not path.is_file():
        return "", f"{file or 'the file'} is missing"
    if 4 * path.stat().st_size / 3 + 64 > budget:
        return "", f"not embedded, the page would be too large: see {VIDEOS}/{path.name}"
    try:
        return data_address("video/mp4", own_bytes(path, folder, budget)), ""
    except UserError as error:
        return "", f"{VIDEOS}/{error}"


def protocol_section(inputs: Inputs) -> Section:
    """The protocol of the evaluation, so that another can be compared with it."""
    if inputs.evaluation is None:
        return Section(missing=not_evaluated(inputs))
    protocol: Json = asdict(inputs.evaluation.protocol) | {"rollouts_kept": inputs.evaluation.resumed}
    environment = protocol.pop("environment")
    seeds = f"{protocol.pop('seed_first')} to {protocol.pop('seed_last')}"
    pairs = [(words(key), _value(key, value)) for key, value in protocol.items()]
    pairs.append(("seeds of the starts", seeds))
    # What the evaluation's own record does not say.
    names = [row.name for row in inputs.model.tokens] if inputs.model is not None else []
    views = [name.removeprefix(f"vision: {VIEW}") for name in names if name.startswith("vision: ")]
    if views:
        pairs.append(("views", ", ".join(views)))
    timed = [one for one in config_value(inputs.data, "sources") or () if config_value(one, "seconds")]
    if timed:  # all have one rate; pictures with texts have none
        pairs.append(
            ("control rate", f"{plain(timed[0]['frames'] / timed[0]['seconds'])} actions per second")
        )
    blocks: list[Block] = [Facts(pairs=pairs), Code(title="Fingerprint of the simulator", text=environment)]
    blocks += [Note(text=note) for note in inputs.evaluation.notes()[:2]]
    lead = "A rollout ends at its first success. Every control uses the same starts."
    return Section(lead=lead, blocks=blocks)


def _value(key: str, value: object) -> str:
    return WORDS["values"].get(key, {}).get(str(value), anything(value))
