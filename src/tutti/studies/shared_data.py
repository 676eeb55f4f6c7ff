"""The data that all cells of a study share: recorded once, or those of a run, which is only read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.data.config import SourceConfig
from tutti.evaluation.closed_loop.starts import DATASET, TrainingStarts
from tutti.runs.build import build_data
from tutti.runs.folder import RunFolder
from tutti.studies.config import StudyConfig

CACHE = "cache"
RECORDED = "recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedData:
    """`fingerprint` is a hash of the data sets' contents; `starts` are those of the demonstrations."""

    sources: tuple[SourceConfig, ...]
    fingerprint: str
    starts: TrainingStarts


def share_data(study: StudyConfig, config: RunConfig, folder: Path) -> SharedData:
    """Finds the data of `study.data_from`, or records them into `folder`. `config` is the baseline's.

    Raises: UserError, if the run there has recorded nothing, or a data set cannot be opened.
    """
    home: Path | None = None
    if study.data_from != "base":
        home = study.data_from.resolve()
        RunFolder(home, new=False).require("record", "Make it first: tutti record CONFIG.")
    elif not config.data.sources:
        home = (folder / RECORDED).resolve()
        pipeline.record(config, home)
    if home is None:
        sources = tuple(s.model_copy(update={"path": s.path.resolve()}) for s in config.data.sources)
    else:
        sources = (SourceConfig(path=home / DATASET),)
        _link_caches(home, folder / CACHE)
    contents = json.dumps([source.open().fingerprint for source in sources])
    return SharedData(
        sources=sources,
        fingerprint=hashlib.sha256(contents.encode()).hexdigest()[:16],
        starts=TrainingStarts.union(TrainingStarts.of_data(source.path) for source in sources),
    )


def decode(configs: Iterable[RunConfig], folder: Path) -> None:
    """Decodes the pictures once for every size in use, before parallel runs would each do it."""
    for config in {config.data.image_size: config for config in configs}.values():
        build_data(config, folder)


def link_cache(folder: Path, cell: Path) -> None:
    """Links the study's decoded pictures into a cell's folder."""
    _link(cell / CACHE, folder / CACHE)


def _link_caches(home: Path, cache: Path) -> None:
    """Links the pictures that the run has decoded, one folder for each size."""
    for marker in sorted((home / CACHE).glob("*/complete.json")):
        _link(cache / marker.parent.name, marker.parent)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and not link.exists():
        link.unlink()  # what it led to has moved
    if not link.exists():
        link.symlink_to(target.resolve(), target_is_directory=True)
