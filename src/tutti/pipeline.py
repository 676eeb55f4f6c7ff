"""The guided tour: record, train, evaluate, report. Start reading here.

Each function is a stage, and a run is a folder whose book (stages.py) remembers them: run again, finished
stages are kept and interrupted ones continue.

    runs/demo/
      config.yaml      everything it was made with        stages.json     what is finished, and its time
      dataset/         demonstrations, LeRobot v3.0       recording.json  how many tries, which seeds
      cache/           their pictures, decoded            checkpoints/    the model, all that a resume needs
      records.jsonl    losses, step by step               tensorboard/    the same for TensorBoard
      first_batch.png  what the model saw first           model.json, data.json  what it is, what it saw
      evaluation/      every rollout, and the scores      videos/         rollouts that succeed and that fail
      probes/          does it look, listen, or copy?     occlusion.png   in it: where the actions come from
      report.html      all of it on one page              summary.json    all of it for machines
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from tutti.config.run_config import RunConfig, to_yaml
from tutti.data.config import DataBundle, DataNeeds, SourceConfig
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.data.tokenize import Tokenizer
from tutti.distributed.world import joined, world
from tutti.evaluation.closed_loop.evaluate import evaluate as play
from tutti.evaluation.closed_loop.starts import DATASET, RECORDING, TrainingStarts, check_seeds
from tutti.evaluation.closed_loop.videos import rollout_videos
from tutti.evaluation.config import NO_SUITE, EvaluationConfig
from tutti.evaluation.open_loop import measure, tasks_of
from tutti.models.describe import Description, describe
from tutti.models.vla import VLA
from tutti.objectives.unified import UnifiedLoss
from tutti.plugin import Trust
from tutti.recording import recorder
from tutti.recording.episode_files import RecordedEpisode, load_recorded
from tutti.recording.recorder import RecordConfig
from tutti.report import write_report
from tutti.runs.folder import RunFolder
from tutti.runs.summary import print_summary, write_summary
from tutti.runs.terminal import hushed, progress_bar, say
from tutti.runs.training_starts import starts_of_run, training_starts, with_data_of_fork
from tutti.serving.policy import CheckpointPolicyFactory, Policy, find_checkpoint
from tutti.suites.metaworld.environments import MetaWorldEnvironments, fit_suite
from tutti.suites.metaworld.rendering import check_rendering
from tutti.suites.metaworld.suite import SuiteSpec, find_suite
from tutti.suites.metaworld.task import ACTION_DIM, STATE_DIM
from tutti.training.device import decide
from tutti.training.rng import seed_everything
from tutti.training.trainer import Trainer
from tutti.types import DataSpec

WORK = "recording"
VIEW = "observation.images."
ROBOT = "sawyer"
TRAINED_BY = ("data", "model", "objective", "balancing", "backward", "strategy", "training")
"""The sections of a config that decide what a training gives."""
FIT_CHUNKS = 20_000
"""Windows whose actions an action decoder is fitted to, where it must be (bin edges, a vocabulary)."""


def demo(config: RunConfig, folder: Path | None = None, *, redo: bool = False) -> Path:
    """The whole of Tutti: demonstrations in, a policy that acts and its report out. Gives the folder."""
    check_rendering()  # before anything long begins
    folder = folder or Path("runs") / config.name
    record(config, folder, redo=redo)
    train(config, folder, redo=redo)
    evaluate(folder, config.evaluation, redo=redo, trust_code=config.classes)
    report(folder)
    return folder


def record(config: RunConfig, folder: Path | None = None, *, redo: bool = False) -> Path:
    """The simulator's scripted experts -> demonstrations, a LeRobotDataset v3.0. Gives its folder."""
    run = RunFolder(folder or Path("runs") / config.name, redo=redo)
    if run.begin("record", config, "record"):
        check_rendering()
        with run.stage("record"):
            _record(config.record, run)
    run.discard(WORK)  # the data set holds all that the work files held
    return run.path / DATASET


def train(config: RunConfig, folder: Path | None = None, *, redo: bool = False) -> Path:
    """Demonstrations -> a model, all its modules trained at once. Gives the folder of the last checkpoint."""
    training = config.training
    device = decide(training.device, training.threads, training.precision).device
    with (
        joined(training.parallel.count, device, training.parallel.timeout) as all_ranks,
        hushed(not all_ranks.first),
    ):
        run = RunFolder(folder or Path("runs") / config.name, redo=redo)
        config = with_data_of_fork(config)
        if not config.data.sources:
            run.require(
                "record",
                "Record first (tutti record CONFIG), or name data: "
                "'data.sources=[{path: runs/demo/dataset}]'.",
            )
        if run.begin("train", config, *TRAINED_BY):
            with run.stage("train"):
                _train(config, run)
        return find_checkpoint(run.path)


def evaluate(
    folder: Path, config: EvaluationConfig | None = None, *, redo: bool = False, trust_code: Trust = False
) -> Path:
    """A trained run -> success in the simulator, with intervals and controls. Gives the folder `evaluation/`.

    The error on held-out episodes comes first, since it needs no simulator. `config` is the run's own section
    `evaluation` unless given. `trust_code`: classes of the user's own that the run names are imported.
    """
    run = RunFolder(folder, redo=redo, new=False, trust_code=trust_code)
    run.require("train", "Train first: tutti train CONFIG.")
    whole = run.config()
    if config is not None:
        whole = whole.model_copy(update={"evaluation": config})
    if run.begin("evaluate", whole, "evaluation"):
        with run.stage("evaluate"):
            _evaluate(whole, run)
    return run.path / "evaluation"


def report(folder: Path) -> Path:
    """What is known about a run -> report.html, summary.json and the closing table. Gives the page."""
    run = RunFolder(folder, new=False)
    run.require("train", "There is nothing to report before: tutti train CONFIG.")
    with run.stage("report"):
        write_summary(run)  # the page shows it
        write_report(run.path)
    print_summary(write_summary(run), run.path)  # once more, now that the report's own time is known
    return run.path / "report.html"


def build_data(config: RunConfig, folder: Path, needs: DataNeeds | None = None) -> DataBundle:
    """The run's data: `data.sources`, or where there are none what the run has recorded."""
    data, suite = config.data, config.record.spec
    if not data.sources:
        data = data.model_copy(update={"sources": (SourceConfig(path=folder / DATASET),)})

    def build() -> DataBundle:
        with progress_bar("decoding pictures") as bar:
            return data.build(
                needs or DataNeeds(), folder / "cache", bar, group_of=lambda text: tasks_of((text,), suite)[0]
            )

    return world().first_then_all(build)  # of several processes one decodes, and the others find its cache


def build_training(config: RunConfig, folder: Path) -> tuple[DataBundle, VLA, UnifiedLoss]:
    """What a training begins with: data as its terms need it, a model with fresh weights, its objective."""
    data = build_data(config, folder)
    seed_everything(config.seed)
    model = config.model.build(data.spec)
    objective = config.objective.build(model, config.balancing)
    needs = DataNeeds(objective.needs_futures, objective.needs_states, objective.grippers)
    if needs != DataNeeds():
        data = build_data(config, folder, needs)
    if model.action.needs_fit:
        model.action.fit(*data.training_chunks(FIT_CHUNKS))
    return data, model, objective


def suite_of(config: RunConfig) -> SuiteSpec:
    """The tasks of the evaluation; those of the recording where it has no simulator."""
    own = config.evaluation.suite in (config.record.suite, NO_SUITE)
    return config.record.spec if own else find_suite(config.evaluation.suite)


@contextmanager
def training_threads(config: RunConfig) -> Iterator[None]:
    """As many threads as in training inside the block."""
    before, training = torch.get_num_threads(), config.training
    torch.set_num_threads(decide(training.device, training.threads, training.precision).threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_model(config: RunConfig) -> Description:
    """The model as `config` would build it, without data: its modules, parameters, FLOPs and tokens.

    Sizes that only data can tell are those of the first data set, or else of what the config would record.
    """
    return describe(config.model.build(expected_spec(config)))


def _record(config: RecordConfig, run: RunFolder) -> None:
    """Episodes into work files in parallel, then all of them, in a fixed order, into the data set."""
    with progress_bar("recording") as bar:
        made = recorder.record(config, run.path / WORK, bar)
    total = sum(made.successes.values())
    seeds = [config.seed0, config.seed0 + max(made.tries.values()) - 1]
    told = {"suite": config.suite, "seeds": seeds, "tries": made.tries, "successes": made.successes}
    if not (run.path / DATASET).exists():  # it appears whole, so if it is there it is finished
        with progress_bar("writing the data set") as bar:
            write_lerobot(
                run.path / DATASET,
                map(_as_record, load_recorded(run.path / WORK)),
                fps=config.spec.fps,
                views=tuple(VIEW + view for view in config.spec.views),
                robot_type=ROBOT,
                beside={RECORDING: json.dumps(told, indent=1) + "\n"},
                progress=lambda done, _: bar(done, total),
            )
    run.write_json(RECORDING, told)


def _as_record(episode: RecordedEpisode) -> EpisodeRecord:
    return EpisodeRecord(
        images={VIEW + view: pictures for view, pictures in episode.images.items()},
        states=episode.states,
        actions=episode.actions,
        instruction=episode.instruction,
        extra={"observation.environment_state": episode.privileged},
    )


def _train(config: RunConfig, run: RunFolder) -> None:
    """Data, model, objective, trainer: the main path of the package."""
    data, model, objective = build_training(config, run.path)
    run.write_json("model.json", asdict(describe(model)))
    starts = training_starts(config, run.path)
    run.write_json("data.json", data.describe() | {"starts": starts.to_dict()})
    with progress_bar("training") as bar:
        trainer = Trainer(
            config.training,
            model,
            objective,
            run.path,
            strategy=config.strategy,
            backward=config.backward,
            extra=_what_a_policy_needs(config, data),
            texts=data.texts,
            progress=lambda step, steps, latest: bar(step, steps, _loss(latest)),
        )
        trainer.fit(data)


def _what_a_policy_needs(config: RunConfig, data: DataBundle) -> dict[str, str]:
    """The texts that make a checkpoint complete: with them it acts without the run and its data."""
    return {
        "config.yaml": to_yaml(config),
        "spec.json": json.dumps(asdict(data.spec), indent=1),
        "normalizer.json": json.dumps(data.normalizer.to_dict(), indent=1),
        "tokenizer.json": data.tokenizer.to_json(),
    }


def _loss(latest: dict[str, float]) -> str:
    return f"loss {latest['loss/total']:.3f}" if "loss/total" in latest else ""


def _evaluate(config: RunConfig, run: RunFolder) -> None:
    """Open loop, closed loop with controls, videos; each rollout is saved as it ends and found again."""
    settings = config.evaluation
    trained = TrainingStarts() if settings.suite == NO_SUITE else starts_of_run(run.path, config)
    check_seeds(settings, trained)  # before anything long begins
    if trained.unknown:
        say(trained.warning)
    checkpoint = find_checkpoint(run.path, settings.checkpoint)
    policy = Policy.load(checkpoint, settings.weights, trust_code=run.trust_code)
    suite = suite_of(config)
    _measure_open_loop(config, run, policy, suite)
    if settings.suite == NO_SUITE:
        say("evaluation.suite is none: open-loop error only, nothing was played in a simulator")
        return
    check_rendering()
    suite = fit_suite(suite, policy.spec, suite.image_size)
    with progress_bar("evaluating") as bar:
        result = play(
            CheckpointPolicyFactory(checkpoint, settings.weights, trust_code=run.trust_code),
            settings,
            MetaWorldEnvironments(suite),
            folder=run.path / "evaluation",
            trained=trained,
            progress=bar,
        )
    with progress_bar("making videos") as bar:
        rollout_videos(
            result.rollouts, suite, run.path / "videos", per_task=settings.videos_per_task, progress=bar
        )
    run.write_json("evaluation/results.json", result.to_dict())


def _measure_open_loop(config: RunConfig, run: RunFolder, policy: Policy, suite: SuiteSpec) -> None:
    """The error on held-out episodes, with as many threads as in training, for the same last digits."""
    data = build_data(config, run.path)
    if len(data.validation) == 0:
        return
    instructions = data.windows.instructions
    with training_threads(config):
        errors = measure(
            policy.model,
            data.validation,
            data.normalizer,
            data.tokenizer,
            instructions,
            groups=tasks_of(instructions, suite),
            partners=config.evaluation.controls.partners,
            execute=config.evaluation.execute,
        )
    run.write_json("evaluation/open_loop.json", errors.to_dict())


def expected_spec(config: RunConfig) -> DataSpec:
    """The sizes of the data: of the first data set, or else of what the config would record."""
    suite, data = config.record.spec, config.data
    texts = [text for task in suite.tasks for text in suite.instructions(task)]
    views, state_dim, action_dim, fps = suite.views, STATE_DIM, ACTION_DIM, suite.fps
    embodiment = ROBOT
    if data.sources:
        store = data.sources[0].open().spec
        texts = sorted(data.training_texts(lambda text: tasks_of((text,), suite)[0]))
        views, state_dim, action_dim, fps = store.views, store.state_dim, store.action_dim, store.fps
        embodiment = store.embodiment
    tokenizer = Tokenizer.fit(
        texts, data.vocab_size, None if data.text_length == "auto" else data.text_length
    )
    return DataSpec(
        views=views,
        image_size=data.image_size,
        state_dim=state_dim,
        action_dim=action_dim,
        horizon=data.horizon,
        vocab_size=tokenizer.vocab_size,
        text_length=tokenizer.text_length,
        embodiments=(embodiment,),
        fps=fps,
    )
