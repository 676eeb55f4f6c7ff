"""Parquet files with pictures, as bytes or as paths, and texts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tutti.data.formats.errors import data_error
from tutti.data.formats.lerobot.tables import decoded_bytes, explain_damage, open_parquet, read_parquet
from tutti.data.formats.picture_text.table import (
    MAX_COLUMNS,
    MAX_PICTURE,
    SUFFIXES,
    PairTable,
    StretchTable,
)
from tutti.storage.opened import Opened

GROUP_BYTES, ROWS, OPEN_FILES = 2**31, 16, 16
"""Bytes of the pictures in a row group, at most; rows that are read at once; files that are kept open."""


@dataclass(slots=True)
class _Reading:
    """Rows of a row group that are read in order: `batch` begins at row `begin` of the file."""

    batches: Iterator[pa.RecordBatch]
    begin: int
    batch: pa.RecordBatch | None = None


class ParquetTable(StretchTable):
    """The rows of `files`, which have the same columns. Pictures are bytes, structs of bytes and path as
    Hugging Face writes them, or paths from the file's own folder; texts are strings. Neighbouring rows are
    read together: rising ones are fast.
    """

    for_threads = False  # it goes on in the row group that it read last

    def __init__(self, files: Sequence[Path]) -> None:
        # Its own, since another table may be of the same files after they have changed.
        self._open = Opened(_opened, OPEN_FILES, lambda file: file.close())
        self._files, counts = files, [self._open[path].metadata.num_rows for path in files]
        self._starts = [0, *accumulate(counts)]
        self.count = self._starts[-1]
        self._texts: dict[str, list[pa.ChunkedArray]] = {}
        self._reading: tuple[tuple[str, Path, int], _Reading] | None = None
        with explain_damage(files[0]):
            schema = self._open[files[0]].schema_arrow
        if len(schema) > MAX_COLUMNS:
            raise data_error(f"{files[0]}: {len(schema)} columns.", expected=f"at most {MAX_COLUMNS}")
        self._bytes = [one.name for one in schema if _holds_bytes(one.type)]
        texts = [one.name for one in schema if _is_text(one.type)]
        paths = [key for key in texts if self._first(key).lower().endswith(SUFFIXES)]
        self.pictures = (*self._bytes, *paths)
        self.texts = tuple(key for key in texts if key not in paths)
        self.passed_over = tuple(one.name for one in schema if one.name not in (*self._bytes, *texts))

    def _first(self, key: str) -> str:
        """The first text of a column that is not empty, of some."""
        few = range(min(self.count, MAX_COLUMNS))
        return next((text for row in few if (text := self.text(key, row))), "")

    def where(self, row: int) -> str:
        """The file and the row in it."""
        file, own = self._place(row)
        return f"{self._files[file]}, row {own}"

    def text(self, key: str, row: int) -> str:
        """The value of a column, "" where it is null."""
        if key not in self._texts:
            self._texts[key] = [read_parquet(path, [key])[key] for path in self._files]
        file, own = self._place(row)
        try:
            value = self._texts[key][file][own].as_py()
        except UnicodeDecodeError as error:
            raise self.wrong(row, f"{key!r} is no UTF-8", found=error) from None
        return value or ""

    def picture(self, key: str, row: int) -> bytes:
        """The bytes in the table, or of the file that it names."""
        content = self._stored(key, row)
        return super().picture(key, row) if content is None else content

    def picture_file(self, key: str, row: int) -> Path:
        """The table, which has the bytes; of a column of paths the file that it names."""
        return self._files[self._place(row)[0]] if key in self._bytes else super().picture_file(key, row)

    def sampled(self, key: str, row: int) -> int:
        """As of every table."""
        return (
            super().sampled(key, row) if self._stored(key, row) is None else PairTable.sampled(self, key, row)
        )

    def stretch(self, key: str, row: int) -> tuple[Path, int, int | None]:
        """The whole file that the row names."""
        value = self._value(key, row)["path"] if key in self._bytes else self.text(key, row)
        return self.beside(self._files[self._place(row)[0]].parent, key, row, value or "")

    def _stored(self, key: str, row: int) -> bytes | None:
        """The bytes in the table; None where it names a file."""
        if key not in self._bytes:
            return None
        value = self._value(key, row)
        content = value["bytes"]
        if content is None and not value.get("path"):
            raise self.wrong(row, f"{key!r} is empty")
        if content is not None and not 0 < len(content) <= MAX_PICTURE:
            raise self.wrong(
                row, f"{key!r} is no picture", f"1 to {MAX_PICTURE:,} bytes", f"{len(content):,}"
            )
        return content

    def _value(self, key: str, row: int) -> dict[str, Any]:
        """The struct of a row; a column of bytes is one without a path."""
        number, own = self._place(row)
        path = self._files[number]
        file = self._open[path]
        with explain_damage(path):
            sizes = (file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
            starts = [0, *accumulate(sizes)]
            group = bisect_right(starts, own) - 1
            at = (key, path, group)
            if self._reading is None or self._reading[0] != at or own < self._reading[1].begin:
                self._check_group(file, path, key, group)
                rows = file.iter_batches(
                    batch_size=ROWS, row_groups=[group], columns=[key], use_threads=False
                )
                self._reading = (at, _Reading(rows, starts[group]))
            reading = self._reading[1]
            while reading.batch is None or own >= reading.begin + len(reading.batch):
                reading.begin += len(reading.batch or ())
                if (batch := next(reading.batches, None)) is None:
                    self._reading = None
                    raise data_error(f"{path} has fewer rows than it says.")
                reading.batch = batch
            value = reading.batch.column(0)[own - reading.begin].as_py()
        return value if isinstance(value, dict) else {"bytes": value}

    @staticmethod
    def _check_group(file: pq.ParquetFile, path: Path, key: str, group: int) -> None:
        if key not in file.schema_arrow.names:
            raise data_error(f"{path}: the column {key!r} is missing.", found=file.schema_arrow.names)
        if not _holds_bytes(kind := file.schema_arrow.field(key).type):
            raise data_error(f"{path}: {key!r} is of another kind.", expected="bytes", found=kind)
        if (size := decoded_bytes(file, [key], group)) > GROUP_BYTES:
            raise data_error(
                f"{path}: the pictures {key!r} of row group {group} take {size:,} bytes.",
                expected=f"at most {GROUP_BYTES:,}",
                cure="write it with smaller row groups (row_group_size=100).",
            )

    def _place(self, row: int) -> tuple[int, int]:
        """The number of the file, and the row in it."""
        file = bisect_right(self._starts, row) - 1
        return file, row - self._starts[file]


def _opened(path: Path) -> pq.ParquetFile:
    with explain_damage(path):
        return open_parquet(path)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = [kind.field(place).name for place in range(kind.num_fields)]
        return sorted(names) == ["bytes", "path"] and _holds_bytes(kind.field(names.index("bytes")).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
