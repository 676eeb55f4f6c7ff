"""The guided tour: record, train, evaluate, report. Start reading here.

Each function is a stage of a run. The run's folder has a manifest (runs/folder.py): a stage that is run again
is kept if it is finished, and continues if it was interrupted.

    runs/demo/
      config.yaml      the resolved config                stages.json     finished stages and their time
      dataset/         demonstrations, LeRobot v3.0       recording.json  tries, successes and seeds
      checkpoints/     all that a resume needs
      records.jsonl    losses of each logged step         tensorboard/    the same for TensorBoard
      first_batch.png  and .json: the first batch         model.json, data.json  sizes of model and data
      data_content.json  digests of each episode          shapes.txt  tensors of the first batch
      init_from.json   what was taken from another run    failures/, spikes/  steps saved for a replay
      evaluation/      every rollout, the scores, videos  evaluations/    others of another name
      probes/          input ablations, linear probes     probes/occlusion.png  where the model looks
      report.html      all results on one page            summary.json    the same for programs

Decoded pictures are kept for all runs outside of them (data/cache.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from tutti.config.overrides import parse_overrides
from tutti.config.run_config import RunConfig, with_overrides
from tutti.data.formats.lerobot import VIEW
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.distributed.world import process_group
from tutti.evaluation.closed_loop.evaluate import evaluate as evaluate_closed_loop
from tutti.evaluation.closed_loop.starts import DATASET, RECORDING, TrainingStarts, check_seeds
from tutti.evaluation.closed_loop.videos import rollout_videos
from tutti.evaluation.config import NO_SUITE, EvaluationConfig
from tutti.evaluation.folder import OPEN_LOOP, RESULTS, VIDEOS, EvaluationFolder
from tutti.evaluation.open_loop import measure_open_loop, tasks_of
from tutti.models.describe import describe
from tutti.plugin import Origin, Trust
from tutti.recording import recorder
from tutti.recording.episode_files import RecordedEpisode, load_recorded
from tutti.recording.recorder import RecordConfig
from tutti.report import write_report
from tutti.runs.build import (
    CONTENT,
    DATA,
    TRAIN_SECTIONS,
    BuiltTraining,
    build_data,
    build_parts,
    check_data,
    suite_of,
    training_starts,
    training_threads,
    with_parent_data,
)
from tutti.runs.evaluations import Place, judged_policy, place_of
from tutti.runs.folder import Redo, RunFolder, require_one_process
from tutti.runs.summary import print_summary, write_summary
from tutti.runs.terminal import print_line, progress_bar, quiet
from tutti.serving.contents import read_spec
from tutti.serving.policy import CheckpointPolicyFactory, find_checkpoint
from tutti.storage.checkpoint import listed
from tutti.storage.files import discard
from tutti.suites.environment import Suite
from tutti.suites.registry import fit_suite
from tutti.types import UserError

CHOOSES = ("evaluation", "checkpoint")
"""The key that chooses a checkpoint of a run."""
EPISODES = "recording"
"""Folder of the recorded episodes until they are in the data set."""


def demo(config: RunConfig, folder: Path | None = None, *, redo: Redo = False) -> Path:
    """Runs all four stages: demonstrations in, a policy and its report out. Returns the run's folder."""
    config.record.spec.check_rendering()  # before anything slow
    folder = folder or Path("runs") / config.name
    record(config, folder, redo=redo)
    train(config, folder, redo=redo)
    evaluate(folder, config.evaluation, redo=redo, trust_code=config.classes)
    report(folder)
    return folder


def record(config: RunConfig, folder: Path | None = None, *, redo: Redo = False) -> Path:
    """Records demonstrations of the simulator's scripted experts. Returns the folder of the data set."""
    run = RunFolder(folder or Path("runs") / config.name, redo=redo)
    if run.begin("record", config, "record"):
        config.record.spec.check_rendering()
        with run.stage("record"):
            _record(config.record, run)
    discard(run.path / EPISODES)  # the data set has them all
    return run.path / DATASET


def train(config: RunConfig, folder: Path | None = None, *, redo: Redo = False) -> Path:
    """Trains every module of a model at once on demonstrations. Returns the folder of the last checkpoint."""
    training = config.training
    device = training.machine().device
    with (
        process_group(training.parallel.count, device, training.parallel.timeout) as all_ranks,
        quiet(not all_ranks.first),
    ):
        run = RunFolder(folder or Path("runs") / config.name, redo=redo)
        config = with_parent_data(config)
        if not config.data.sources:
            run.require(
                "record",
                "Record first (tutti record CONFIG), or name data: "
                "'data.sources=[{path: runs/demo/dataset}]'.",
            )
        if run.begin("train", config, *TRAIN_SECTIONS):
            with run.stage("train"):
                _train(config, run)
        else:
            check_data(config, run.path)
        return find_checkpoint(run.path)


def evaluate(
    policy: Path,
    config: EvaluationConfig | None = None,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    to: Path | None = None,
    redo: Redo = False,
    trust_code: Trust = False,
) -> Path:
    """Measures success in the simulator, with intervals and controls. Returns the folder of the evaluation.

    `policy` is a run's folder, a checkpoint or an export; only a run has held-out episodes for the open-loop
    error, too. `config` replaces the section `evaluation` that the evaluation, or else the run, had before.
    One policy may have several evaluations, by `name` or by folder (`to`); `tutti.runs.evaluations` tells
    where they lie. More `episodes` extend one. `trust_code`: which of the user's own classes that the policy
    names may be imported.
    """
    require_one_process("evaluate")
    place = place_of(policy, name, to)
    evaluation = EvaluationFolder(place.folder, place.other)
    given = place.config(trust_code)
    settings = config or evaluation.config or given.evaluation
    given = given.model_copy(update={"evaluation": settings})
    if overrides:
        if place.checkpoint is not None and any(o.path[:2] == CHOOSES for o in parse_overrides(overrides)):
            raise UserError(
                f"{policy} is one checkpoint already. Leave {'.'.join(CHOOSES)} out, or name the run."
            )
        given = with_overrides(
            given, overrides, str(place.config_file), Origin(place.config_file, trust_code)
        )
    _evaluate(given, place, evaluation, redo, trust_code)
    return place.folder


def report(folder: Path) -> Path:
    """Writes report.html and summary.json of a run, and prints the summary. Returns the path of the page."""
    run = RunFolder(folder, new=False)
    run.require("train", "There is nothing to report before: tutti train CONFIG.")
    with run.stage("report"):
        write_summary(run)  # the page shows it
        write_report(run.path)
    print_summary(write_summary(run), run.path)  # again: the time of the report itself is now known
    return run.path / "report.html"


def _record(config: RecordConfig, run: RunFolder) -> None:
    """Records episodes in parallel into files, then writes them in a fixed order into the data set."""
    with progress_bar("recording") as bar:
        recorded = recorder.record(config, run.path / EPISODES, bar)
    total = sum(recorded.successes.values())
    seeds = [config.first_seed, config.first_seed + max(recorded.tries.values()) - 1]
    summary = {
        "suite": config.suite,
        "seeds": seeds,
        "tries": recorded.tries,
        "successes": recorded.successes,
    }
    if not (run.path / DATASET).exists():  # it is renamed into place when complete
        with progress_bar("writing the data set") as bar:
            write_lerobot(
                run.path / DATASET,
                map(_as_record, load_recorded(run.path / EPISODES)),
                fps=config.spec.fps,
                views=tuple(VIEW + view for view in config.spec.views),
                robot_type=config.spec.robot,
                dimensions=config.spec.dimensions,
                beside={RECORDING: json.dumps(summary, indent=1) + "\n"},
                progress=lambda done, _: bar(done, total),
            )
    run.write_json(RECORDING, summary)


def _as_record(episode: RecordedEpisode) -> EpisodeRecord:
    return EpisodeRecord(
        images={VIEW + view: pictures for view, pictures in episode.images.items()},
        states=episode.states,
        actions=episode.actions,
        instruction=episode.instruction,
        extra={"observation.environment_state": episode.privileged},
    )


def _train(config: RunConfig, run: RunFolder) -> None:
    """Builds data, model, objective and trainer, and trains: the main path of the package."""
    data, model, objective = build_parts(config, run.path)
    run.write_json("model.json", asdict(describe(model)))  # before the trainer shards or compiles it
    starts = training_starts(config, run.path)
    run.write_json(CONTENT, {"sources": data.contents()})
    said = data.describe()
    run.write_json(DATA, said | {"starts": starts.to_dict()})
    print_line(
        f"{said['training_episodes']:,} episodes to train on, {said['validation_episodes']:,} held out "
        f"(data.validation_fraction {config.data.validation_fraction:g}; "
        f"{said['validation_instructions']:,} of {said['instructions']:,} instructions)"
    )
    with progress_bar("training") as bar:
        training = BuiltTraining(config, data, model, objective, run.path, starts=starts)
        training.fit(lambda step, steps, latest: bar(step, steps, _loss(latest)))


def _loss(latest: dict[str, float]) -> str:
    return f"loss {latest['loss/total']:.3f}" if "loss/total" in latest else ""


def _evaluate(
    config: RunConfig, place: Place, evaluation: EvaluationFolder, redo: Redo, trust_code: Trust
) -> None:
    """Checks all that can be wrong, then measures what is not measured yet."""
    settings = config.evaluation
    plays = settings.suite != NO_SUITE
    if not plays and place.run is None:
        raise UserError(
            f"evaluation.suite is none, so only the open-loop error is left, but {place.policy()} lies in no "
            "run that would know its held-out episodes. Name a suite (evaluation.suite=...), or the run."
        )
    trained = place.starts(config) if plays else TrainingStarts()
    check_seeds(settings, trained)  # before anything slow
    policy = CheckpointPolicyFactory(
        place.policy(settings.checkpoint), settings.weights, trust_code=trust_code
    )
    judged = judged_policy(policy)
    suite = suite_of(config)
    suite = fit_suite(suite, read_spec(listed(policy.path))) if plays else suite
    if trained.unknown:
        print_line(trained.warning)
    with evaluation.locked():
        todo, line = evaluation.begin(settings, judged, suite.fingerprint if plays else NO_SUITE, redo)
        print_line(f"evaluate: {line}")
        run = (
            RunFolder(place.run, new=False, trust_code=trust_code) if place.run and place.in_report else None
        )
        if run is not None:
            run.keep_config(config, "evaluation")
        if not todo:
            return
        with run.stage("evaluate", goes_on=evaluation.extended) if run is not None else nullcontext():
            _measure_open_loop(config, place, evaluation, policy, suite)
            if plays:
                _play(settings, evaluation, policy, suite, trained=trained, judged=judged.name)
            evaluation.finish()


def _play(
    settings: EvaluationConfig,
    evaluation: EvaluationFolder,
    policy: CheckpointPolicyFactory,
    suite: Suite,
    *,
    trained: TrainingStarts,
    judged: str,
) -> None:
    """Closed-loop success with controls, and videos. Finished rollouts are kept."""
    suite.check_rendering()
    with progress_bar("evaluating") as bar:
        result = evaluate_closed_loop(
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
    if len(data.validation) == 0:
        return
    instructions = data.windows.instructions
    with training_threads(config):
        errors = measure_open_loop(
            policy().model,
            data.validation,
            data.normalizer,
            data.tokenizer,
            instructions,
            groups=tasks_of(instructions, suite),
            partners=config.evaluation.controls.partners_of(suite),
            actions_per_query=config.evaluation.actions_per_query,
        )
    evaluation.write(OPEN_LOOP, asdict(errors))
