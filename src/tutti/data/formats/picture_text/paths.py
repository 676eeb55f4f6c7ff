"""Which files a set of picture-text pairs is made of, by their names alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tutti.data.formats.hdf5.paths import in_order

KINDS = (".jsonl", ".parquet", ".tar")
"""What the tables of a set are, in the order in which they are looked for."""
_FOLDERS = ("", "data")
"""Where Parquet files lie: in the folder itself, or in data/ as Hugging Face has them."""
_OTHERS = "meta"
"""A folder in which LeRobot keeps tables of its own."""


def recognises_pairs(path: Path) -> str:
    """The name of the first table; "" where there is none."""
    first = next(iter(find_tables(path) if path.name != _OTHERS else ()), None)
    return "" if first is None else str(first.relative_to(path) if path.is_dir() else first.name)


def find_tables(path: Path) -> list[Path]:
    """The file itself, or the tables of one kind in a folder, in the order of the numbers in their names."""
    if not path.is_dir():
        return [path] if path.suffix in KINDS else []
    for kind in KINDS:
        for folder in _FOLDERS[: 1 + (kind == ".parquet")]:
            if found := in_order(_files(path / folder, kind)):
                return found
    return []


def _files(folder: Path, kind: str) -> Iterator[Path]:
    if folder.is_dir():
        yield from (one for one in folder.iterdir() if one.suffix == kind and one.name[0] != ".")
