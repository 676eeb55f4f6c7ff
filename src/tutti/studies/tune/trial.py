"""A trial of a search: it is trained from rung to rung, judged on held-out episodes, played at the top."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from pydantic import TypeAdapter

from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config, with_overrides
from tutti.evaluation.closed_loop.results import EvaluationResult
from tutti.evaluation.config import NO_SUITE
from tutti.evaluation.folder import RESULTS
from tutti.evaluation.open_loop import measure_open_loop
from tutti.nested_dicts import content_hash
from tutti.runs.build import BuiltTraining, build_training
from tutti.runs.terminal import print_line
from tutti.serving.policy import find_checkpoint
from tutti.storage.files import discard, exclusive_lock, write_json
from tutti.storage.reading import read_json
from tutti.studies.cells import CHECKPOINT_EVERY, NO_CONTROLS, data_fingerprint, training_hash, tried
from tutti.studies.tune.space import EXECUTED, SpaceConfig
from tutti.training.faults.non_finite import NonFiniteError
from tutti.types import UserError

TRIALS, RUNGS, PLAYED = "trials", "rungs.json", Path("evaluation", RESULTS)
"""In a search's folder, and in that of a trial."""
CONTROL, OVERRIDES, STEPS, SECONDS = "control", "overrides", "steps", "seconds"
"""Attributes of a trial: its control's name, what it changes, and what it cost."""
FOLDER, REFUSED, SUCCESS, SCORES = "folder", "refused", "success", "scores"
_SCORES = TypeAdapter(dict[int, dict[str, float]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What all trials share: `config` names its data, of which `data` is a hash; trials lie in
    `home`/trials."""

    config: RunConfig
    space: SpaceConfig
    home: Path
    data: str = ""

    @property
    def rungs(self) -> list[int]:
        """Steps of each rung."""
        return self.space.rung_steps(self.config.training.steps)

    @property
    def plays(self) -> bool:
        """Whether there is a simulator for the top rung."""
        return self.config.evaluation.suite != NO_SUITE

    @property
    def key(self) -> str:
        """A hash of all that trials depend on; a search with another one has trials of its own."""
        own = self.space.model_dump(mode="json", exclude={"trials", "jobs", "confirm", "name"})
        return content_hash([own, training_hash(self.config, self.data or self.home.name)], 10)

    def folder_of(self, config: RunConfig) -> Path:
        """Of a trial: its name has a hash of all that is measured there, so that two trials of one config
        share it and nobody else."""
        judged = [self.rungs, sorted(self.space.score), config.evaluation.model_dump(mode="json")]
        name = content_hash([training_hash(config, self.data or self.home.name), judged], 10)
        return self.home / TRIALS / name

    def trial_config(self, overrides: list[str]) -> RunConfig:
        """The config of a trial. Raises: UserError where its values do not go together."""
        values = with_overrides(self.config, overrides, "the config").model_dump(mode="json")
        # None at a rung: killed while it is judged there, a trial would go on behind it, never judged.
        fits = (n for n in range(CHECKPOINT_EVERY, 0, -1) if all(rung % n for rung in self.rungs[:-1]))
        values["training"] = tried(values["training"], validate=0, save=next(fits))
        alone = {"controls": NO_CONTROLS, "videos_per_task": 0, "workers": 1, "checkpoint": "latest"}
        values["evaluation"] |= alone | self.space.evaluation
        return build_config(values | {"logging": []}, "the trial")


def suggested(trial: optuna.Trial, space: SpaceConfig) -> list[str]:
    """The overrides that the sampler proposes, those with `when` only where it holds."""
    values: dict[str, Any] = {}
    for key, one in space.parameters.items():
        if any(values.get(other) != wanted for other, wanted in one.when.items()):
            continue
        if one.choices:
            values[key] = json.loads(trial.suggest_categorical(key, one.labels))
        elif one.low is not None and one.high is not None:
            if one.integer:
                values[key] = trial.suggest_int(key, round(one.low), round(one.high), log=one.log)
            else:
                rounded = float(f"{trial.suggest_float(key, one.low, one.high, log=one.log):.4g}")
                values[key] = min(max(rounded, one.low), one.high)
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def run_trial(trial: optuna.Trial, search: Search) -> float:
    """Success where the top rung is played, else minus the error there; more is better.

    What has ended leaves no checkpoint. Raises: optuna.TrialPruned for a trial that its rung ends, that
    diverges, or whose values do not go together, which its attribute `refused` says; UserError for what no
    trial can help, such as a full disk.
    """
    control = trial.user_attrs.get(CONTROL)
    overrides = list(search.space.all_controls[control]) if control else suggested(trial, search.space)
    trial.set_user_attr(OVERRIDES, overrides)
    with _refusing(trial, search):
        config = search.trial_config(overrides)
    folder = search.folder_of(config)
    trial.set_user_attr(FOLDER, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    others = f"trial {trial.number} waits for another one with the same values, whose results it takes"
    with exclusive_lock(folder, waiting=lambda: print_line(others)):
        value = _judge(trial, search, config, folder)
        discard(folder / "checkpoints")
    if value is None:
        raise optuna.TrialPruned
    return value


@contextmanager
def _refusing(trial: optuna.Trial, search: Search) -> Iterator[None]:
    """Ends a trial whose values do not go together. A fault of the disk, or of data that have changed, says
    nothing about the values: it is raised as it is."""
    try:
        yield
    except UserError as error:
        disk = getattr(error.__cause__, "errno", None)
        if disk or (search.data and data_fingerprint(search.config.data.sources) != search.data):
            raise
        trial.set_user_attr(REFUSED, str(error)[:500])
        raise optuna.TrialPruned from error


def _judge(trial: optuna.Trial, search: Search, config: RunConfig, folder: Path) -> float | None:
    """The value; None for a trial that ended early."""
    scores, last = _train(trial, search, config, folder), search.rungs[-1]
    if last not in scores or not math.isfinite(score_of(scores[last], search.space.score)):
        return None
    if not search.plays:
        return -score_of(scores[last], search.space.score)
    if not (results := folder / PLAYED).is_file():
        place = folder / PLAYED.parent
        pipeline.evaluate(find_checkpoint(folder), config.evaluation, to=place, trust_code=config.classes)
    played = EvaluationResult.from_dict(read_json(results)).policy
    counts = [played.counts[task] for task in played.counts]
    trial.set_user_attr(SUCCESS, [sum(column) for column in zip(*counts, strict=True)])
    return float(played.mean)


def score_of(found: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum of the held-out errors.

    Raises: UserError where a trial has none of this name: it cannot be compared with the others.
    """
    if missing := [name for name in weights if name not in found]:
        raise UserError(
            f"score: {', '.join(missing)} is not measured in this trial; there are {', '.join(found)}. "
            f"Score by what every trial has, such as {EXECUTED}."
        )
    return sum(weight * found[name] for name, weight in weights.items())


def _train(
    trial: optuna.Trial, search: Search, config: RunConfig, folder: Path
) -> dict[int, dict[str, float]]:
    """Trains on from where the folder is, up to the rung at which the trial ends. Gives the errors of each
    rung that it came to; what another trial in this folder has measured is not trained or measured again."""
    path, rungs, seen = folder / RUNGS, search.rungs, dict[int, dict[str, float]]()
    scores = _SCORES.validate_python(read_json(path) if path.is_file() else {})
    whole = rungs[-1] in scores and (not search.plays or (folder / PLAYED).is_file())
    with _refusing(trial, search):
        training = None if whole else build_training(config, folder)

    def judge(step: int) -> None:
        if step not in scores:
            assert training is not None
            scores[step] = held_out_errors(training, search.space.score)
            write_json(path, scores)
        with _refusing(trial, search):
            error = score_of(scores[step], search.space.score)
        seen[step] = scores[step]
        trial.set_user_attr(SCORES, {str(at): one for at, one in seen.items()})
        # Optuna's rungs are powers of the reduction: the place of a rung stands for its steps.
        trial.report(-error, search.space.reduction ** rungs.index(step))
        if not math.isfinite(error) or (step != rungs[-1] and trial.should_prune()):
            raise optuna.TrialPruned

    def at_rung(step: int, steps: int, latest: dict[str, float]) -> None:
        if step in rungs[:-1]:
            judge(step)

    with suppress(optuna.TrialPruned, NonFiniteError):
        for step in sorted(scores):
            judge(step)
        if training is not None:
            training.fit(at_rung)
            if rungs[-1] not in seen:
                judge(rungs[-1])
    if training is not None:
        counters = training.trainer.counters
        trial.set_user_attr(STEPS, max(counters.step, *scores, 0))
        trial.set_user_attr(SECONDS, round(counters.seconds, 1))
        training.data.train.close()
    return seen


def held_out_errors(training: BuiltTraining, names: Mapping[str, float]) -> dict[str, float]:
    """The errors under the weights that are served, on the held-out episodes."""
    trainer, data, found = training.trainer, training.data, dict[str, float]()
    if EXECUTED in names:
        with trainer.state.serving():
            errors = measure_open_loop(
                training.model,
                data.measured(),
                data.normalizer,
                data.tokenizer,
                data.windows.instructions,
                actions_per_query=training.config.evaluation.actions_per_query,
            )
        found[EXECUTED] = errors.overall.normalised.executed
    return found | (trainer.validate(data) if names.keys() - {EXECUTED} else {})
