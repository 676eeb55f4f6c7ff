"""Opens HDF5 files that anybody may have written: one file, hard links, plain arrays, sizes checked first."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int64

from tutti.data.formats.errors import data_error
from tutti.errors import UserError
from tutti.storage.opened import Opened
from tutti.storage.reading import open_plain, shown

_library: Any = h5py  # its compiled parts have no types
h5a, h5d, h5g, h5l, h5o = _library.h5a, _library.h5d, _library.h5g, _library.h5l, _library.h5o
h5t, h5z = _library.h5t, _library.h5z

MOST_OPEN = 8
"""Files that are kept open; beyond it the one that was used longest ago is closed."""
MAX_STEPS = 10**7
"""Steps of an episode."""
MAX_BYTES = 2**28
"""Of a chunk, of a vector in an episode, and of an attribute, once it is unpacked."""
BLOCK_BYTES = 2**25
"""How much is read at once, where a chunk is not larger."""
MAX_NAMES = 2**20
"""Members of a group."""
DEFLATE_RATIO, LZF_RATIO = 1032, 90
"""How many bytes a byte can unpack to, at most."""
REPACK = "write a plain copy of it with h5repack, or record the data set again."
_BUILT_IN = (
    *(h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_LZF),
    *(h5z.FILTER_SZIP, h5z.FILTER_NBIT, h5z.FILTER_SCALEOFFSET),
)
_CLASSES = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM, h5t.STRING)
_LAYOUTS = (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED)
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file, which could be any"}


@contextmanager
def explained(path: Path, key: str) -> Iterator[None]:
    """Names file and key for whatever the HDF5 library, or decoding text, raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # h5py turns the library's errors into half a dozen classes
        problem = shown(str(error).strip("'\""), 300, quoted=False)
        raise data_error(f"{path}: {key or 'the file'} cannot be read: {problem}.") from error


class Array:
    """A dataset of plain numbers or bytes, all of which is in the file; axis 0 counts the steps.

    Raises: UserError naming file, key and what is wrong. Nothing is allocated before these checks.
    """

    def __init__(self, path: Path, key: str, data: Any, file_bytes: int) -> None:
        self.path, self.key, self._data = path, key, data
        layout = data.get_create_plist()
        kind = data.get_type()
        numbers = kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)
        fixed = kind.get_class() == h5t.STRING and not kind.is_variable_str()
        if not (numbers and kind.get_size() <= 16) and not fixed:
            names = {h5t.REFERENCE: "references", h5t.COMPOUND: "compounds", h5t.OPAQUE: "opaque bytes"}
            raise self.error("arrays of numbers", names.get(kind.get_class(), "lists, texts or other types"))
        if layout.get_external_count() or layout.get_layout() not in _LAYOUTS:
            raise self.error("numbers in this file", "a dataset that takes them from other files", REPACK)
        self.shape: tuple[int, ...] = data.shape
        self.dtype = data.dtype
        if self.dtype.kind not in "biufS" or not self.shape:
            raise self.error("arrays of numbers", f"{self.dtype}, shape {self.shape}")
        if self.shape[0] > MAX_STEPS:
            raise self.error(f"at most {MAX_STEPS:,} steps", f"{self.shape[0]:,}")
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._chunk_rows = 1
        if layout.get_layout() == h5d.CHUNKED:
            self._check_chunks(layout, file_bytes)
        elif math.prod(self.shape):
            size, place = math.prod(self.shape) * self.dtype.itemsize, data.get_offset() or 0
            if data.get_storage_size() < size or place + size > file_bytes:
                raise self.error(
                    f"{size:,} bytes", "a dataset that was never written, or whose end is cut off"
                )

    def _check_chunks(self, layout: Any, file_bytes: int) -> None:
        chunk = layout.get_chunk()
        size = math.prod(chunk) * self.dtype.itemsize
        if size > MAX_BYTES:
            raise self.error(f"chunks of at most {MAX_BYTES:,} bytes", f"{size:,}", REPACK)
        needed = math.prod(-(-whole // part) for whole, part in zip(self.shape, chunk, strict=True))
        if (written := self._data.get_num_chunks()) < needed:
            raise self.error(f"{needed:,} chunks", f"{written:,}: the others were never written")
        filters = [layout.get_filter(number)[0] for number in range(layout.get_nfilters())]
        if foreign := [number for number in filters if number not in _BUILT_IN]:
            found = f"filter {foreign[0]}, which the HDF5 library does not have built in"
            raise self.error("gzip or no compression", found, "h5repack -f GZIP=4 OLD NEW, with its plugin.")
        packed = [number for number in filters if number not in (h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)]
        if len(packed) > 1:
            raise self.error("one compression", f"{len(packed)} on top of each other", REPACK)
        self._chunk_rows = chunk[0]
        if packed:
            self._check_packed(packed[0], filters, size, file_bytes)

    def _check_packed(self, packed: int, filters: Sequence[int], size: int, file_bytes: int) -> None:
        """No chunk unpacks to more than it should. Only those that could fill the memory are looked into:
        what a filter gives is allocated before the library compares it."""
        found: list[Any] = []
        self._data.chunk_iter(found.append)
        largest = max((one.size for one in found), default=0)
        if largest > min(file_bytes, size + size // 8 + 4096):
            raise self.error(f"packed chunks of at most {size:,} bytes", f"{largest:,}")
        if packed != h5z.FILTER_DEFLATE:
            if largest * LZF_RATIO > 2 * MAX_BYTES:
                raise self.error("smaller chunks", f"{largest:,} packed bytes", REPACK)
            return
        for one in found:
            if one.size * DEFLATE_RATIO > MAX_BYTES and not one.filter_mask >> filters.index(packed) & 1:
                content = self._data.read_direct_chunk(one.chunk_offset)[1]
                if filters[-1] == h5z.FILTER_FLETCHER32:
                    content = content[:-4]
                if len(zlib.decompressobj().decompress(content, size + 5)) > size + 4:
                    raise self.error(f"chunks that unpack to {size:,} bytes", "one that unpacks to more")

    def error(self, expected: object, found: object, cure: str = "") -> UserError:
        """That this array is not what was expected."""
        problem = f"{self.path}: {self.key} is not what it must be."
        return data_error(problem, expected=expected, found=found, **({"cure": cure} if cure else {}))

    def read(self, start: int, end: int) -> np.ndarray:
        """The rows [start, end)."""
        with explained(self.path, self.key):
            return h5py.Dataset(self._data)[start:end]

    def blocks(self, steps: Int64[np.ndarray, " k"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places in `steps`, rows there) until all are read: each stretch of steps that lie close together
        at once, up to `BLOCK_BYTES`, whole chunks where they are smaller."""
        order = np.argsort(steps, kind="stable")
        ranked = steps[order]
        most = max(1, BLOCK_BYTES // max(1, self.row_bytes))
        begin = 0
        while begin < len(ranked):
            first = int(ranked[begin])
            limit = first + most
            if (whole := limit - limit % self._chunk_rows) > first:
                limit = whole
            here = ranked[begin : int(np.searchsorted(ranked, limit))]
            far = np.flatnonzero(np.diff(here) > max(1, self._chunk_rows))
            here = here[: far[0] + 1] if far.size else here
            rows = self.read(first, int(here[-1]) + 1)
            gaps = len(rows) != len(here) or (np.diff(here) != 1).any()
            yield order[begin : begin + len(here)], rows[here - first] if gaps else rows
            begin += len(here)


class HDF5File:
    """One file, open for reading only, without a lock: read-only network file systems have none to give.

    Of its tree only hard links are followed, along paths that the reader names: never to another file, and
    never in a circle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_plain(path, cure="Name an HDF5 file, or a folder with some (sources.path).") as file:
            self._bytes = os.fstat(file.fileno()).st_size
        with explained(path, ""):
            if not h5py.is_hdf5(path):
                raise data_error(f"{path} is no HDF5 file, or its beginning is damaged.")
            try:
                self._file = h5py.File(path, "r", locking=False)
            except OSError as error:
                if "locking" not in str(error):
                    raise
                self._file = h5py.File(path, "r")  # this process has opened it before, with a lock
            self._root = h5g.open(self._file.id, b"/")

    def names(self, group: str) -> list[str]:
        """The members of a group in the order of the alphabet; none where there is no such group."""
        with explained(self.path, group):
            node = self._find(group)
            if not isinstance(node, h5g.GroupID):
                return []
            if (count := node.get_num_objs()) > MAX_NAMES:
                raise data_error(f"{self.path}: {group} has {count:,} members; expected up to {MAX_NAMES:,}.")
            return sorted(name.decode("utf-8") for name in node)

    def has(self, key: str) -> bool:
        """Whether there is a group or a dataset."""
        with explained(self.path, key):
            return self._find(key) is not None

    def kind(self, key: str) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
        """Shape and type of a dataset, unchecked; None for anything but an array of numbers or texts."""
        with explained(self.path, key):
            node = self._find(key)
            if isinstance(node, h5d.DatasetID) and node.get_type().get_class() in _CLASSES:
                return node.shape or (), node.dtype
            return None

    def array(self, key: str) -> Array:
        """A dataset, checked. Raises: UserError if it is missing or none that can be read safely."""
        with explained(self.path, key):
            node = self._find(key)
            if not isinstance(node, h5d.DatasetID):
                found = "nothing" if node is None else "a group"
                raise data_error(f"{self.path}: {key} is missing.", expected="a dataset", found=found)
            return Array(self.path, key, node, self._bytes)

    def attribute(self, group: str, name: str) -> str | None:
        """A text that is kept as an attribute; None where there is none.

        Raises: UserError if it is no text.
        """
        key = f"the attribute {name} of {group or '/'}"
        with explained(self.path, key):
            node = self._find(group)
            if node is None or not h5a.exists(node, name.encode()):
                return None
            held = h5a.open(node, name.encode())
            kind, size = held.get_type(), held.get_storage_size()
            if (
                kind.get_class() != h5t.STRING
                or math.prod((0,) if held.shape is None else held.shape) != 1
                or size > MAX_BYTES
            ):
                raise data_error(f"{self.path}: {key} is no text.", expected="one text", found=held.dtype)
            value: Any = h5py.Group(node).attrs[name]
            value = value.item() if isinstance(value, np.ndarray | np.generic) else value
            raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
            return raw.decode("utf-8")

    def _find(self, key: str) -> Any:
        """The object at a path of hard links; None where there is none."""
        node: Any = self._root
        for part in filter(None, key.split("/")):
            name = part.encode("utf-8")
            if not isinstance(node, h5g.GroupID) or not node.links.exists(name):
                return None
            if (kind := node.links.get_info(name).type) != h5l.TYPE_HARD:
                found = _LINKS.get(kind, "a link of an unknown kind")
                problem = f"{self.path}: {part} on the way to {key} is {found}; links are not followed."
                raise data_error(problem, cure="put a copy of the data in its place (h5copy), in one file.")
            node = h5o.open(node, name)
        return node


class OpenFiles:
    """HDF5 files by their number, `MOST_OPEN` of them kept open; `lock` is held while one is used.

    The HDF5 library runs one call at a time in a process, so threads lose nothing by the lock; what is read
    is decoded outside of it. A forked or spawned process opens files of its own. h5py holds its own lock over
    a fork, so that one is safe at any moment.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._own = self._none_open()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[tuple[Path, ...]]]:
        return OpenFiles, (self.paths,)

    @contextmanager
    def use(self, number: int) -> Iterator[HDF5File]:
        """The file, which nobody else uses meanwhile."""
        if self._own[0] != os.getpid():
            self._own = self._none_open()
        _, lock, opened = self._own
        with lock:
            yield opened[number]

    def _none_open(self) -> tuple[int, Any, Opened[int, HDF5File]]:
        paths = self.paths
        return os.getpid(), RLock(), Opened(lambda number: HDF5File(paths[number]), MOST_OPEN)
