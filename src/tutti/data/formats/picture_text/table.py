"""PairTable, what each kind of file gives: columns of pictures and of texts, a row for each pair."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tutti.data.content import digest
from tutti.data.formats.errors import data_error
from tutti.errors import UserError
from tutti.storage.reading import open_plain, shown

MAX_PICTURE, MAX_TEXT_BYTES = 2**26, 2**20
"""Bytes of one encoded picture, and of one text or JSON with texts."""
MAX_COLUMNS = 256
SAMPLED = 2**13
"""Bytes at the beginning and at the end of a picture that its digest looks at."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""What names of pictures end with."""
LEAVE_OUT = "repair or remove this pair."


class PairTable(ABC):
    """Rows with encoded pictures and with texts, by the names of columns. It is opened fast: of pictures
    only where they lie is known. `passed_over` are columns that are neither. `for_threads`: pictures may be
    read by several threads at once.

    Raises: UserError for a damaged file when it is opened, for a damaged row when that is asked for.
    """

    pictures: tuple[str, ...]
    texts: tuple[str, ...]
    passed_over: tuple[str, ...] = ()
    count: int
    for_threads: bool = True

    @abstractmethod
    def where(self, row: int) -> str:
        """The file and the place in it, for messages."""

    @abstractmethod
    def text(self, key: str, row: int) -> str:
        """The text of a row, "" where it has none."""

    @abstractmethod
    def picture(self, key: str, row: int) -> bytes:
        """The encoded picture of a row."""

    @abstractmethod
    def picture_file(self, key: str, row: int) -> Path:
        """The file that the picture of a row is in."""

    def sampled(self, key: str, row: int) -> int:
        """A digest of the picture's length, beginning and end."""
        content = self.picture(key, row)
        return digest(len(content).to_bytes(8, "little"), content[:SAMPLED], content[-SAMPLED:])

    def wrong(self, row: int, problem: str, expected: object = "", found: object = "") -> UserError:
        """The error for a row."""
        return data_error(f"{self.where(row)}: {problem}.", expected=expected, found=found, cure=LEAVE_OUT)


class StretchTable(PairTable):
    """A table whose pictures lie in files as they are, from one byte to another."""

    def beside(self, folder: Path, key: str, row: int, name: str) -> tuple[Path, int, int | None]:
        """The whole of a file that a row names by its path from the table's folder.

        Raises: UserError for a path that leaves it.
        """
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
            expected = "a path that begins at the table's folder and stays in it"
            raise self.wrong(row, f"{shown(key)} names no picture", expected, shown(name))
        return folder / path, 0, None

    @abstractmethod
    def stretch(self, key: str, row: int) -> tuple[Path, int, int | None]:
        """File, first byte and number of bytes of a picture; None: all that follow."""

    def picture_file(self, key: str, row: int) -> Path:
        """That of the stretch."""
        return self.stretch(key, row)[0]

    def picture(self, key: str, row: int) -> bytes:
        """Read from its file."""
        with self._opened(key, row) as (file, size):
            return file.read(size)

    def sampled(self, key: str, row: int) -> int:
        """As of every table, without the bytes between."""
        with self._opened(key, row) as (file, size):
            begin = file.tell()
            first = file.read(min(SAMPLED, size))
            file.seek(begin + max(0, size - SAMPLED))
            return digest(size.to_bytes(8, "little"), first, file.read(min(SAMPLED, size)))

    @contextmanager
    def _opened(self, key: str, row: int) -> Iterator[tuple[BinaryIO, int]]:
        """The file at the first byte of a picture, and the picture's size."""
        path, first, size = self.stretch(key, row)
        try:
            file = open_plain(path)
        except UserError as error:
            raise self.wrong(row, f"the picture cannot be read: {error}") from None
        with file:
            size = os.fstat(file.fileno()).st_size - first if size is None else size
            if not 0 < size <= MAX_PICTURE:
                found = f"{size:,} in {path}"
                raise self.wrong(row, "the picture is no file", f"1 to {MAX_PICTURE:,} bytes", found)
            file.seek(first)
            yield file, size
