"""The files of a Zarr store: a folder, or a zip file, which is read in place."""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from tutti.data.formats.errors import data_error
from tutti.errors import UserError
from tutti.storage.reading import open_plain

MARKS = (".zgroup", "zarr.json")
"""What the folder of a store has."""
SUFFIXES = (".zarr", ".zip")
"""What the name of a zip file of a store ends with, with `.zarr` before it."""


def recognises_zarr(path: Path) -> str:
    """The file that makes a path a Zarr store; "" where it is none."""
    if path.is_dir():
        return next((name for name in MARKS if (path / name).is_file()), "")
    return path.name if path.suffixes[-2:] == list(SUFFIXES) else ""


class ZarrFiles(ABC):
    """Files by their keys, paths with slashes. `name` is that of the store, for messages."""

    name: str

    @abstractmethod
    def read(self, key: str, most: int) -> bytes | None:
        """The content of a file of at most `most` bytes; None where there is none. Raises: UserError."""

    @abstractmethod
    def path(self, key: str) -> Path:
        """The file on the disk that a key lies in."""

    @abstractmethod
    def arrays(self, group: str) -> Iterator[str]:
        """The names of the arrays in a group."""


class FolderFiles(ZarrFiles):
    """A store that is a folder."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path

    def read(self, key: str, most: int) -> bytes | None:
        """Of a plain file."""
        path = self._path / key
        if not path.exists():
            return None
        try:
            with open_plain(path, most) as file:
                return file.read(most)
        except UserError as error:
            raise data_error(str(error)) from None

    def path(self, key: str) -> Path:
        """One of its own."""
        return self._path / key

    def arrays(self, group: str) -> Iterator[str]:
        """Folders in it, in the order of their names."""
        folder = self._path / group
        for one in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (one / ".zarray").is_file():
                yield one.name


class ZipFiles(ZarrFiles):
    """A store that is a zip file: nothing is unpacked to the disk."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self._zip = zipfile.ZipFile(open_plain(path))
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:  # an unknown version
            raise data_error(f"{path} cannot be read as a zip file.", found=error) from error

    def read(self, key: str, most: int) -> bytes | None:
        """Of a member, whose size is looked at before it is unpacked."""
        try:
            info = self._zip.getinfo(key)
        except KeyError:
            return None
        if info.file_size > most:
            found = f"{info.file_size:,}"
            raise data_error(f"{self.name}: {key} is too large.", expected=f"{most:,} bytes", found=found)
        try:
            with self._zip.open(info) as file:
                content = file.read(most + 1)
        except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError) as error:
            raise data_error(f"{self.name}: {key} is damaged.", found=error) from error
        if len(content) != info.file_size:
            raise data_error(f"{self.name}: {key} is damaged.", found=f"{len(content):,} bytes")
        return content

    def path(self, key: str) -> Path:
        """The zip file."""
        return Path(self.name)

    def arrays(self, group: str) -> Iterator[str]:
        """Names with metadata, in order."""
        parts = (name.split("/") for name in sorted(self._zip.namelist()))
        yield from (one[1] for one in parts if len(one) == 3 and one[0] == group and one[2] == ".zarray")


def open_files(path: Path) -> ZarrFiles:
    """The files of the store at a path. Raises: UserError if it is none."""
    return FolderFiles(path) if path.is_dir() else ZipFiles(path)
