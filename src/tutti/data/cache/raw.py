"""Raw frames: the bytes of all pictures in one memory-mapped file, so that a batch costs a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from tutti.data.cache.building import FrameFiles, build
from tutti.data.episodes import EpisodeStore, Progress
from tutti.storage.files import reserve


class RawFiles(FrameFiles):
    """One file, whose room on the disk is reserved before the first picture is decoded."""

    names = ("frames.u8",)

    def said(self, marker: Path) -> Mapping[str, Any]:
        """Nothing: all sizes are known beforehand."""
        return {}

    def sizes(self, said: Mapping[str, Any], rows: int) -> list[int]:
        """That of all pictures, from the beginning."""
        return [self.expected(rows)]

    def begin(self, files: Sequence[IO[bytes]], said: Mapping[str, Any]) -> None:
        """Reserves the room."""
        (self._file,) = files
        try:
            reserve(self._file, self.expected(0))
        except OSError:
            if not said:  # give back what it did get
                self._file.truncate(0)
            raise

    def pack(self, pictures: UInt8[np.ndarray, "k v 3 s s"]) -> UInt8[np.ndarray, "k v 3 s s"]:
        """As they are."""
        return pictures

    def write(self, first: int, packed: UInt8[np.ndarray, "k v 3 s s"]) -> None:
        """At their place."""
        self._file.seek(first * self.row_bytes)
        self._file.write(packed.data)

    def state(self) -> dict[str, Any]:
        """Nothing: the row tells the place."""
        return {}

    def expected(self, rows: int) -> int:
        """The same at any time."""
        return self.shape[0] * self.row_bytes


def cached_frames(
    store: EpisodeStore, folder: Path, image_size: int, progress: Progress | None = None
) -> UInt8[np.ndarray, "n v 3 s s"]:
    """The frames of a store's episodes at `image_size`, as a read-only memory map of a file below `folder`,
    which is built where it is not there (`build`).

    Raises: UserError where a picture cannot be read, or the disk has not the room.
    """
    files = RawFiles(store, folder, image_size)
    build(files, progress)
    # A plain array over the same pages: fancy indexing of np.memmap itself costs more Python.
    return np.asarray(np.memmap(files.paths()[0], dtype=np.uint8, mode="r", shape=files.shape))
