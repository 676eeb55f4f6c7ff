"""TFRecord files: where each record lies, how many steps it has, and its bytes, with their checksums."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import google_crc32c

from tutti.data.formats.errors import data_error
from tutti.data.formats.rlds.example import MAX_STEPS, STEPS_EXPECTED, Record, count_values
from tutti.storage.reading import open_plain

MAX_RECORD = 2**30
"""Bytes of the largest episode."""
_HEADER, _BLOCK = Struct("<QI"), 4096
_FIELD, _VALUE = 0x0A, 0x12
"""Tags of a message's fields 1 and 2, of bytes."""


class Place(NamedTuple):
    """Where a record's data lie in its file, their stored checksum, and the steps of the episode."""

    offset: int
    length: int
    checksum: int
    steps: int


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, turned right by 15 bits, plus a constant: as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_record(path: Path, place: Place) -> bytes:
    """A record's bytes. Raises: UserError if the file ends before them, or they are not those written."""
    with open_plain(path) as file:
        file.seek(place.offset)
        content = file.read(place.length)
    if len(content) != place.length or masked_crc32c(content) != place.checksum:
        problem = f"{path}: the record at byte {place.offset - _HEADER.size:,} is damaged."
        expected = f"{place.length:,} bytes with the checksum {place.checksum:#010x} that lies behind them"
        raise data_error(problem, expected=expected)
    return content


def scan_records(path: Path, key: str) -> Iterator[Place]:
    """The records of a file in their order; the steps of each are the values of its feature `key`.

    One pass over their headers: of the data only what leads to `key` is read, pictures are skipped.

    Raises: UserError for a header that is damaged, a record that runs past the file's end, or no `key`.
    """
    with open_plain(path) as file:
        size, blocks = os.fstat(file.fileno()).st_size, _Blocks(file.fileno())
        start = 0
        while start < size:
            where = f"{path}: the record at byte {start:,}"
            head = blocks.read(start, _HEADER.size)
            if len(head) < _HEADER.size:
                raise data_error(f"{where} is cut off.", expected="12 bytes of header", found=len(head))
            length, checksum = _HEADER.unpack(head)
            if masked_crc32c(head[:8]) != checksum:
                raise data_error(f"{where} has a damaged length, or this is no TFRecord file.")
            begin = start + _HEADER.size
            end = begin + length
            if end + 4 > size:
                problem = f"{where} runs past the file's end."
                raise data_error(problem, expected=f"{end + 4:,} bytes", found=f"{size:,}")
            if length > MAX_RECORD:
                problem = f"{where} has {length:,} bytes; an episode has at most {MAX_RECORD:,}."
                raise data_error(problem, cure="split it into shorter episodes.")
            stored = int.from_bytes(blocks.read(end, 4), "little")
            steps = _count_steps(path, blocks, Place(begin, length, stored, 0), key)
            yield Place(begin, length, stored, steps)
            start = end + 4


def _count_steps(path: Path, blocks: _Blocks, place: Place, key: str) -> int:
    span = blocks.find(place.offset, place.offset + place.length, key.encode())
    where = f"{path}: the record at byte {place.offset - _HEADER.size:,}"
    if span is None or span[1] - span[0] > 16 * MAX_STEPS:  # laid out in another order, or damaged
        return Record(read_record(path, place), where).count(key)
    try:
        return count_values(blocks.read(span[0], span[1] - span[0]))
    except ValueError as error:
        raise data_error(f"{where}: {key}: {error}.", expected=STEPS_EXPECTED) from None


class _Blocks:
    """A file's bytes at any place; a block is kept, so that neighbouring small fields are read at once."""

    def __init__(self, handle: int) -> None:
        self._handle, self._start, self._block = handle, 0, b""

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`; fewer at the file's end."""
        begin = start - self._start
        if begin < 0 or begin + count > len(self._block):
            self._start, begin = start, 0
            self._block = os.pread(self._handle, max(count, _BLOCK), start)
        return self._block[begin : begin + count]

    def find(self, start: int, end: int, key: bytes) -> tuple[int, int] | None:
        """Where the Feature `key` lies of the Example [start, end), if that has its fields one behind the
        other in their order, as writers lay them out."""
        features = self._field(start, _FIELD)
        if features is None or features[1] != end:
            return None
        place = features[0]
        while place < end:
            entry = self._field(place, _FIELD)
            name = entry and self._field(entry[0], _FIELD)
            value = name and self._field(name[1], _VALUE)
            if not (entry and name and value) or value[1] != entry[1] or entry[1] > end:
                return None
            if name[1] - name[0] == len(key) and self.read(name[0], len(key)) == key:
                return value
            place = entry[1]
        return None

    def _field(self, start: int, tag: int) -> tuple[int, int] | None:
        """Where the content of the field at `start` lies, if its tag is this one."""
        head = self.read(start, 10)
        if not head or head[0] != tag:
            return None
        length = 0
        for count, byte in enumerate(head[1:]):
            length |= (byte & 0x7F) << 7 * count
            if byte < 0x80:
                begin = start + 2 + count
                return begin, begin + length
        return None
