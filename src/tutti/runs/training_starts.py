"""The simulator starts (seeds) that a policy was trained on; for a forked run, those of both runs."""

from __future__ import annotations

from pathlib import Path

from tutti.config.run_config import RunConfig
from tutti.data.config import SourceConfig
from tutti.evaluation.closed_loop.starts import DATASET, TrainingStarts
from tutti.runs.folder import RunFolder
from tutti.storage.reading import read_json
from tutti.types import UserError


def with_parent_data(config: RunConfig) -> RunConfig:
    """A fork that names no data continues on the recorded data set of the other run."""
    fork = config.training.fork
    if fork == "off" or config.data.sources or not (recorded := Path(fork.run) / DATASET).is_dir():
        return config
    data = config.data.model_copy(update={"sources": (SourceConfig(path=recorded),)})
    return config.model_copy(update={"data": data})


def training_starts(config: RunConfig, folder: Path, forked: tuple[Path, ...] = ()) -> TrainingStarts:
    """The starts in the run's data, and those of the run that it was forked from.

    `forked` lists the runs followed so far, so that a circle of forks ends.
    """
    folders = [source.path for source in config.data.sources] or [folder / DATASET]
    parts = [TrainingStarts.of_data(source) for source in folders]
    fork = config.training.fork
    if fork != "off" and Path(fork.run) not in forked:
        parts.append(starts_of_run(Path(fork.run), forked=(*forked, Path(fork.run))))
    return TrainingStarts.union(parts)


def starts_of_run(
    folder: Path, config: RunConfig | None = None, forked: tuple[Path, ...] = ()
) -> TrainingStarts:
    """The starts in data.json of a run; of an older run, which has none there, those of its data sets."""
    path = folder / "data.json"
    if path.is_file():
        noted = read_json(path, cure="`tutti train` writes it.")
        try:
            if "starts" in noted:
                return TrainingStarts.from_dict(noted["starts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); `tutti train` writes it.") from None
    if config is None and not (folder / "config.yaml").is_file():
        return TrainingStarts(unknown=(str(folder),))  # a fork of a run that has moved
    config = config or RunFolder(folder, new=False).config()
    return training_starts(with_parent_data(config), folder, forked)
