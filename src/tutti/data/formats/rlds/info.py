"""dataset_info.json of a TFDS version folder: the splits and their files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.errors import near_miss
from tutti.storage.reading import read_json, shown

FORMATS = ("tfrecord", "array_record")
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
MAX_SHARDS = 100_000
_Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^/\x00]+$")]
_Count = Annotated[int, Field(ge=0, le=10**10)]


class Split(BaseModel):
    """A split: its name, how many episodes each of its files has, and how they are called."""

    name: _Name
    shardLengths: Annotated[list[_Count], Field(max_length=MAX_SHARDS)] = []
    numShards: Annotated[int, Field(ge=0, le=MAX_SHARDS)] = 0
    filepathTemplate: str = Field(default=TEMPLATE, max_length=500)


class Info(BaseModel):
    """What is read of dataset_info.json; 64-bit numbers are texts there."""

    name: _Name
    version: str = Field(default="", max_length=100)
    fileFormat: str = Field(default="tfrecord", max_length=100)
    splits: list[Split] = Field(min_length=1, max_length=1000)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a split; `count` are its episodes, None where dataset_info.json does not say it."""

    path: Path
    count: int | None


def find_version(path: Path) -> Path | None:
    """`path`, or the highest version below it, whichever has a features.json."""
    if (path / "features.json").is_file():
        return path
    found = [one for one in path.glob("*.*.*") if re.fullmatch(r"\d{1,9}(\.\d{1,9}){2}", one.name)]
    versions = [one for one in found if (one / "features.json").is_file()]
    return max(versions, key=lambda one: tuple(map(int, one.name.split("."))), default=None)


def version_folder(path: Path) -> Path:
    """The folder to read. Raises: UserError if there is none, or a file of it is missing."""
    folder = find_version(path)
    if folder is None:
        names = shown(sorted(one.name for one in path.iterdir()), 300) if path.is_dir() else "no such folder"
        expected = "a version folder (1.0.0) with dataset_info.json and features.json, or the folder above it"
        cure = "give the version folder, copied as a whole (sources.path)."
        raise data_error(f"{path} is no TFDS data set.", expected=expected, found=names, cure=cure)
    if not (folder / "dataset_info.json").is_file():
        cure = "copy the version folder as a whole."
        raise data_error(f"{folder / 'dataset_info.json'} is missing.", cure=cure)
    return folder


def read_info(folder: Path) -> Info:
    """Reads and checks dataset_info.json. Raises: UserError, also for a format that is not read."""
    path = folder / "dataset_info.json"
    try:
        info = Info.model_validate(read_json(path, links=True, cure=f"Cure: {COPY_AGAIN}"))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{path}: {shown('.'.join(map(str, first['loc'])), quoted=False)} is wrong."
        raise data_error(problem, expected=first["msg"], found=shown(first["input"])) from None
    if info.fileFormat not in FORMATS:
        problem = f"{path}: fileFormat {shown(info.fileFormat)} is not read."
        cure = "write the set anew as tfrecord: tfds convert_format."
        raise data_error(problem, expected=" or ".join(FORMATS), cure=cure)
    return info


def choose_splits(info: Info, wanted: str | None, where: Path) -> tuple[list[Split], str]:
    """The split `wanted`; without one train, or all in their order where there is no train. And a remark."""
    names = [split.name for split in info.splits]
    if wanted is None and "train" not in names:
        return info.splits, f"all splits are read: {', '.join(names)} (sources.split)" * (len(names) > 1)
    name = wanted or "train"
    if name == "all":
        return info.splits, ""
    if name not in names:
        problem = f"{where} has no split {shown(name)}."
        expected = f"all, {', '.join(names)}.{near_miss(name, names)}"
        raise data_error(problem, expected=expected, cure="correct sources.split.")
    others = ", ".join(one for one in names if one != name)
    remark = f"the split {name} is read; {others} not (sources.split)" * (wanted is None and len(names) > 1)
    return [split for split in info.splits if split.name == name], remark


def shards(folder: Path, info: Info, splits: Sequence[Split]) -> list[Shard]:
    """The files of these splits in their order. Raises: UserError if one is missing."""
    found: list[Shard] = []
    for split in splits:
        total = len(split.shardLengths) or split.numShards
        counts: list[int | None] = [*split.shardLengths] or [None] * total
        for number, count in enumerate(counts):
            name = _filled(folder, split, info, number, total)
            found.append(Shard(folder / name, count))
    missing = [shard.path for shard in found if not shard.path.is_file()]
    if missing:
        names = sorted(path.name for path in folder.iterdir() if info.fileFormat in path.name)
        lie = f"{len(names):,} files such as {names[0]}" if names else "no such file"
        problem = f"{missing[0]} is missing, {len(missing):,} of {len(found):,} files; "
        problem += "dataset_info.json names them."
        raise data_error(problem, found=shown(lie, 300, quoted=False), cure="copy the data set as a whole.")
    if not found:
        raise data_error(f"{folder / 'dataset_info.json'}: the splits have no shards.")
    return found


def _filled(folder: Path, split: Split, info: Info, number: int, total: int) -> str:
    """A file's name by its template: plain fields alone, and no path, which could lead out of the folder."""
    values = {
        **{"DATASET": info.name, "SPLIT": split.name, "FILEFORMAT": info.fileFormat},
        **{"SHARD_INDEX": f"{number:05d}", "NUM_SHARDS": f"{total:05d}"},
        "SHARD_X_OF_Y": f"{number:05d}-of-{total:05d}",
    }
    name = re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), split.filepathTemplate)
    if re.search(r"[{}/\\\0]", name) or name in ("", ".", ".."):
        problem = f"{folder / 'dataset_info.json'}: filepathTemplate is {shown(split.filepathTemplate)}."
        raise data_error(problem, expected=f"a file's name with {', '.join(values)}")
    return name
