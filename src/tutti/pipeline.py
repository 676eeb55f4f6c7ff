"""The guided tour: record, train, evaluate, report. Start reading here.

Each function is a stage of a run. The run's folder has a manifest (runs/folder.py): a stage that is run again
is kept if it is finished, and continues if it was interrupted.

    runs/demo/
      config.yaml      the resolved config                stages.json     finished stages and their time
      dataset/         demonstrations, LeRobot v3.0       recording.json  tries, successes and seeds
      checkpoints/     all that a resume needs
      records.jsonl    losses of each logged step         tensorboard/, tracking/  for trackers
      first_batch.png  and .json: the first batch         model.json, data.json  sizes of model and data
      data_content.json  digests of each episode          data_findings.json  remarks on the data
      init_from.json   what was taken from another run    failures/, spikes/  steps saved for a replay
      shapes.txt       tensors of the first batch         frame_cache.json  what data.cache.kind auto chose
      evaluation/      every rollout, the scores, videos  evaluations/    others of another name
      training_evaluations/  rollouts of checkpoints while the training went on
      probes/          input ablations, linear probes     probes/occlusion.png  where the model looks
      report.html      all results on one page            summary.json    the same for programs
      tune/            rates that `tutti tune` screened

Decoded pictures are kept for all runs outside of them (data/cache/).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tutti.config.run_config import RunConfig
from tutti.data.formats.lerobot import ENVIRONMENT_STATE, VIEW
from tutti.data.formats.lerobot.pieces import EpisodeRecord
from tutti.data.formats.lerobot.writer import write_lerobot
from tutti.distributed.world import process_group
from tutti.evaluation.closed_loop.starts import DATASET, RECORDING
from tutti.evaluation.config import EvaluationConfig
from tutti.models.describe import describe
from tutti.plugin import Trust
from tutti.recording import recorder
from tutti.recording.episode_files import RecordedEpisode, load_recorded
from tutti.recording.recorder import RecordConfig
from tutti.report import write_report
from tutti.runs.build import (
    CONTENT,
    DATA,
    TRAIN_SECTIONS,
    BuiltTraining,
    build_parts,
    check_data,
    training_starts,
    with_parent_data,
    with_steps,
)
from tutti.runs.data_check import check_before_training
from tutti.runs.evaluations import place_of
from tutti.runs.folder import Redo, RunFolder, require_one_process
from tutti.runs.judges.during_training import TrainingJudge
from tutti.runs.run_evaluation import run_evaluation
from tutti.runs.summary import print_summary, write_summary
from tutti.runs.terminal import print_line, progress_bar, quiet
from tutti.serving.policy import find_checkpoint
from tutti.storage.files import discard
from tutti.training.checkpointing import Saver

EPISODES = "recording"
"""Folder of the recorded episodes until they are in the data set."""


def demo(
    config: RunConfig, folder: Path | None = None, *, redo: Redo = False, allow_inexact: bool = False
) -> Path:
    """Runs all four stages: demonstrations in, a policy and its report out. Returns the run's folder."""
    config.record.spec.check_rendering()  # before anything slow
    folder = folder or Path("runs") / config.name
    record(config, folder, redo=redo)
    train(config, folder, redo=redo, allow_inexact=allow_inexact)
    evaluate(folder, config.evaluation, redo=redo, trust_code=config.classes, track=True)
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


def train(
    config: RunConfig, folder: Path | None = None, *, redo: Redo = False, allow_inexact: bool = False
) -> Path:
    """Trains every module of a model at once on demonstrations. Returns the folder of the last checkpoint.

    `allow_inexact`: an interrupted training goes on although a key has changed that may change the last bits.
    """
    training = config.training
    device = training.machine().device
    with (
        process_group(training.parallel.count, device, training.parallel.timeout) as all_ranks,
        quiet(not all_ranks.first),
    ):
        run = RunFolder(folder or Path("runs") / config.name, redo=redo, allow_inexact=allow_inexact)
        config = with_parent_data(config)
        if not config.data.sources:
            named = "'data.sources=[{path: runs/demo/dataset}]'"
            run.require("record", f"Record first (tutti record CONFIG), or name data: {named}.")
        config = with_steps(config)
        if run.begin("train", config, *TRAIN_SECTIONS):
            with run.stage("train"):
                _train(config, run)
        else:
            with Saver(run.path, training.checkpoints, all_ranks):  # copies to the mirror what is not there
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
    track: bool = False,
) -> Path:
    """Measures success in the simulator, with intervals and controls. Returns the folder of the evaluation.

    `policy` is a run's folder, a checkpoint or an export; only a run has held-out episodes for the open-loop
    error. `config` replaces the section `evaluation` that the evaluation, or else the run, had before. More
    `episodes` extend it. `name` and `to` are for several of one policy (`runs.evaluations`). `trust_code`:
    which of the user's own classes may be imported. `track`: tell all trackers of the run.
    """
    require_one_process("evaluate")
    place = place_of(policy, name, to)
    run_evaluation(place, config, overrides, redo=redo, trust=trust_code, track=track)
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
        "suite": config.spec.name,
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
        extra={ENVIRONMENT_STATE: episode.privileged},
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
    check_before_training(config, data, run)
    with progress_bar("training") as bar:
        judge = TrainingJudge.of(config, run.path, data, starts)
        parts = (config, data, model, objective, run.path)
        training = BuiltTraining(*parts, starts=starts, tracked=True, judge=judge)
        training.fit(lambda step, steps, latest: bar(step, steps, _loss(latest)))


def _loss(latest: dict[str, float]) -> str:
    return f"loss {latest['loss/total']:.3f}" if "loss/total" in latest else ""
