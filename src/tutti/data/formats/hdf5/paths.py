"""Which files an HDF5 data set is made of, by their names: found without the HDF5 library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tutti.data.formats.errors import data_error

SUFFIXES = (".hdf5", ".h5")


def recognises_hdf5(path: Path) -> str:
    """The name of the file, or of the first in the folder; "" where there is none."""
    return next((one.name for one in sorted(_files(path)) if one.suffix in SUFFIXES and one.is_file()), "")


def find_files(path: Path) -> list[Path]:
    """The file itself, or the HDF5 files in a folder, in the order of the numbers in their names.

    Raises: UserError if there is none.
    """
    if not path.is_dir():
        return [path]
    files = [one for one in _files(path) if one.suffix in SUFFIXES]
    if not files:
        problem = f"{path} has no file *{' or *'.join(SUFFIXES)}."
        raise data_error(problem, cure="name a file, or the folder in which the files lie.")
    return in_order(files)


def in_order(files: Iterable[Path]) -> list[Path]:
    """In the order of the numbers in their names; of 2 and 02 that first which is first as text,
    in whatever order the file system has them."""
    return sorted(sorted(files), key=lambda one: by_number(one.name))


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or the files in a folder without hidden ones, in any order."""
    yield from (one for one in path.iterdir() if one.name[0] != ".") if path.is_dir() else (path,)


def by_number(name: str) -> list[tuple[int, str]]:
    """A key for sorting: episode_2 comes before episode_10."""
    parts = re.split(r"(\d{1,18})", name)
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(parts)]
