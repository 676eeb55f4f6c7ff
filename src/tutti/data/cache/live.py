"""LiveFrames: nothing is written, and each batch decodes its pictures from the data set."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from jaxtyping import Int64, UInt8

from tutti.data.cache.decoding import Decoders
from tutti.data.cache.frames import Frames
from tutti.data.episodes import EpisodeStore
from tutti.errors import UserError

Stamp = tuple[int, int, int]
"""Bytes, time of the last change (ns) and number of a file."""


class LiveFrames(Frames):
    """The pictures of a store, decoded and resized when they are asked for: the bytes of a raw cache.

    All rows that a batch needs are decoded in rising order and each once, so that those of one file or group
    of pictures are decoded together, on up to `threads` threads. Up to `memory` bytes of pictures are kept,
    those that were used last: encoded where they lie in tables, which are read in parts, else decoded.

    Raises: UserError where a picture cannot be read, and for a file that has changed since this was made.
    """

    def __init__(
        self, store: EpisodeStore, image_size: int, *, memory: int = 256 * 2**20, threads: int = 1
    ) -> None:
        spec = store.spec
        self.shape = (spec.num_frames, len(spec.views), 3, image_size, image_size)
        # Encoded they are a fraction as large; each thread has its own.
        encoded = store.keep_encoded(memory // threads)
        self._store, self._decoders = store, Decoders(store, image_size, threads)
        self._most = 0 if encoded else memory // (len(spec.views) * 3 * image_size**2)
        self._kept = OrderedDict[int, UInt8[np.ndarray, "v 3 s s"]]()
        self._lock = Lock()
        count = self._decoders.threads
        self._pool = ThreadPoolExecutor(count, "tutti-decode") if count > 1 else None
        self._stamps = {path: _stamp(path) for path in self._files(np.arange(spec.num_frames))}

    def gather(self, wanted: Sequence[Int64[np.ndarray, " _"]]) -> list[UInt8[np.ndarray, "_ v 3 s s"]]:
        """Each row is decoded once for all lists."""
        every = np.concatenate(wanted)
        rows, place = np.unique(every, return_inverse=True)
        with self._lock:
            known = np.array([row in self._kept for row in rows.tolist()], bool)
            if len(rows) == len(every) and not known.any():  # each is decoded where it is wanted
                pictures = self._decoded(every)
                self._keep(every, pictures)
                return np.split(pictures, np.cumsum([len(some) for some in wanted[:-1]]))
            pictures = np.empty((len(rows), *self.shape[1:]), np.uint8)
            for number in np.flatnonzero(known).tolist():
                pictures[number] = self._kept[int(rows[number])]
                self._kept.move_to_end(int(rows[number]))
            pictures[~known] = decoded = self._decoded(rows[~known])
            self._keep(rows[~known], decoded)
        return np.split(pictures[place], np.cumsum([len(some) for some in wanted[:-1]]))

    def _keep(self, rows: Int64[np.ndarray, " k"], pictures: UInt8[np.ndarray, "k v 3 s s"]) -> None:
        """Those that the memory is for."""
        for number in range(max(0, len(rows) - self._most), len(rows)):
            self._kept[int(rows[number])] = pictures[number].copy()
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _decoded(self, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k v 3 s s"]:
        if not len(rows):
            return np.empty((0, *self.shape[1:]), np.uint8)
        try:
            if self._pool is None:
                pictures = self._decoders(rows)
            else:  # neighbours stay together
                pieces = [piece for piece in np.array_split(rows, self._decoders.threads) if len(piece)]
                pictures = np.concatenate(list(self._pool.map(self._decoders, pieces)))
        except UserError:
            self._check_unchanged(rows)  # which says more than what it led to
            raise
        self._check_unchanged(rows)
        return pictures

    def _files(self, rows: Int64[np.ndarray, " k"]) -> Iterable[Path]:
        return dict.fromkeys(
            path for view in self._store.spec.views for path in self._store.picture_files(view, rows)
        )

    def _check_unchanged(self, rows: Int64[np.ndarray, " k"]) -> None:
        for path in self._files(rows):
            if (now := _stamp(path)) != self._stamps[path]:
                raise UserError(
                    f"{path} {'has changed' if now else 'has gone'} since this run opened the data set; "
                    "with data.cache.kind=none its pictures are read while the run goes on.\n"
                    "  expected: the file as it was, of the same size and time\n"
                    "  cure: put it back and resume; or keep a copy of the pictures (data.cache.kind=raw) in "
                    "a new run."
                )


def _stamp(path: Path) -> Stamp | None:
    """What tells that a file is another one; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
