"""Where the episodes of an RLDS set lie in its files, and how many steps each has."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from tutti.data.formats.errors import data_error
from tutti.data.formats.rlds.example import Record
from tutti.data.formats.rlds.info import Shard
from tutti.data.formats.rlds.records import MAX_RECORD, Place, read_record, scan_records
from tutti.errors import UserError
from tutti.storage.files import write_atomically

_FORMAT = 1
_SLOW = 1.0
"""Seconds of indexing from which on the index is kept."""


class EpisodeIndex:
    """The records of some shards, in their order, and `steps` of each.

    Raises: UserError for damaged headers, or another number of records than dataset_info.json says.
    """

    def __init__(self, files: Sequence[Shard], format_: str, clock: str, cache: Path | None) -> None:
        self._files, self._format = files, format_
        kept = cache and cache / "rlds" / f"{self._key(clock)}.npy"
        table = _read_table(kept) if kept else None
        if table is None:
            started = time.monotonic()
            rows = [
                (number, *place) for number, shard in enumerate(files) for place in self._scan(shard, clock)
            ]
            table = np.array(rows, np.int64).reshape(-1, 5)
            if kept and time.monotonic() - started > _SLOW:
                buffer = io.BytesIO()
                np.save(buffer, table, allow_pickle=False)
                with suppress(UserError):  # a cache that cannot be written costs time alone
                    write_atomically(kept, buffer.getvalue())
        if not len(table):
            raise data_error(f"{files[0].path.parent} has no episode in {len(files):,} files.")
        self._table = table

    @property
    def steps(self) -> Int64[np.ndarray, " e"]:
        """How many steps each episode has."""
        return self._table[:, 4].copy()

    def place(self, episode: int) -> Place:
        """Where an episode lies in its file; the checksum of an array_record is -1, its offset a number."""
        return Place(*self._table[episode, 1:].tolist())

    def path(self, episode: int) -> Path:
        """The file of an episode."""
        return self._files[int(self._table[episode, 0])].path

    def read(self, episode: int) -> bytes:
        """The record of an episode. Raises: UserError if it is damaged."""
        path, place = self.path(episode), self.place(episode)
        if self._format == "tfrecord":
            return read_record(path, place)
        return _read_array_record(path, place.offset)

    def _key(self, clock: str) -> str:
        status = [(str(one.path.resolve()), one.path.stat()) for one in self._files]
        files = [(path, one.st_size, one.st_mtime_ns) for path, one in status]
        return hashlib.sha256(json.dumps([_FORMAT, clock, self._format, files]).encode()).hexdigest()[:24]

    def _scan(self, shard: Shard, clock: str) -> Iterator[Place]:
        count = 0
        scan = scan_records if self._format == "tfrecord" else _scan_array_record
        for place in scan(shard.path, clock):
            yield place
            count += 1
        if shard.count is not None and count != shard.count:
            raise data_error(
                f"{shard.path} has {count:,} records.",
                expected=f"{shard.count:,}, by shardLengths of dataset_info.json",
            )


def _read_table(path: Path) -> Int64[np.ndarray, "e 5"] | None:
    """An index that was kept; None where there is none, or it is damaged."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.dtype == np.int64 and table.ndim == 2 and table.shape[1] == 5 else None


@contextmanager
def _array_record(path: Path) -> Iterator[Any]:
    """The reader of an array_record file; what its package raises becomes a message."""
    try:
        from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
            ArrayRecordReader,
        )
    except ImportError:
        cure = "pip install array_record, or write the set anew as tfrecord."
        raise data_error(f"{path} is an array_record file, whose package is missing.", cure=cure) from None
    try:
        reader = ArrayRecordReader(str(path))
        try:
            yield reader
        finally:
            reader.close()
    except UserError:
        raise
    except Exception as error:
        raise data_error(f"{path} is damaged.", expected="an array_record file", found=error) from None


def _read_array_record(path: Path, number: int) -> bytes:
    with _array_record(path) as reader:
        return reader.read([number])[0]


def _scan_array_record(path: Path, clock: str) -> Iterator[Place]:
    """Its records have no headers that lead to the steps: each is read once."""
    with _array_record(path) as reader:
        for number in range(reader.num_records()):
            content = reader.read([number])[0]
            if len(content) > MAX_RECORD:
                raise data_error(f"{path}: record {number} has {len(content):,} bytes.")
            record = Record(content, f"{path}: record {number}")
            yield Place(number, len(content), -1, record.count(clock))
