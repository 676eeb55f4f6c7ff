"""What the meta folder of a LeRobotDataset says, in any version: info.json read, and the checked tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutti.data.formats.chosen import Selection, excluding
from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.data.formats.interface import MAX_FPS, MIN_FPS
from tutti.data.formats.lerobot.features import Feature
from tutti.data.formats.lerobot.modality import TEXT_COLUMN, Modality
from tutti.storage.reading import read_json, shown

OTHER = "give the folder that contains meta/ and data/ (sources.path)."
MAX_FRAMES = 10**10
"""Largest number of frames that a data set may have."""


class Info(BaseModel):
    """What is read of info.json."""

    model_config = ConfigDict(strict=True)

    codebase_version: str = Field(max_length=40)
    fps: float = Field(ge=MIN_FPS, le=MAX_FPS)
    robot_type: str | None = Field(None, max_length=200)
    total_episodes: int = Field(gt=0, le=MAX_FRAMES)
    total_frames: int = Field(gt=0, le=MAX_FRAMES)
    total_tasks: int = Field(ge=0, le=MAX_FRAMES)
    chunks_size: int = Field(1000, gt=0, le=MAX_FRAMES)
    data_path: str | None = None
    video_path: str | None = None
    features: dict[Annotated[str, Field(max_length=200)], Feature]

    @property
    def file_an_episode(self) -> bool:
        """Whether each episode has files of its own, as in v2.0 and v2.1; in v3 larger ones hold many."""
        return self.codebase_version.removeprefix("v").startswith("2.")

    def check_total(self, key: str, found: int, where: Path) -> None:
        """Raises: UserError if what was counted in the tables is not the `total_` of this key."""
        if found != (total := getattr(self, f"total_{key}")):
            raise data_error(
                f"{where} has {found} {key} in all, but meta/info.json says total_{key} = {total}."
            )


@dataclass(frozen=True, slots=True)
class VideoTable:
    """Where each episode's video lies: its file, and the seconds in that file at which it starts and ends."""

    paths: tuple[Path, ...]
    from_timestamp: Float64[np.ndarray, " e"]
    to_timestamp: Float64[np.ndarray, " e"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeRobotMeta(Selection):
    """The checked content of `meta/`. `starts` and `lengths` of the episodes are in frame rows of the files;
    `texts` are the instructions of each, where the episode table names them. Of episodes that are not `kept`
    nothing but their place is checked. `modality` is what GR00T's modality.json says, empty where there is
    none.
    """

    folder: Path
    info: Info
    tasks: tuple[str, ...]
    starts: Int64[np.ndarray, " e"]
    lengths: Int64[np.ndarray, " e"]
    texts: tuple[frozenset[str], ...] | None
    data_files: tuple[Path, ...]
    videos: dict[str, VideoTable]
    tolerance: float
    modality: Modality

    @property
    def tables(self) -> tuple[str, str]:
        """The files of the instructions and of the episodes, for messages."""
        of_v3 = "meta/tasks.parquet", "meta/episodes"
        return ("meta/tasks.jsonl", "meta/episodes.jsonl") if self.info.file_an_episode else of_v3

    @property
    def text_column(self) -> str:
        """The column that says which task is the instruction of a row."""
        column = self.modality.text_column
        return column if self.modality.text or column in self.info.features else TEXT_COLUMN


def read_info(folder: Path) -> Info:
    """Reads and checks `folder/meta/info.json` alone."""
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise data_error(f"{folder} is no LeRobotDataset: meta/info.json is missing.", cure=OTHER)
    values = read_json(path, finite=True, links=True, cure=f"Cure: {COPY_AGAIN}")
    version = str(values.get("codebase_version"))
    if version.removeprefix("v")[:2] not in ("2.", "3."):
        cure = "LeRobot's older scripts convert v1 to v2.0."
        problem = f"{path}: a LeRobot data set of version {version!r:.40}; expected 'v2.0', 'v2.1' or 'v3.x'."
        raise data_error(problem, cure=cure)
    try:
        return Info.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{path}: {shown('.'.join(map(str, first['loc'])), quoted=False)} is wrong."
        raise data_error(problem, expected=first["msg"], found=shown(first["input"])) from None


def require_file(path: Path, table: str, episodes: Iterable[int]) -> None:
    """Raises: UserError if a file of these episodes, which `table` names, is not there."""
    if not path.is_file():
        cure = f"{COPY_AGAIN} Or leave its episodes out: {excluding(list(episodes))}"
        raise data_error(f"{path} is missing; {table} names it.", cure=cure)


def fill_pattern(where: Path, key: str, pattern: str | None, values: dict[str, Any]) -> PurePosixPath:
    """The path that a pattern of info.json names: inside of the data set, and with plain fields alone, since
    Python's formats reach into objects and fill the memory."""
    text = ""
    try:
        for literal, field, form, conversion in Formatter().parse(pattern or ""):
            text += literal
            if field is not None:
                if field not in values or conversion or not re.fullmatch(r"(0?\d)?d?", form or ""):
                    raise ValueError(field)
                text += format(values[field], form or "")
    except ValueError:
        text = ""
    path = PurePosixPath(text)
    if not text or len(text) > 500 or path.is_absolute() or ".." in path.parts or "\0" in text:
        problem = f"{where}: {key} is {shown(pattern)}; expected a path in the data set with {tuple(values)}."
        raise data_error(problem)
    return path
