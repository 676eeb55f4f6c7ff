"""Frames, the pictures of a data set by frame row, however they are kept."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from threading import Lock

import numpy as np
from jaxtyping import Int64, UInt8

LEAST, MOST = 2**20, 2**28
"""Bytes of an array from which on its memory is used again, and of all such memory that is kept."""


class Frames(ABC):
    """Pictures by row, as an array of `shape` (N, v, 3, s, s) gives them; from several threads at once."""

    shape: tuple[int, int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b v 3 s s"]:
        return self.gather([rows])[0]

    @abstractmethod
    def gather(self, wanted: Sequence[Int64[np.ndarray, " _"]]) -> list[UInt8[np.ndarray, "_ v 3 s s"]]:
        """The pictures of each of some lists of rows. Raises: UserError where one cannot be read."""


class Reused:
    """Gives arrays for pictures in memory that nobody holds any more.

    malloc maps large arrays anew each time, and the first touch of each page costs more than copying a
    picture there. An array that was given counts as held while it, a view of it or a tensor of it lives.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most, self._kept, self._lock = most, list[UInt8[np.ndarray, " _"]](), Lock()

    def empty(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, ...]:
        """An array of this shape, whatever its bytes are."""
        size = math.prod(shape)
        if not LEAST <= size <= self._most:
            return np.empty(shape, np.uint8)
        with self._lock:
            for place in range(len(self._kept)):
                if self._kept[place].size == size and _holders(self._kept, place) == _ALONE:
                    return self._kept[place].reshape(shape)
            self._kept.append(np.empty(size, np.uint8))
            while sum(one.size for one in self._kept) > self._most:
                del self._kept[0]  # whoever holds it keeps it
            return self._kept[-1].reshape(shape)


def _holders(kept: list[UInt8[np.ndarray, " _"]], place: int) -> int:
    return sys.getrefcount(kept[place])


_ALONE = _holders([np.empty(1, np.uint8)], 0)
"""What it counts where nobody but the list holds the array; Python's releases differ."""
ARRAYS = Reused()


def gathered(
    frames: UInt8[np.ndarray, "n v 3 s s"] | Frames, wanted: Sequence[Int64[np.ndarray, " _"]]
) -> list[UInt8[np.ndarray, "_ v 3 s s"]]:
    """The pictures of each of some lists of rows; what they need is decoded together."""
    if isinstance(frames, Frames):
        return frames.gather(wanted)
    out = [ARRAYS.empty((len(rows), *frames.shape[1:])) for rows in wanted]
    for rows, pictures in zip(wanted, out, strict=True):
        # All rows are there; to look at them once more ("raise"), NumPy would copy twice.
        np.take(frames, rows, axis=0, out=pictures, mode="clip")
    return out
