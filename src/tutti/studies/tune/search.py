"""Searches the keys of a config with Optuna, and confirms the best trials against the default.

RUN/tune/NAME/
  cell.yaml, search.json   what the processes read     optuna.db      Optuna's storage, unless named
  trials/                  a training for each trial    worker-HOST-N/  a process's log
  results.json             every trial, the cost        report.html    curves, parallel coordinates
  confirm/                 the study of the best: its own report.html and results
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from tutti.config.run_config import RunConfig, build_config
from tutti.evaluation.closed_loop.starts import check_seeds
from tutti.runs.build import build_data, require_data, suite_of, training_starts, with_sources
from tutti.runs.provenance import circumstances
from tutti.runs.terminal import print_line, print_table, progress_bar
from tutti.storage.files import discard, exclusive_lock, explain_full_disk, write_json
from tutti.storage.reading import read_json
from tutti.studies.cells import data_fingerprint
from tutti.studies.compare import compare
from tutti.studies.config import BudgetConfig, StudyConfig
from tutti.studies.pool import Work, number_of_jobs, own_command, run_cells
from tutti.studies.scores import in_words
from tutti.studies.tables import p_text
from tutti.studies.tune.found import Found, Tried, rows_of
from tutti.studies.tune.search_page import write_page
from tutti.studies.tune.space import DEFAULT, ConfirmConfig, SpaceConfig
from tutti.studies.tune.trial import (
    CONTROL,
    FOLDER,
    OVERRIDES,
    REFUSED,
    SCORES,
    SECONDS,
    STEPS,
    SUCCESS,
    Search,
)
from tutti.studies.tune.worker import DONE, Worker, begin, finished, in_turn, lives
from tutti.types import UserError

CONFIRM, RESULTS = "confirm", "results.json"
BUSY = "another process confirms the best trials; waiting for it"
Command = Callable[[Worker], list[str]]


def search_keys(
    config: RunConfig,
    space: SpaceConfig,
    folder: Path | None = None,
    *,
    storage: str = "",
    command: Command = lambda worker: own_command(worker, "tutti.studies.tune.worker"),
) -> Found:
    """Makes the trials that are missing, then the confirmation, and writes results.json and report.html.

    `folder` is the run's; `storage` an Optuna URL that several machines share, or journal:FILE, or empty for
    a file of SQLite. Run again, it goes on. Raises: UserError for a space that does not fit the config, or
    processes that failed.
    """
    folder = folder or Path("runs") / config.name
    home = (folder / "tune" / space.name).absolute()
    require_data(config, folder)
    config = _with_data(config, folder)
    made = Search(config=config, space=space, home=home, data=data_fingerprint(config.data.sources))
    check(made)
    if made.plays:
        suite_of(config).check_rendering()  # before hours of training
    data = build_data(made.config, folder, made.config.objective.needs())  # decodes once, before all others
    data.train.close()
    if not len(data.validation.rows):
        raise UserError(
            "There are no held-out episodes to judge a trial by: data.validation_fraction is "
            f"{config.data.validation_fraction:g}. Set data.validation_fraction=0.05"
        )
    storage = storage or f"sqlite:///{home / 'optuna.db'}"
    with explain_full_disk(home, "the search"):
        study, back = begin(made, storage)
        if back:
            print_line(f"{back} trials that were interrupted or killed go on from their checkpoints")
        _run(made, study, command)
        left = space.trials - finished(study)
        found = _publish(made, study)
        if left > 0:
            print_line(f"{left} trials run elsewhere; the last to end confirms. If killed, run this again.")
        elif space.confirm != "off" and made.plays and found.best(1):
            with exclusive_lock(home, waiting=lambda: print_line(BUSY)):
                verdicts = _confirm(made, collect(made, study), space.confirm)
            found = _publish(made, study, verdicts)
    return found


def check(made: Search) -> None:
    """Raises: UserError where the space does not fit the config, or starts are used twice."""
    made.rungs  # noqa: B018
    for name, overrides in made.space.all_controls.items():
        try:
            made.trial_config(list(overrides))
        except UserError as error:
            raise UserError(f"controls.{name}: {error}") from None
    for key, one in made.space.parameters.items():
        for value in one.choices or (one.low, one.high):
            holds = [f"{other}={json.dumps(wanted)}" for other, wanted in one.when.items()]
            try:
                made.trial_config([*holds, f"{key}={json.dumps(value)}"])
            except UserError as error:
                if "is not a key" in str(error):
                    raise UserError(f"parameters.{key}: {error}") from None
    if not made.plays:
        return
    trials, starts = made.trial_config([]).evaluation, training_starts(made.config, made.home)
    check_seeds(trials, starts)
    if made.space.confirm != "off":
        final = build_config(_confirming(made, made.space.confirm), "confirm.evaluation").evaluation
        check_seeds(final, starts, "confirm.evaluation.first_seed")
        if {*trials.seeds} & {*final.seeds}:
            raise UserError(
                f"the search plays starts {trials.seeds[0]} to {trials.seeds[-1]}, the confirmation "
                f"{final.seeds[0]} to {final.seeds[-1]}: what was chosen on a start is not judged on it. Set "
                "evaluation.first_seed of the space, or confirm.evaluation.first_seed."
            )


def collect(made: Search, study: optuna.Study) -> Found:
    """All trials that count, the best first."""
    tried: list[Tried] = []
    charged: dict[str, tuple[int, float]] = {}  # what is trained in a folder counts once
    for trial in study.get_trials(deepcopy=False, states=DONE):
        told, place = trial.user_attrs, made.space.reduction
        of_rung = {place**number: steps for number, steps in enumerate(made.rungs)}
        rungs = {of_rung[at]: float(value) for at, value in trial.intermediate_values.items()}
        whole = trial.state == TrialState.COMPLETE
        spent = int(told.get(STEPS, 0)), float(told.get(SECONDS, 0.0))
        before = charged.get(told.get(FOLDER, ""), (0, 0.0))
        steps, seconds = (max(now - then, 0) for now, then in zip(spent, before, strict=True))
        charged[told.get(FOLDER, "")] = max(spent[0], before[0]), max(spent[1], before[1])
        tried.append(
            Tried(
                number=trial.number,
                control=told.get(CONTROL, ""),
                overrides=tuple(told.get(OVERRIDES, ())),
                params=dict(trial.params),
                rungs=rungs,
                errors=told.get(SCORES, {}),
                success=tuple(told[SUCCESS]) if SUCCESS in told else None,
                value=trial.value if whole else None,
                steps=int(steps),
                seconds=float(seconds),
                refused=told.get(REFUSED, ""),
            )
        )

    def rank(one: Tried) -> tuple[float, ...]:
        top = max(one.rungs, default=0)
        best = one.rungs.get(top, float("nan"))
        best = best if math.isfinite(best) else float("-inf")
        return (-float(top), 0.0 if one.value is None else -one.value, -best, float(one.number))

    tried.sort(key=lambda one: (float(one.value is None), *rank(one)))
    return Found(
        name=made.space.name,
        whole_steps=made.config.training.steps,
        plays=made.plays,
        trials=tuple(tried),
    )


def _run(made: Search, study: optuna.Study, command: Command) -> None:
    left = made.space.trials - finished(study)
    if left <= 0:
        print_line(f"{finished(study)} trials found, none to do")
        return
    jobs = number_of_jobs(made.space.jobs, left)
    print_line(f"{finished(study)} trials found, {left} to do, {jobs} at a time, one thread each")
    steps = -(-left * made.config.training.steps // jobs)
    work = {}
    stem = "-".join(filter(None, ("worker", socket.gethostname(), os.environ.get("SLURM_ARRAY_TASK_ID"))))
    workers = (Worker(folder=made.home / f"{stem}-{number}", number=number) for number in count())
    with in_turn(made.home):  # another start on this machine has workers of its own
        for worker in islice((one for one in workers if not lives(one.folder)), jobs):
            for name in ("result.json", "records.jsonl"):
                discard(worker.folder / name)
            work[worker] = Work(steps=steps, rollouts=0)
    with progress_bar("searching, steps at most") as bar:
        failed = run_cells(work, jobs, bar, command=command)
    if failed:
        raise UserError("\n\n".join([*failed, "Run the same command again: finished trials are kept."]))


def _confirming(made: Search, confirm: ConfirmConfig) -> dict[str, Any]:
    values = made.config.model_dump(mode="json")
    values["evaluation"] |= confirm.evaluation
    return values | {"logging": []}


def _confirm(made: Search, found: Found, confirm: ConfirmConfig) -> dict[str, Any]:
    """Retrains the best and the default from seeds that the search did not use, at an equal budget. Gives
    the verdict on each."""
    arms = {f"best-{place}": one.overrides for place, one in enumerate(found.best(confirm.best), start=1)}
    first = made.config.seed + 1
    study = StudyConfig(
        name=f"{found.name}-confirm",
        base=_confirming(made, confirm),
        arms={DEFAULT: (), **arms},
        baseline=DEFAULT,
        comparisons=tuple(f"{arm} - {DEFAULT}" for arm in arms),
        seeds=tuple(range(first, first + confirm.seeds)),
        budget=BudgetConfig(kind=confirm.budget),
        evaluation=confirm.evaluation,
        jobs=made.space.jobs,
    )
    compare(study, made.home / CONFIRM)
    results = read_json(made.home / CONFIRM / "results.json")
    verdicts: dict[str, Any] = {}
    for one in results["contrasts"]:
        if one["exploratory"]:
            continue
        difference, seeds = one["found"]["difference"], one["found"]["over_seeds"]
        low, high = (100 * difference["interval"][end] for end in ("low", "high"))
        wide = f", t over seeds {100 * seeds['low']:+.1f} to {100 * seeds['high']:+.1f}" if seeds else ""
        verdict = in_words(one["found"]["verdict"], one["adjusted_p"])
        text = (
            f"{verdict}: {100 * difference['value']:+.1f} points against the default "
            f"(bootstrap {low:+.1f} to {high:+.1f}{wide}; p after Holm {p_text(one['adjusted_p'])}; "
            f"{confirm.seeds} fresh seeds, equal {confirm.budget})"
        )
        verdicts[one["name"].partition(" - ")[0]] = one["found"] | {"verdict": verdict, "text": text}
    return verdicts


def _publish(made: Search, study: optuna.Study, verdicts: dict[str, Any] | None = None) -> Found:
    """Writes and shows what has been found so far; nothing where others make the first trials."""
    made_with = circumstances()
    with in_turn(made.home):
        found = replace(collect(made, study), verdicts=verdicts or {})
        if not found.trials:
            return found
        write_json(made.home / RESULTS, asdict(found) | {"cost": found.cost, "made": made_with})
        write_page(made, found, made_with, made.home / "report.html")
    print_table(
        f"Search {found.name}: the first trials", ("trial", "value", "steps", "changes"), rows_of(found)
    )
    for line in found.sentences:
        print_line(line)
    print_line(f"Report: {made.home / 'report.html'}")
    return found


def _with_data(config: RunConfig, folder: Path) -> RunConfig:
    """The config that names its data by whole paths."""
    sources: Sequence[Any] = with_sources(config, folder).sources
    values = config.model_dump(mode="json")
    values["data"]["sources"] = [
        one.model_dump(mode="json") | {"path": str(one.path.resolve())} for one in sources
    ]
    return build_config(values, "the config")
