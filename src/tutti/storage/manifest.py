"""The manifest of a checkpoint or an export: its files with sizes and checksums, verified when read.

state.json (of a checkpoint) and export.json (of an export) hold a table `files`: name -> {"bytes", "crc32"}
or {"bytes", "sha256"}. A file is found by its name in that table and never by looking into the folder. It
must be a regular file inside the folder: a pipe or a device would block the reader, a link could lead
anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from tutti.errors import UserError
from tutti.storage.layout import EXPORT, STATE
from tutti.storage.reading import MAX_VALUES, count_values

MAX_TEXT = 1 << 26
"""Bytes of a text file (a manifest, a config, a tokenizer); a larger one is refused unread."""
PIECE = 1 << 24
Size = dict[str, Any]
"""bytes, and crc32 or sha256, of a file."""

_NAME = re.compile(r"(shards/)?(?!\.\.?$)[\w.][\w.-]*")
_CHECKSUMS = {"crc32": int, "sha256": str}


class Crc32:
    """The checksum of `zlib.crc32` with the methods of a hash of hashlib."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, piece: Any) -> None:
        """Adds the bytes of `piece`."""
        self.value = zlib.crc32(piece, self.value)


def sha256_of(data: bytes) -> Size:
    """The entry of a file with this content in the manifest of an export."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def crc32_of(data: bytes) -> Size:
    """The entry of a file with this content in the manifest of a checkpoint."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Opens a regular file of the folder for reading.

    Raises: OSError if it cannot be opened; UserError if it is no regular file, or a link that leads outside.
    """
    home, path = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    if not path.is_relative_to(home):
        raise UserError(
            f"{folder / name}: expected a file of this folder, found a link to {path}. Put a copy of the "
            "file in its place."
        )
    # Not blocking: between the look and the opening a pipe could take the file's place.
    if stat.S_ISREG(path.stat().st_mode):
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise UserError(f"{folder / name}: expected a regular file, found a folder, a pipe or a device.")


def read_inside(folder: Path, name: str, most: int) -> bytes:
    """The content of a regular file of the folder.

    Raises: as `open_inside`; ValueError if it is larger than `most` bytes.
    """
    with open_inside(folder, name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    return content


@dataclass(frozen=True, slots=True)
class Manifest:
    """`table` is all of the JSON file `name` in `folder`; `files` are the files that it lists."""

    folder: Path
    name: str
    table: dict[str, Any]
    files: dict[str, Size]

    @classmethod
    def of(cls, folder: Path, name: str = STATE) -> Self:
        """Reads the manifest `name` of a folder.

        Raises: UserError if it is missing, is no such table, or lists a name that is not a plain one.
        """
        try:
            text = read_inside(folder, name, MAX_TEXT)
            if count_values(text) > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES} values")
            table = json.loads(text)
            return cls(folder, name, table, _checked(table))
        except OSError as error:
            raise _error(folder, name, name, error) from error
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            what = "an export's manifest" if name == EXPORT else "a checkpoint's state"
            raise _error(folder, name, name, f"not readable as {what} ({error}).") from error

    def read(self, name: str, most: int | None = None) -> bytes:
        """The content of a listed file of at most `most` bytes, which has the size and the checksum listed.

        Raises: UserError if it is not listed, missing, too large, truncated or changed.
        """
        size = self._entry(name)["bytes"]
        if most is not None and size > most:
            raise self._error(name, f"expected at most {most} bytes, found {size}.")
        return b"".join(self._pieces(name))

    def text(self, name: str) -> str:
        """`read` of a text file.

        Raises: UserError as `read`, or if it is not UTF-8.
        """
        try:
            return self.read(name, MAX_TEXT).decode()
        except UnicodeDecodeError as error:
            raise self._error(name, f"not a text in UTF-8 ({error}).") from error

    def check(self, name: str) -> None:
        """As `read`, but the content is not kept."""
        for _ in self._pieces(name):
            pass

    def check_sizes(self) -> None:
        """Raises: UserError if a listed file is missing or has another size."""
        for name in self.files:
            self.opened(name).close()

    def _entry(self, name: str) -> Size:
        if name not in self.files:
            raise self._error(self.name, f"lists no file {name}.")
        return self.files[name]

    def _error(self, name: str, problem: str | OSError) -> UserError:
        return _error(self.folder, self.name, name, problem)

    def opened(self, name: str) -> BinaryIO:
        """A listed file, found to have the size listed. Raises: UserError if not."""
        expected = self._entry(name)["bytes"]
        try:
            file = open_inside(self.folder, name)
        except OSError as error:
            raise self._error(name, error) from error
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            file.close()
            damage = "truncated" if size < expected else "damaged"
            raise self._error(name, f"{damage}, {expected} bytes expected, {size} found.")
        return file

    def _pieces(self, name: str) -> Iterator[bytes]:
        """The content. What is wrong with it is raised after the last piece."""
        expected = self._entry(name)
        digest = Crc32() if "crc32" in expected else hashlib.sha256()
        with self.opened(name) as file:
            while piece := self._piece(file, name):
                digest.update(piece)
                yield piece
        checksum = digest.value if isinstance(digest, Crc32) else digest.hexdigest()
        if checksum not in (expected.get("crc32"), expected.get("sha256")):
            raise self._error(name, "damaged, its checksum differs.")

    def _piece(self, file: BinaryIO, name: str) -> bytes:
        try:
            return file.read(PIECE)
        except OSError as error:
            raise self._error(name, error) from error


def _checked(table: Any) -> dict[str, Size]:
    """The table `files` of a manifest.

    Raises: ValueError saying what is wrong with it.
    """
    files = table.get("files") if isinstance(table, dict) else None
    if not isinstance(files, dict):
        raise ValueError("its key 'files' is no table")
    for name, size in files.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"it lists {name[:80]!r}, which is no plain name of a file")
        known = isinstance(size, dict) and {k: type(v) for k, v in size.items()}
        if known not in [{"bytes": int, key: kind} for key, kind in _CHECKSUMS.items()] or size["bytes"] < 0:
            raise ValueError(f"it has no size and checksum of {name}")
    return files


def _error(folder: Path, manifest: str, name: str, problem: str | OSError) -> UserError:
    """The message about the file `name` of a folder, with the cure."""
    if isinstance(problem, FileNotFoundError):
        problem = f"the {'export' if manifest == EXPORT else 'checkpoint'} lacks this file."
    elif isinstance(problem, OSError):
        problem = f"cannot be read ({problem.strerror or problem})."
    if not folder.exists():
        cure = "Its run has removed it meanwhile (training.checkpoints.keep): take a newer one."
    elif manifest == EXPORT:
        cure = "Export again: tutti export RUN --to FOLDER."
    else:
        cure = f"Delete the folder {folder} to continue from the checkpoint before it."
    return UserError(f"{folder / name}: {problem} {cure}")
