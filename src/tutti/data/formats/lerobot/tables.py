"""Parquet tables of a data set: sizes are looked at before anything is read, and columns are of their kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from tutti.errors import UserError
from tutti.storage.reading import shown

COPY_AGAIN = "copy or record the data set again."
MAX_TEXT = 4096
"""Characters of an instruction."""
FREE_BYTES, ROW_BYTES = 2**20, 2**16
"""What a table without pictures may hold, and what it may hold more for each of its rows."""


def data_error(
    problem: str, *, expected: object = "", found: object = "", cure: str = COPY_AGAIN
) -> UserError:
    """The message for a data set that is wrong; `expected` and `found` where `problem` does not say them."""
    lines = {"expected": expected, "found": found, "cure": cure}
    texts = [
        f"\n  {name + ':':9} {shown(str(text), 500, quoted=False)}" for name, text in lines.items() if text
    ]
    return UserError(problem + "".join(texts))


def first_true(wrong: np.ndarray) -> int:
    """The first row where `wrong` is true, -1 where it nowhere is."""
    return int(np.argmax(wrong)) if wrong.any() else -1


def open_parquet(path: Path) -> pq.ParquetFile:
    """An open Parquet file; UserError where it is missing, damaged or has a column twice."""
    if not path.is_file():
        raise data_error(f"{path} is missing.", expected="a Parquet file of the data set")
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    names = file.schema_arrow.names
    if twice := {name for name in names if names.count(name) > 1}:
        raise data_error(f"{path}: the columns {sorted(twice)} are there more than once.")
    return file


def read_parquet(path: Path, columns: list[str], texts: str | None = None) -> pa.Table:
    """Some columns of a Parquet file; `texts` may name one that comes as a dictionary, as it was stored.

    Raises: UserError where it is missing, damaged, lacks a column, or is larger than its rows can be.
    """
    file = open_parquet(path)
    names = file.schema_arrow.names
    for column in columns:
        if column not in names:
            raise data_error(f"{path}: the column {column!r} is missing.", expected=columns, found=names)
    size, most = decoded_bytes(file, columns), FREE_BYTES + ROW_BYTES * file.metadata.num_rows
    if size > most:
        raise data_error(
            f"{path}: {file.metadata.num_rows} rows of {columns} take {size:,} bytes.",
            expected=f"at most {most:,}",
        )
    try:
        if texts is not None:
            file = pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=[texts])
        return file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def decoded_bytes(file: pq.ParquetFile, columns: list[str], group: int | None = None) -> int:
    """What columns take in memory, of one row group or of all, from the file's own account of it."""
    metadata, total = file.metadata, 0
    for number in range(metadata.num_row_groups) if group is None else (group,):
        row_group = metadata.row_group(number)
        for place in range(row_group.num_columns):
            chunk = row_group.column(place)
            path = chunk.path_in_schema
            if any(path == name or path.startswith(f"{name}.") for name in columns):
                total += max(chunk.total_uncompressed_size, 8 * chunk.num_values)
    return total


def _damaged(path: Path, error: Exception) -> UserError:
    problem = f"{path} cannot be read as Parquet: it is truncated or damaged."
    return data_error(problem, expected="a complete file", found=str(error).splitlines()[0])


def _column(table: pa.Table, name: str, path: Path, expected: str, fits: bool) -> pa.ChunkedArray:
    column = table[name]
    if not fits or column.null_count:
        nulls = f", {column.null_count} rows without value" if column.null_count else ""
        raise data_error(f"{path}: the column {name!r} is of another kind.", expected=expected, found=f"{column.type}{nulls}")
    return column


def integers(table: pa.Table, name: str, path: Path) -> Int64[np.ndarray, " n"]:
    """A column of whole numbers, one in each row. Raises: UserError."""
    kind = table[name].type
    fits = pa.types.is_integer(kind)
    column = _column(table, name, path, "a whole number in each row", fits)
    return column.to_numpy().astype(np.int64)


def numbers(table: pa.Table, name: str, path: Path) -> Float64[np.ndarray, " n"]:
    """A column of finite numbers, one in each row. Raises: UserError."""
    kind = table[name].type
    fits = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    values = _column(table, name, path, "a number in each row", fits).to_numpy().astype(np.float64)
    if (row := first_true(~np.isfinite(values))) >= 0:
        raise data_error(f"{path}: {name} of row {row} is {values[row]}.", expected="finite numbers")
    return values


def instructions(path: Path, name: str) -> tuple[str, ...]:
    """The texts of a column, as they are. Raises: UserError for one that is missing, blank, too long or no text."""
    column = read_parquet(path, [name], texts=name)[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    fits = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    column = _column(pa.table({name: column}), name, path, "a text in each row", fits)
    if pa.types.is_dictionary(column.type):
        lengths = [len(text) for chunk in column.chunks for text in chunk.dictionary.to_numpy(False)]
        if lengths and max(lengths) > MAX_TEXT:
            raise _bad_text(path, name, f"a text of {max(lengths):,} characters")
    try:
        texts = tuple(column.to_pylist())
    except UnicodeDecodeError:
        raise _bad_text(path, name, "bytes that are not UTF-8") from None
    for row, text in enumerate(texts):
        if not text.strip() or len(text) > MAX_TEXT:
            raise _bad_text(path, f"{name} of row {row}", f"{len(text):,} characters, {shown(text)}")
    return texts


def _bad_text(path: Path, where: str, found: str) -> UserError:
    return data_error(
        f"{path}: {where} is no instruction.",
        expected=f"a text of 1 to {MAX_TEXT} characters",
        found=found,
        cure="write the instruction into the table, or leave these episodes out of the data set.",
    )
