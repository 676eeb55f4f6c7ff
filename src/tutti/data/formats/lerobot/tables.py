"""Parquet tables of a data set: sizes are checked before anything is read, and each column is of its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from tutti.data.formats.chosen import MAX_TEXT, WITHOUT_TEXT
from tutti.data.formats.errors import COPY_AGAIN, data_error, no_permission
from tutti.errors import UserError
from tutti.storage.reading import shown

NO_TEXTS = ("",)
"""The instructions of a data set that has none: one that is blank."""
TABLE_BYTES, ROW_BYTES = 2**20, 2**16
"""What a table without pictures may take in memory, and what more for each of its rows."""


def check_column(
    where: Path,
    key: str,
    found: np.ndarray,
    expected: np.ndarray,
    why: str = "",
    *,
    cure: str = COPY_AGAIN,
    rows: np.ndarray | None = None,
) -> None:
    """Raises: UserError naming the first row in which a column is not what it must be; `rows` numbers them
    where they are only some of the file."""
    wrong = found != expected
    if wrong.any():
        first = int(np.argmax(wrong))
        row = first if rows is None else rows[first]
        text = f"{where}: {key} of row {row} is {found[first]}; expected {expected[first]}{why}."
        raise data_error(text, cure=cure)


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turns what Arrow raises for a damaged Parquet file, and a column it lacks, into a UserError."""
    if not path.is_file():
        raise data_error(f"{path} is missing.", expected="a Parquet file of the data set")
    try:
        yield
    except PermissionError:
        raise no_permission(path) from None
    except (pa.ArrowException, OSError, KeyError) as error:
        problem = f"{path} cannot be read as Parquet: it is truncated or damaged."
        raise data_error(problem, expected="a complete file", found=str(error).splitlines()[0]) from error


def open_parquet(path: Path, texts: Sequence[str] = ()) -> pq.ParquetFile:
    """An open Parquet file whose pages are checked; the columns `texts` stay dictionaries, as stored."""
    return pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=list(texts))


def read_parquet(
    path: Path, needed: Sequence[str], optional: Sequence[str] = (), texts: Sequence[str] = ()
) -> pa.Table:
    """Columns of a Parquet file, of the `optional` ones those that are there.

    Raises: UserError if the file is missing or damaged, lacks a needed column, or is larger than it can be.
    """
    with explain_damage(path):
        file = open_parquet(path)
        names = file.schema_arrow.names
        if stored := [name for name in texts if name in names]:
            file = open_parquet(path, stored)
        for column in needed:
            if names.count(column) != 1:
                problem = (
                    f"{path}: the column {column!r} is {'there twice' if column in names else 'missing'}."
                )
                raise data_error(problem, expected=needed, found=names)
        chosen = [*needed, *(name for name in optional if name in names)]
        size, rows = decoded_bytes(file, chosen), file.metadata.num_rows
        if size > TABLE_BYTES + ROW_BYTES * rows:
            raise data_error(
                f"{path}: {rows} rows of {chosen} take {size:,} bytes.",
                expected=f"at most {TABLE_BYTES + ROW_BYTES * rows:,}",
            )
        return file.read(columns=chosen, use_threads=False)


def decoded_bytes(file: pq.ParquetFile, columns: Sequence[str], group: int | None = None) -> int:
    """What columns take in memory, those of a row group or all, by the file's own account of them."""
    leaves = [f"{file.schema.column(place).path}." for place in range(len(file.schema))]
    places = [i for i, leaf in enumerate(leaves) if any(leaf.startswith(f"{name}.") for name in columns)]
    groups = range(file.metadata.num_row_groups) if group is None else (group,)
    chunks = (file.metadata.row_group(number).column(place) for number in groups for place in places)
    # Equal values are packed into nothing, so the count of values matters too.
    return sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)


def _check_kind(column: pa.ChunkedArray, where: str, expected: str, fits: bool, nulls: bool = False) -> None:
    if not fits or (column.null_count and not nulls):
        problem = f"{where} is of another kind."
        found = f"{column.type}, {column.null_count} rows without value"
        raise data_error(problem, expected=f"{expected} in each row", found=found)


def integers(table: pa.Table, name: str, path: Path) -> Int64[np.ndarray, " n"]:
    """A column of whole numbers. Raises: UserError."""
    _check_kind(table[name], f"{path}: {name}", "a whole number", pa.types.is_integer(table[name].type))
    return _plain(table[name]).astype(np.int64)


def _plain(column: pa.ChunkedArray) -> np.ndarray:
    """A column without missing values; that of several chunks would load pandas for this."""
    array: Any = column.combine_chunks()
    return array.to_numpy(zero_copy_only=False)


def numbers(
    table: pa.Table, name: str, path: Path, rows: np.ndarray | None = None
) -> Float64[np.ndarray, " n"]:
    """A column of finite numbers; `rows` are those of the file, where it is not all. Raises: UserError."""
    kind = table[name].type
    fits = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    _check_kind(table[name], f"{path}: {name}", "a number", fits)
    values = _plain(table[name]).astype(np.float64)
    if not (finite := np.isfinite(values)).all():
        first = int(np.argmin(finite))
        row = first if rows is None else rows[first]
        raise data_error(f"{path}: {name} of row {row} is {values[first]}.", expected="finite numbers")
    return values


def instructions(column: pa.ChunkedArray, name: str, path: Path, *, blank: bool = False) -> tuple[str, ...]:
    """The instructions in a column of `path`, a file of meta/; "" where there is none, NO_TEXTS without rows.

    Raises: UserError for one that is too long or no text, and unless `blank` is allowed for one that is
    missing or blank, with the number of episodes that have none, and for none at all.
    """
    where = f"{path}: {name}"
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    fits = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    _check_kind(column, where, "a text", fits, nulls=True)
    stored = [chunk.dictionary if pa.types.is_dictionary(column.type) else chunk for chunk in column.chunks]
    try:
        for text in (text.as_py() or "" for part in stored for text in part):
            if not (text.strip() or blank) or len(text) > MAX_TEXT:
                raise ValueError(f"{len(text):,} characters: {shown(text)}")
        if not blank and (column.null_count or not len(column)):
            missing = f"{column.null_count} rows without value" if len(column) else "a table without rows"
            raise ValueError(missing)
        return tuple(text or "" for text in column.to_pylist()) or NO_TEXTS
    except ValueError as error:  # UnicodeDecodeError is one
        problem = f"{where} holds no instruction."
        expected = f"texts of 1 to {MAX_TEXT} characters"
        cure = f"{WITHOUT_TEXT}, or write the instruction into the table."
        if count := episodes_without_text(column, path.parents[1] / "data"):
            cure += f"\n  episodes: {count}"
        raise data_error(problem, expected=expected, found=error, cure=cure) from None


def episodes_without_text(texts: pa.ChunkedArray, data: Path) -> str:
    """How many episodes of `data` have an instruction that is missing or blank, in words; empty where none
    has, or that cannot be counted."""
    try:
        trimmed: Any = pc.call_function("utf8_trim_whitespace", [texts.cast(pa.string()).fill_null("")])
        bad = np.flatnonzero(pc.call_function("equal", [trimmed, pa.scalar("")]).to_numpy())
        told: dict[bool, set[int]] = {True: set(), False: set()}
        for path in sorted(data.glob("*/*.parquet")):
            table = read_parquet(path, ["episode_index", "task_index"])
            without = np.isin(integers(table, "task_index", path), bad)
            episodes = integers(table, "episode_index", path)
            for side, known in told.items():
                known.update(np.unique(episodes[without == side]).tolist())
    except (pa.ArrowException, UserError):
        return ""
    count, all_of_them = len(told[True]), len(told[True] | told[False])
    return f"{count} of {all_of_them} have no instruction" if count else ""
