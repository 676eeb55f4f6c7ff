"""The one place where a config becomes data, model, objective and trainer; and which starts its data hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tutti.config.run_config import RunConfig, to_yaml
from tutti.data.bundle import DataBundle, Statistics
from tutti.data.config import DataConfig
from tutti.data.sources import SourceConfig, check_compatible, rate_of, stores_of, training_texts
from tutti.data.sources.unchanged import check_unchanged
from tutti.data.tokenize import Tokenizer
from tutti.distributed.world import world
from tutti.durations import resolved, times_in
from tutti.evaluation.closed_loop.starts import DATASET, TrainingStarts, starts_of_policy
from tutti.evaluation.config import NO_SUITE
from tutti.evaluation.open_loop import task_by_text
from tutti.models.config import load_towers
from tutti.models.describe import Description, describe
from tutti.models.vla import VLA
from tutti.objectives.unified import UnifiedLoss
from tutti.runs.folder import RunFolder
from tutti.runs.label_shares import label_shares
from tutti.runs.terminal import print_line, progress_bar
from tutti.serving.contents import read_normalizer, read_served, read_spec, read_tokenizer
from tutti.storage.checkpoint import checkpoints, listed
from tutti.storage.manifest import CONFIG, CONVENTIONS, EXPORT, NORMALIZER, SPEC, STARTS, STATE, TOKENIZER
from tutti.storage.reading import read_json
from tutti.suites.environment import Suite
from tutti.suites.registry import find_suite
from tutti.training.checkpointing import Judge
from tutti.training.checkpointing.config import of_others
from tutti.training.checkpointing.init_folder import FolderWeights
from tutti.training.checkpointing.init_from import InitialWeights, source_of, with_hash
from tutti.training.data_feed import TrainingData
from tutti.training.rng import seed_everything
from tutti.training.trainer import Trainer
from tutti.types import Batch, DataNeeds, DataSpec, UserError

TRAIN_SECTIONS = ("data", "model", "objective", "balancing", "backward", "strategy", "training")
"""The sections of a config that decide what a training gives."""
DATA, CONTENT, FRAME_CACHE = "data.json", "data_content.json", "frame_cache.json"
"""What a run says of its data, digests of each episode, and the kind of frame cache that auto chose."""
FIT_CHUNKS = 20_000
"""Windows whose actions an action decoder is fitted to, where it must be (bin edges, a vocabulary)."""

Progress = Callable[[int, int, dict[str, float]], None]
"""Called after each step with (step, steps, latest metrics)."""


class BuiltTraining:
    """A run that is ready to train: data, a model with fresh weights, the objective and the trainer."""

    def __init__(
        self,
        config: RunConfig,
        data: DataBundle,
        model: VLA,
        objective: UnifiedLoss,
        folder: Path,
        *,
        starts: TrainingStarts,
        tracked: bool = False,
        judge: Judge | None = None,
    ) -> None:
        """The trainer works in `folder`; `starts` are those in the data. `tracked`: trackers are told.
        `judge` plays checkpoints in between."""
        self.config, self.data, self.model, self.objective = config, data, model, objective
        self.trainer = Trainer(
            config.training,
            model,
            objective,
            folder,
            strategy=config.strategy,
            backward=config.backward,
            files=policy_files(config, data, starts, folder),
            texts=data.texts,
            loggers=config.logging if tracked else (),
            judge=judge,
        )

    def fit(self, progress: Progress | None = None, data: TrainingData | None = None) -> Path:
        """Trains to the last step, from the newest checkpoint if there is one. Gives the last checkpoint."""
        self.trainer.progress = progress
        return self.trainer.fit(self.data if data is None else data)

    def run_updates(self, steps: Iterable[int], batches: Iterator[Batch] | None = None) -> None:
        """Makes the updates of these steps (0-based) without records, to measure what they do or cost.

        They see the first batches of the run, unless `batches` is given.
        """
        batches = map(self.data.train.batch_at, count()) if batches is None else batches
        self.model.train()
        self.objective.train()
        for step in steps:
            self.trainer.rehearse(batches, step)


def with_steps(config: RunConfig, fps: float | None = None, *, say: bool = True) -> RunConfig:
    """The config with all its times in steps, and a printed line for each: at `fps`, or the rate of the data
    that it names, or would record. Raises: UserError where there are none, or the steps are not allowed."""
    if not any(times_in(config)):
        return config
    if fps is None:
        fps = rate_of(config.data.sources)
    config, lines = resolved(config, config.record.spec.fps if fps is None else fps)
    for line in lines if say and world().ranks.first else ():
        print_line(line)
    return config


def build_training(config: RunConfig, folder: Path, *, output: Path | None = None) -> BuiltTraining:
    """Builds the training of `config` on the data of the run in `folder`; it writes there or to `output`."""
    config = with_steps(config)
    for source in config.data.sources:
        source.fetch()
    output, starts = output or folder, training_starts(config, folder)
    return BuiltTraining(config, *build_parts(config, folder, output), output, starts=starts)


@contextmanager
def trial_training(
    config: RunConfig, folder: Path, go_on_from: Iterable[Path] = ()
) -> Iterator[BuiltTraining]:
    """A training for measurements: what it writes lies in a temporary folder and goes with the block. It goes
    on from the last of the checkpoints `go_on_from`, if there are any."""
    with TemporaryDirectory(prefix="tutti-trial-") as output:
        (home := Path(output) / "checkpoints").mkdir()
        for checkpoint in go_on_from:
            (home / checkpoint.name).symlink_to(checkpoint.resolve())
        training = build_training(config, folder, output=Path(output))
        try:
            yield training
        finally:
            training.data.train.close()


def build_parts(
    config: RunConfig, folder: Path, output: Path | None = None
) -> tuple[DataBundle, VLA, UnifiedLoss]:
    """Data as the objective's terms need it, a model with fresh weights or those that `training.init_from`
    names, and the objective. A training that has checkpoints in `output` (by default `folder`) goes on from
    these instead."""
    config = with_steps(config)
    output, weights = output or folder, None
    initial = "off" if checkpoints(output) else config.training.init_from  # found before a picture is decoded
    source = None if initial == "off" or of_others(initial.run) else source_of(initial, output, folder)
    data = build_data(config, folder, config.objective.needs(), output)
    label_shares(config, data)  # refuses a term that nothing feeds
    seed_everything(config.seed)
    model = config.model.build(data.spec)
    load_towers(model)
    if initial != "off" and source is None:
        FolderWeights(initial).fill(model, output)
    elif initial != "off" and source is not None:
        weights = InitialWeights(initial, source, asdict(data.spec), data.tokenizer)
        weights.fill("model", model)  # before a term copies a part of it
    objective = config.objective.build(model, config.balancing)
    if weights is not None:
        weights.fill("objective", objective)
        weights.report(output)
    if model.action.needs_fit:
        model.action.fit(*data.training_chunks(FIT_CHUNKS))
    return data, model, objective


def with_sources(config: RunConfig, folder: Path) -> DataConfig:
    """The section `data`, whose source is what the run has recorded where it names none."""
    recorded = {} if config.data.sources else {"sources": (SourceConfig(path=folder / DATASET),)}
    return config.data.model_copy(update=recorded)


def check_data(config: RunConfig, folder: Path) -> list[Path]:
    """The data sets of a run that are not there any more. Raises: UserError for one that has changed."""
    data = with_sources(config, folder)
    away = [source.path for source in data.sources if not source.path.exists()]
    if not away:
        check_unchanged(stores_of(data.open(data.cache.home())), folder / CONTENT)
    return away


def require_data(config: RunConfig, folder: Path) -> None:
    """Raises: UserError if the config names no data and the run in `folder` has recorded none."""
    if not config.data.sources and not (folder / DATASET).is_dir():
        raise UserError(
            f"{folder / DATASET}: there are no data yet. Record first (tutti record CONFIG), or name data "
            "sets in data.sources."
        )


def build_data(
    config: RunConfig, folder: Path, needs: DataNeeds = DataNeeds(), output: Path | None = None
) -> DataBundle:
    """The run's data; the kind of frame cache that auto decides on is kept in `output`. Raises: UserError
    where they are not those that it was trained on."""
    config = with_steps(config)
    data, task_of = with_sources(config, folder), task_by_text(config.record.spec)
    kept, home = kept_statistics(config, folder), folder if (folder / FRAME_CACHE).exists() else output
    at, text = home and home / FRAME_CACHE, config.model.text_source

    def build() -> DataBundle:
        with progress_bar("decoding pictures") as bar:
            given = {"trained_on": folder / CONTENT, "kept": kept, "choice": at, "text": text}
            return data.build(needs, bar, group_of=task_of, **given)

    built = world().rank_zero_first(build)  # of several processes one decodes, and the others find its cache
    for remark in built.windows.remarks if world().ranks.first else ():
        print_line(remark)
    return built


def kept_statistics(config: RunConfig, folder: Path) -> Statistics | None:
    """Normaliser and tokenizer of `training.init_from`, where they are to be kept; out of the run's own
    checkpoints, which hold them too, where the other run is gone. All ranks must call it."""
    initial = config.training.init_from
    if initial == "off" or initial.statistics == "new":
        return None
    try:
        source = source_of(initial, folder)
    except UserError:
        if not (own := checkpoints(folder)):
            raise
        source = own[-1]
    saved = listed(source)
    spec = read_spec(saved)
    return Statistics(
        spec=spec,
        normalizer=read_normalizer(saved, spec),
        tokenizer=read_tokenizer(saved, spec),
        served=read_served(saved, spec),
    )


def policy_files(config: RunConfig, data: DataBundle, starts: TrainingStarts, run: Path) -> dict[str, str]:
    """The texts in a checkpoint that let it act and be judged without its run and data, by file name."""
    training = config.training.model_copy(update={"init_from": with_hash(config.training.init_from, run)})
    return {
        CONFIG: to_yaml(config.model_copy(update={"model": config.model.resolved(), "training": training})),
        SPEC: json.dumps(asdict(data.spec), indent=1),
        NORMALIZER: json.dumps(data.normalizer.to_dict(), indent=1),
        TOKENIZER: data.tokenizer.to_json(),
        STARTS: json.dumps(starts.to_dict(), indent=1),
    } | ({CONVENTIONS: data.served.model_dump_json(indent=1)} if data.served else {})


@contextmanager
def training_threads(config: RunConfig) -> Iterator[None]:
    """Inside the block torch uses as many threads as in training, so that sums have the same last digits."""
    before, training = torch.get_num_threads(), config.training
    torch.set_num_threads(training.machine().threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def suite_of(config: RunConfig) -> Suite:
    """The tasks of the evaluation, or of the recording, but for its limit, if the former has no simulator."""
    record, named = config.record.model_copy(update={"max_decisions": "suite"}), config.evaluation.suite
    return record.spec if named in (record.suite, NO_SUITE) else find_suite(named)


def describe_model(config: RunConfig) -> Description:
    """Modules, parameters, FLOPs and tokens of the model that `config` builds, from `expected_spec`."""
    config = with_steps(config)
    return describe(config.model.build(expected_spec(config)))


def expected_spec(config: RunConfig) -> DataSpec:
    """The sizes of the data: of the data sets, or else of what the config would record."""
    suite, data = config.record.spec, config.data
    if data.sources:
        sizes = named = check_compatible(parts := data.open(data.cache.home()))
        texts = sorted(training_texts(data.split(parts, task_by_text(suite))))
        embodiments, robots = tuple(sizes.own), sizes.robots
    else:
        sizes, named, embodiments, robots = suite, suite.dimensions, (suite.robot,), ()
        texts = [text for task in suite.tasks for text in suite.instructions(task)]
    tokenizer = Tokenizer.of(texts, data.vocab_size, data.text_length, config.model.text_source)
    return DataSpec(
        views=sizes.views,
        image_size=data.pixels,
        state_dim=sizes.state_dim,
        action_dim=sizes.action_dim,
        horizon=data.horizon,
        history=data.history,
        vocab_size=tokenizer.vocab_size,
        text_length=tokenizer.text_length,
        embodiments=embodiments,
        fps=sizes.fps,
        robots=robots,
        **named.dimensions(),
    )


def with_parent_data(config: RunConfig) -> RunConfig:
    """A fork that names no data continues on the recorded data set of the other run."""
    fork = config.training.fork
    if fork == "off" or config.data.sources or not (recorded := Path(fork.run) / DATASET).is_dir():
        return config
    data = config.data.model_copy(update={"sources": (SourceConfig(path=recorded),)})
    return config.model_copy(update={"data": data})


def training_starts(config: RunConfig, folder: Path, forked: tuple[Path, ...] = ()) -> TrainingStarts:
    """The starts in the run's data, and those of the run that it was forked from or has its weights of.

    `forked` lists the runs followed so far, so that a circle of them ends.
    """
    folders = [source.path for source in config.data.sources] or [folder / DATASET]
    parts = [TrainingStarts.of_data(source) for source in folders]
    for before in (config.training.fork, config.training.init_from):
        if before != "off" and not of_others(before.run) and (run := _run_of(Path(before.run))) not in forked:
            parts.append(starts_of_run(run, forked=(*forked, run)))
    return TrainingStarts.union(parts)


def _run_of(folder: Path) -> Path:
    """The run that a checkpoint belongs to; any other folder itself."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def starts_of_run(
    folder: Path, config: RunConfig | None = None, forked: tuple[Path, ...] = ()
) -> TrainingStarts:
    """The starts in data.json of a run; of an older run, which has none there, those of its data sets; of a
    policy without its run, those in its starts.json."""
    path = folder / DATA
    if path.is_file():
        noted = read_json(path, cure="`tutti train` writes it.")
        try:
            if "starts" in noted:
                return TrainingStarts.from_dict(noted["starts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); `tutti train` writes it.") from None
    if (folder / EXPORT).exists() or (folder / STATE).exists():
        return starts_of_policy(folder)
    if config is None and not (folder / CONFIG).is_file():
        return TrainingStarts(unknown=(str(folder),))  # a run that has moved
    config = config or RunFolder(folder, new=False).config()
    return training_starts(with_parent_data(config), folder, forked)
