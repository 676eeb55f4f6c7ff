"""EpisodeReader, what a format gives: features by their own keys, before it is said what each is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tutti.data.content import digest
from tutti.data.conventions.config import NOTHING_SAID, ConventionsConfig

Flip = Literal["none", "vertical", "turned"]
MAX_EDGE, MAX_DIM = 8192, 4096
"""Largest picture edge (pixels) and vector that a data set may have."""
MIN_FPS, MAX_FPS = 0.01, 10_000.0
"""Steps a second that a data set may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """What one key holds at each step: a picture of (height, width), a vector of (d,), or a text, shape ().

    `names` and `units` are those of a vector's numbers, empty where the format does not tell them.
    """

    kind: Literal["picture", "vector", "text"]
    shape: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Which features are the views, the state, the action and the instruction: keys, in this order, joined.

    `flip` says how pictures are stored: upright, with the bottom row first ("vertical"), or turned by 180
    degrees ("turned"). `lag`: so many actions before observation t was taken, action t had been sent; 0 where
    o[t] is what the robot saw when it chose a[t], 1 where o[t] was recorded after a[t]. `reasons` has a line
    for each choice that the format had to guess, by the name of the field.
    """

    views: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    text: str | None = None
    flip: Flip = "none"
    lag: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)


class EpisodeReader(ABC):
    """A data set on disk by its own keys. It is opened fast: an index, and the lengths of all episodes.

    `name` is its folder in messages, `fps` None where the format does not store it. Episodes are numbered
    from 0 in the format's own order. Of an episode that nobody asks for nothing is read but its length, which
    is 0 where that cannot be; reading it then says why.
    `remarks` are lines for the user on what is passed over, and why. `is_pairs`: its episodes are no
    recordings of a robot, but a picture and a text each, of one step; its pictures have sizes of their own.
    `conventions` are those that the format stores, of the state and the action of its own roles; `told_by`
    says of each ("action.gripper") where it is from, and what of it was guessed. `usual` are those that its
    layout tells beside them, which are used where the model learns canonical slots.

    Raises: UserError (`data_error`) naming file, key, expected, found and cure for anything missing, damaged,
    or not of the promised shape, when it is opened or read. Nothing is ever unpickled.
    """

    name: str
    fps: float | None
    embodiment: str = "unknown"
    features: Mapping[str, Feature]
    lengths: Int64[np.ndarray, " e"]
    remarks: tuple[str, ...] = ()
    is_pairs: bool = False
    conventions: ConventionsConfig = NOTHING_SAID
    usual: ConventionsConfig = NOTHING_SAID
    told_by: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def roles(self) -> Roles:
        """What the features are for, as far as the format or its usual names tell."""

    @abstractmethod
    def numbers(self, key: str, episode: int) -> Float32[np.ndarray, "n d"]:
        """The vector `key` at every step of an episode, as stored; NaN where it is not known."""

    @abstractmethod
    def texts(self, key: str, episode: int) -> Sequence[str]:
        """The text `key` of an episode: one for all of its steps, or one for each."""

    @abstractmethod
    def pictures(
        self, key: str, episode: int, steps: Int64[np.ndarray, " k"]
    ) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures `key` at these steps of an episode, as stored, RGB."""

    def another_reader(self) -> EpisodeReader | None:
        """The same data set for another thread, without what this one has open or read last; None where one
        thread at a time may read pictures."""
        return None

    def picture_files(self, key: str, episode: int) -> Sequence[Path]:
        """The files that the pictures `key` of an episode are read from, as far as they are known."""
        return ()

    def picture_digest(self, key: str, episode: int) -> int:
        """A digest of an episode's pictures; a format may take them as stored, or a stated sample."""
        return digest(self.pictures(key, episode, np.arange(self.lengths[episode])).tobytes())
