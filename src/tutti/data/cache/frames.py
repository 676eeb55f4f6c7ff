"""Frames, the pictures of a data set by frame row, however they are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt8


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


def gathered(
    frames: UInt8[np.ndarray, "n v 3 s s"] | Frames, wanted: Sequence[Int64[np.ndarray, " _"]]
) -> list[UInt8[np.ndarray, "_ v 3 s s"]]:
    """The pictures of each of some lists of rows; what they need is decoded together."""
    return frames.gather(wanted) if isinstance(frames, Frames) else [frames[rows] for rows in wanted]
