"""EpisodeStore, what every format reader gives: episodes with their arrays, pictures on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8

Progress = Callable[[int, int], None]
"""Called with (done, total) while a long step runs; total is 0 where it is not known beforehand."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One recorded trial: the frame rows [start, start + length) of its store.

    `instruction` is that of its first frame.
    """

    index: int
    start: int
    length: int
    instruction: str

    @property
    def end(self) -> int:
        """One past the last frame row."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """The sizes of a store. `image_shapes` has one (height, width) in pixels for each view."""

    views: tuple[str, ...]
    image_shapes: tuple[tuple[int, int], ...]
    state_dim: int
    action_dim: int
    fps: float
    num_frames: int
    embodiment: str


class EpisodeStore(ABC):
    """Episodes end to end in one global frame order; numbers in memory, pictures decoded on request.

    `states` (N, s) and `actions` (N, a) are in data units, `instruction_of` (N,) points into
    `instructions`. `fingerprint` changes whenever the stored files change; `name` names the store in
    messages (its folder).
    """

    name: str
    spec: StoreSpec
    episodes: tuple[Episode, ...]
    states: Float32[np.ndarray, "n s"]
    actions: Float32[np.ndarray, "n a"]
    instructions: tuple[str, ...]
    instruction_of: Int64[np.ndarray, " n"]
    fingerprint: str

    @abstractmethod
    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures of `view` at the global frame rows, in the order asked; sorted rows are fast.

        Raises UserError where a picture is missing, damaged or not of the promised size.
        """
