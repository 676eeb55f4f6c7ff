"""Arrays of a Zarr store (format 2): their description is checked before a chunk is read."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.data.formats.zarr.codecs import CODECS, MissingPackage, unpack
from tutti.data.formats.zarr.stores import ZarrFiles
from tutti.errors import UserError
from tutti.storage.reading import decoded, parse_json, shown

MAX_JSON, MAX_BYTES = 2**20, 2**29
"""Bytes of a description, and of the rows of one chunk once they are unpacked."""
MAX_AXES = 8
_PLAIN = r"[<>|](b1|[iu][1248]|f[248])"
INSTALL = "install what unpacks them: pip install 'tutti-vla[zarr]'."
REWRITE = "write it anew by zarr, format 2, compressed by Blosc, Zstandard or zlib."


class ZarrArray:
    """An array by its key. Chunks are unpacked one after another; the rows of the last one are kept.

    Raises: UserError for a description, a codec or a size that is not read, and damaged or missing chunks.
    """

    def __init__(self, files: ZarrFiles, key: str) -> None:
        self._files, self._key = files, key
        self._last: tuple[int, np.ndarray] | None = None
        content = files.read(f"{key}/.zarray", MAX_JSON)
        if content is None:
            raise self.error(
                "it is missing", "data/ and meta/episode_ends, as diffusion policy and UMI have them"
            )
        where = Path(key) / ".zarray"
        try:
            told = parse_json(decoded(content, where), where)
        except UserError as error:
            raise self.error(f"its description is damaged: {error}") from None
        self.shape, self._chunks = (self._sizes(told, name) for name in ("shape", "chunks"))
        packed = told.get("compressor")
        self._codec = (
            packed if packed is None else str(packed.get("id") if isinstance(packed, dict) else packed)
        )
        order, between = told.get("order", "C"), told.get("dimension_separator", ".")
        wanted = {
            "zarr_format": (told.get("zarr_format") == 2, "2"),
            "shape": (0 < len(self.shape) <= MAX_AXES, f"1 to {MAX_AXES} axes"),
            "chunks": (len(self._chunks) == len(self.shape) and 0 not in self._chunks, "as many sizes"),
            "dtype": (re.fullmatch(_PLAIN, str(told.get("dtype"))), "numbers"),
            "compressor": (self._codec is None or self._codec in CODECS, ", ".join(CODECS)),
            "filters": (not told.get("filters"), "none"),
            "order": (order in ("C", "F"), "C or F"),
            "dimension_separator": (between in (".", "/"), ". or /"),
        }
        for name, (fits, expected) in wanted.items():
            if not fits:
                raise self.error(f"{name} is not read", expected, shown(told.get(name)), cure=REWRITE)
        self.dtype = np.dtype(told["dtype"])
        self._order, self._between = order, between
        if max(self._chunk_bytes, self._chunks[0] * self.row_bytes) > MAX_BYTES:
            found = f"{self._chunks} of {self.shape}"
            raise self.error("its chunks are too large", f"{MAX_BYTES:,} bytes", found, cure=REWRITE)

    def rows(self, steps: Int64[np.ndarray, " k"]) -> np.ndarray:
        """The rows with these numbers, in this order; rising ones are fast."""
        out = np.empty((len(steps), *self.shape[1:]), self.dtype)
        numbers = steps // self._chunks[0]
        for number in np.unique(numbers).tolist():
            here = numbers == number
            out[here] = self._block(number)[steps[here] - number * self._chunks[0]]
        return out

    def another(self) -> ZarrArray:
        """The same for another thread, without the rows that were read last."""
        other = copy.copy(self)
        other._last = None
        return other

    def files(self, steps: Int64[np.ndarray, " k"]) -> Iterator[Path]:
        """The files on the disk of the chunks that have these rows."""
        for number in np.unique(steps // self._chunks[0]).tolist():
            yield from (self._files.path(self._name(place)) for place in self._places(number))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def _chunk_bytes(self) -> int:
        return math.prod(self._chunks) * self.dtype.itemsize

    def error(
        self, problem: str, expected: object = "", found: object = "", cure: str = COPY_AGAIN
    ) -> UserError:
        """Names the store and the array."""
        where = f"{self._files.name}: {self._key}"
        return data_error(f"{where}: {problem}.", expected=expected, found=found, cure=cure)

    def _sizes(self, told: dict[str, Any], name: str) -> tuple[int, ...]:
        sizes = told.get(name)
        fits = isinstance(sizes, list) and all(type(one) is int and 0 <= one < 2**40 for one in sizes)
        if not isinstance(sizes, list) or not fits:
            raise self.error(f"{name} is damaged", "a list of whole numbers", shown(sizes))
        return tuple(sizes)

    def _block(self, number: int) -> np.ndarray:
        """The rows of the chunks at place `number` of the first axis."""
        if self._last is None or self._last[0] != number:
            self._last = None
            out = np.empty((self._chunks[0], *self.shape[1:]), self.dtype)
            for _, *place in self._places(number):
                chunk = self._chunk((number, *place))
                spans = zip(place, self._chunks[1:], self.shape[1:], strict=True)
                into = [slice(at * each, min((at + 1) * each, size)) for at, each, size in spans]
                out[(slice(None), *into)] = chunk[
                    (slice(None), *(slice(0, one.stop - one.start) for one in into))
                ]
            self._last = number, out
        return self._last[1]

    def _places(self, number: int) -> Iterator[tuple[int, ...]]:
        """The chunks at place `number` of the first axis."""
        counts = [-(-size // chunk) for size, chunk in zip(self.shape[1:], self._chunks[1:], strict=True)]
        return product((number,), *map(range, counts))

    def _name(self, place: tuple[int, ...]) -> str:
        return f"{self._key}/{self._between.join(map(str, place))}"

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray:
        name = self._name(place)
        content = self._files.read(name, 2 * self._chunk_bytes + 2**16)
        if content is None:
            raise self.error(f"the chunk {name} was never written")
        try:
            flat = unpack(self._codec, content, np.empty(self._chunks, self.dtype))
        except MissingPackage as error:
            raise self.error(f"its chunks are packed by {self._codec}: {error}", cure=INSTALL) from None
        except Exception as error:  # each codec's library has exceptions of its own
            why = shown(str(error), 300, quoted=False)
            raise self.error(f"the chunk {name} is damaged: {why}") from error
        return flat.reshape(self._chunks, order=self._order)
