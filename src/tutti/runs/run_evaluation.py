"""Runs an evaluation: closed loop in a suite, videos, and the open-loop error on held-out episodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace

from tutti.config.overrides import parse_overrides
from tutti.config.run_config import RunConfig, with_overrides
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.rollouts import PolicyFactory
from tutti.evaluation.closed_loop.starts import TrainingStarts, check_seeds
from tutti.evaluation.closed_loop.videos import rollout_videos, videos_of
from tutti.evaluation.config import NO_SUITE, EvaluationConfig
from tutti.evaluation.folder import OPEN_LOOP, RESULTS, VIDEOS, EvaluationFolder
from tutti.evaluation.open_loop import measure_open_loop, tasks_of
from tutti.plugin import Origin, Trust
from tutti.runs.build import build_data, check_data, suite_of, training_threads, with_steps
from tutti.runs.evaluations import Place, judged_policy, played_as
from tutti.runs.folder import Redo, RunFolder
from tutti.runs.summary import evaluation_summary
from tutti.runs.terminal import print_line, progress_bar
from tutti.serving.contents import read_served, read_spec
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.serving.policy import Policy
from tutti.storage.checkpoint import listed, step_of
from tutti.suites.environment import Suite
from tutti.suites.registry import fit_suite, robot_of
from tutti.trackers import Start, TensorBoardConfig, Trackers
from tutti.types import UserError

CHOOSES = ("evaluation", "checkpoint")
"""The key that chooses a checkpoint of a run."""


def run_evaluation(
    place: Place,
    settings: EvaluationConfig | None,
    overrides: Sequence[str],
    *,
    redo: Redo,
    trust: Trust,
    track: bool = False,
) -> None:
    """Checks all that can be wrong, then measures what is not measured yet.

    `settings`: those of the evaluation before, or else of the policy's own config, where None; the overrides
    are applied to them. Raises: UserError.
    """
    evaluation = EvaluationFolder(place.folder, place.other)
    config = place.config(trust)
    settings = settings or evaluation.config(trust) or config.evaluation
    config = config.model_copy(update={"evaluation": settings})
    if overrides:
        if place.checkpoint is not None and any(o.path[:2] == CHOOSES for o in parse_overrides(overrides)):
            given, key = place.checkpoint, ".".join(CHOOSES)
            raise UserError(f"{given} is one checkpoint already. Leave {key} out, or name the run.")
        config = with_overrides(config, overrides, str(place.config_file), Origin(place.config_file, trust))
    settings = config.evaluation
    plays = settings.suite != NO_SUITE
    if not plays and place.run is None:
        raise UserError(
            f"evaluation.suite is none, so only the open-loop error is left, but {place.policy()} lies in no "
            "run that would know its held-out episodes. Name a suite (evaluation.suite=...), or the run."
        )
    trained = place.starts(config) if plays else TrainingStarts()
    check_seeds(settings, trained)  # before anything slow
    policy = CheckpointPolicyFactory(place.policy(settings.checkpoint), settings.weights, trust_code=trust)
    judged, files, suite = judged_policy(policy), listed(policy.path), suite_of(config)
    spec = read_spec(files)
    own = played_as(spec, read_served(files, spec), suite) if plays else spec
    config = with_steps(config, own.fps)
    settings = config.evaluation
    if plays:
        settings = settings.model_copy(update={"max_decisions": settings.limit(suite)})
        config = config.model_copy(update={"evaluation": settings})
        suite, policy = fit_suite(suite, own), replace(policy, embodiment=robot_of(spec, suite))
    if trained.unknown:
        print_line(trained.warning)
    with evaluation.locked():
        todo, line = evaluation.begin(settings, judged, suite.fingerprint if plays else NO_SUITE, redo)
        print_line(f"evaluate: {line}")
        run = RunFolder(place.run, new=False, trust_code=trust) if place.run and place.in_report else None
        if run is not None and run.config().evaluation != settings:
            run.keep_config(config, "evaluation")
        if not todo:
            return
        with run.stage("evaluate", goes_on=evaluation.extended) if run is not None else nullcontext():
            _measure_open_loop(config, place, evaluation, policy, suite)
            if plays:
                play(settings, evaluation, policy, suite, trained=trained, judged=judged.name)
            evaluation.finish()
        if place.run is not None and place.checkpoint is None:
            _tell_trackers(config, place, step_of(policy.path), track=track)


def _tell_trackers(config: RunConfig, place: Place, step: int, *, track: bool) -> None:
    """Success and videos for TensorBoard, and with `track` for all trackers of the run's config: who sends
    anything to a service that a config.yaml names must have been asked to."""
    assert place.run is not None
    loggers = [one for one in config.logging if track or isinstance(one, TensorBoardConfig)]
    told = config.model_dump(mode="json")
    start = Start(run=place.run, name=config.name, step=step, config=told, trains=False)
    trackers, found = Trackers(loggers, start), evaluation_summary(place.folder)
    under = "" if place.in_report else f"{place.folder.name}/"
    rates = {f"{under}success/{task}": k / n for task, (k, n) in found["success"].items()}
    if found["mean"]:
        rates[f"{under}success/mean"] = found["mean"]["rate"]
    if error := found["open_loop"].get("overall"):
        rates[f"{under}open_loop/executed"] = error["normalised"]["executed"]
    trackers.scalars(step, "evaluation", rates, time.time())
    for video in videos_of(place.folder / VIDEOS):
        trackers.video(f"{under}{video.stem.rpartition('-')[0]}", video, step)
    trackers.close()


def play(
    settings: EvaluationConfig,
    evaluation: EvaluationFolder,
    policy: PolicyFactory,
    suite: Suite,
    *,
    trained: TrainingStarts,
    judged: str,
) -> None:
    """Closed-loop success with controls, and videos. Finished rollouts are kept."""
    suite.check_rendering()
    with progress_bar("evaluating") as bar:
        result = evaluate(
            policy, settings, suite, folder=evaluation.path, trained=trained, judged=judged, progress=bar
        )
    with progress_bar("making videos") as bar:
        count, workers = settings.videos_per_task, settings.workers
        videos = evaluation.path / VIDEOS
        rollout_videos(result.rollouts, suite, videos, per_task=count, workers=workers, progress=bar)
    evaluation.write(RESULTS, result.to_dict())
    if left := evaluation.not_counted(result.rollouts):
        print_line(f"{left} rollouts of starts or tasks that are not asked for now are kept, and not counted")


def _measure_open_loop(
    config: RunConfig,
    place: Place,
    evaluation: EvaluationFolder,
    policy: CheckpointPolicyFactory,
    suite: Suite,
) -> None:
    """The action error on held-out episodes, where there are a run and its data."""
    if (evaluation.path / OPEN_LOOP).is_file():
        return
    if place.run is None:
        print_line("open-loop errors are left out: a policy outside of its run has no held-out episodes")
        return
    if away := check_data(config, place.run):
        print_line(f"open-loop errors are left out: {away[0]} is not there")
        return
    data = build_data(config, place.run)
    if len(measured := data.measured()) == 0:
        return
    instructions = data.windows.instructions
    trust, weights = policy.trust_code, policy.weights
    with training_threads(config):
        errors = measure_open_loop(
            Policy.load(policy.path, weights, trust_code=trust, warn=False).model,
            measured,
            data.normalizer,
            data.tokenizer,
            instructions,
            groups=tasks_of(instructions, suite),
            partners=config.evaluation.controls.partners_of(suite),
            actions_per_query=config.evaluation.actions_per_query,
        )
    evaluation.write(OPEN_LOOP, asdict(errors))
