"""Tar shards as WebDataset writes them: the files of a pair follow one another and share a name."""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tutti.data.formats.errors import data_error
from tutti.data.formats.picture_text.table import MAX_COLUMNS, MAX_TEXT_BYTES, SUFFIXES, StretchTable
from tutti.errors import UserError
from tutti.storage.reading import decoded, open_plain, parse_json, shown

BLOCK, MAX_NAME = tarfile.BLOCKSIZE, 2**20
"""Bytes of a header, and at most of an extended one, which holds a long name."""
_BEHIND = 2**16
"""Bytes behind the end that are looked at: two archives laid end to end are read as one by nobody."""
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EMPTY = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
"""Members without content, whatever their headers say."""
_ABOUT_NEXT = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_PASSED_OVER = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK, tarfile.DIRTYPE)
_REPACK = "unpack it, and pack the plain files anew: tar --sort=name -cf shard.tar FILES."


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: where its content begins, its bytes, and whether it is a plain file."""

    name: str
    first: int
    size: int
    plain: bool


class TarTable(StretchTable):
    """The pairs of the archives `files`. The members of one share their path up to the first dot of its last
    part, and lie beside each other: `0001.jpg`, `0001.txt`, `0001.json`.

    Columns: `image` for a picture and `text` for a `.txt`, or, of `.left.jpg` and `.caption.txt`, the part
    between; `json.KEY` for each text that a `.json` has. Nothing is unpacked, and no link is followed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._names, self._shards = files, list[str](), array("q")
        self._damaged: dict[int, str] = {}
        self._places: dict[str, array[int]] = {}
        for shard, path in enumerate(files):
            for member in members(path):
                self._add(shard, member)
        self.count = len(self._names)
        self.pictures = tuple(one[8:] for one in self._places if one.startswith("picture "))
        plain = [one[5:] for one in self._places if one.startswith("text ")]
        json = [one[5:] for one in self._places if one.startswith("json ")]
        self._holders = {key: holder for holder in json for key in self._keys_of(holder)}
        self.texts = (*plain, *self._holders)
        self.passed_over = tuple(f".{one[6:]}" for one in self._places if one.startswith("other "))

    def _add(self, shard: int, member: Member) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, _, kind = base.partition(".")
        if not stem or not kind:
            return
        name = f"{folder}/{stem}" if folder else stem
        if not self._names or (self._shards[-1], self._names[-1]) != (shard, name):
            self._names.append(name)
            self._shards.append(shard)
        row = len(self._names) - 1
        places = self._places.setdefault(_column(kind.lower()), array("q"))
        if len(self._places) > MAX_COLUMNS:
            raise data_error(f"{self.where(row)}: more than {MAX_COLUMNS} different endings of names.")
        if len(places) > 2 * row:
            self._damaged[row] = f"{shown(member.name)} is there twice"
        elif not member.plain:
            self._damaged[row] = f"{shown(member.name)} is a link or a device, not a plain file"
        else:
            places.extend((-1, -1) * (row - len(places) // 2))
            places.extend((member.first, member.size))

    def where(self, row: int) -> str:
        """The archive and the pair's name in it."""
        return f"{self._files[self._shards[row]]}: {shown(self._names[row])}"

    def text(self, key: str, row: int) -> str:
        """Of a text file or a JSON, "" where the pair has none."""
        if f"text {key}" in self._places:
            return self._utf8(self._content(f"text {key}", row), row).strip()
        value = self._fields(self._holders[key], row).get(key.removeprefix(f"{self._holders[key]}.")) or ""
        if not isinstance(value, str):
            raise self.wrong(row, f"{shown(key)} is no text, but {shown(value)}")
        return value

    def stretch(self, key: str, row: int) -> tuple[Path, int, int | None]:
        """The member's content."""
        first, size = self._place(f"picture {key}", row)
        if first < 0:
            raise self.wrong(row, f"it has no picture {shown(key)}")
        return self._files[self._shards[row]], first, size

    def _place(self, column: str, row: int) -> tuple[int, int]:
        if row in self._damaged:
            raise self.wrong(row, self._damaged[row])
        places = self._places[column]
        return (places[2 * row], places[2 * row + 1]) if 2 * row < len(places) else (-1, 0)

    def _content(self, column: str, row: int) -> bytes:
        first, size = self._place(column, row)
        if size > MAX_TEXT_BYTES:
            raise self.wrong(row, f"its {column} is too long", f"{MAX_TEXT_BYTES:,} bytes", f"{size:,}")
        if first < 0:
            return b""
        with open_plain(self._files[self._shards[row]]) as file:
            file.seek(first)
            return file.read(size)

    def _utf8(self, content: bytes, row: int) -> str:
        try:
            return decoded(content, Path(self._names[row]))
        except UserError as error:
            raise self.wrong(row, str(error)) from None

    def _fields(self, holder: str, row: int) -> dict[str, Any]:
        content = self._content(f"json {holder}", row)
        try:
            return parse_json(self._utf8(content, row), self._names[row]) if content else {}
        except UserError as error:
            raise self.wrong(row, str(error)) from None

    def _keys_of(self, holder: str) -> list[str]:
        """The columns of the texts in the first JSON of a kind that has some and can be read."""
        for row in range(min(self.count, MAX_COLUMNS)):
            with suppress(UserError):
                fields = self._fields(holder, row).items()
                if found := [f"{holder}.{key}" for key, value in fields if isinstance(value, str)]:
                    return found[:MAX_COLUMNS]
        return []


def _column(kind: str) -> str:
    """What a member holds, and the name of its column, by what follows the first dot: "picture image"."""
    front, _, last = kind.rpartition(".")
    if f".{last}" in SUFFIXES:
        return f"picture {front or 'image'}"
    kinds = {"txt": "text", "json": "json"}
    return f"{kinds[last]} {front or kinds[last]}" if last in kinds else f"other {kind}"


def members(path: Path) -> Iterator[Member]:
    """The files in an archive, without hidden ones, header by header; no content is read. Each lies behind
    the last one, and in the file.

    Raises: UserError for what is no tar, and one that is damaged or cut short.
    """
    with open_plain(path) as file:
        end, at, name = os.fstat(file.fileno()).st_size, 0, ""
        while at + BLOCK <= end:
            file.seek(at)
            block = file.read(BLOCK)
            if not any(block):  # it ends an archive
                if any(file.read(_BEHIND)):
                    problem = f"{path}: there is more behind the end of the archive, at byte {at:,}."
                    raise data_error(problem, cure=_REPACK)
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError, OverflowError) as error:
                expected = "an uncompressed tar archive"
                raise data_error(
                    f"{path}: no header of a member at byte {at:,}.", expected=expected, found=error
                ) from None
            if header.type == tarfile.GNUTYPE_SPARSE:
                raise _unread(path, at)
            size, first = 0 if header.type in _EMPTY else header.size, at + BLOCK
            if not 0 <= size <= end - first:
                found = f"{header.size:,} bytes, of which {end - first:,} are there"
                raise data_error(f"{path}: the member at byte {at:,} is cut short.", found=found)
            at = first + -(-size // BLOCK) * BLOCK
            if header.type in _ABOUT_NEXT:
                name = _long_name(path, file, header, first) or name
            elif header.type not in _PASSED_OVER:
                name = name or header.name
                if not name.rpartition("/")[2].startswith("."):
                    yield Member(name, first, size, header.type in _PLAIN)
                name = ""
        raise data_error(f"{path}: the archive is cut short.", found=f"{end:,} bytes, without its end")


def _long_name(path: Path, file: BinaryIO, header: tarfile.TarInfo, first: int) -> str:
    """The name of the next member in an extended header; "" where it holds none."""
    if header.size > MAX_NAME:
        found = f"{header.size:,} bytes"
        raise data_error(f"{path}: a long name at byte {first:,}.", expected=f"{MAX_NAME:,}", found=found)
    content = file.read(header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if re.search(rb"(?:^|\n)\d+ (?:size|GNU\.sparse[^=]*)=", content):
        raise _unread(path, first)
    found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
    return found[1].decode("utf-8", "surrogateescape") if found else ""


def _unread(path: Path, at: int) -> UserError:
    return data_error(f"{path}: a sparse member, or one of over 8 GiB, at byte {at:,}.", cure=_REPACK)
