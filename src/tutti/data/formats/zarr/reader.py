"""Reads Zarr replay buffers as diffusion policy and UMI write them: arrays joined over all episodes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tutti.data.content import digest
from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import MAX_DIM, MAX_EDGE, EpisodeReader, Feature, Roles
from tutti.data.formats.pictures import SAMPLED_BYTES
from tutti.data.formats.zarr.arrays import REWRITE, ZarrArray
from tutti.data.formats.zarr.stores import MARKS, open_files

MAX_STEPS = 10**9
"""Steps of all episodes."""
ENDS = "meta/episode_ends"
_STATES = ("state", "agent_pos", "robot_state", "robot_eef_pose")
_POSE = re.compile(r"robot\d+_(eef_pos|eef_rot_axis_angle|gripper_width)")
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eef_pos": (("x", "y", "z"), ("m",) * 3),
    "eef_rot_axis_angle": (("rx", "ry", "rz"), ("rad",) * 3),
    "gripper_width": (("width",), ("m",)),
}
"""Names and units of the numbers of UMI's arrays."""


class ZarrReader(EpisodeReader):
    """A Zarr store of format 2: a folder, or a `.zarr.zip`. Keys are the names of the arrays in `data`,
    each (steps, ...): pictures (steps, h, w, 3) of bytes, or of whole floats from 0 to 255, and vectors,
    whose axes are laid end to end. `meta/episode_ends` holds the end of each episode, exclusive.

    Raises: UserError as EpisodeReader says.
    """

    fps = None

    def __init__(self, path: Path) -> None:
        self.name, files = str(path), open_files(path)
        if files.read(MARKS[1], 2**20) is not None:
            raise data_error(f"{path}: a Zarr store of format 3.", expected="format 2", cure=REWRITE)
        self._ends = self._read_ends(ZarrArray(files, ENDS))
        self.lengths = np.diff(self._ends, prepend=0)
        self._arrays: dict[str, ZarrArray] = {}
        features: dict[str, Feature] = {}
        passed_over: list[str] = []
        for key in files.arrays("data"):
            array = ZarrArray(files, f"data/{key}")
            if array.shape[0] != self._ends[-1]:
                expected = f"{self._ends[-1]:,} rows, as {ENDS} says"
                raise array.error("it is of another length", expected, f"{array.shape[0]:,}")
            if feature := _feature(key, array):
                self._arrays[key], features[key] = array, feature
            else:
                passed_over.append(f"{key} {list(array.shape)} of {array.dtype}")
        self.features = features
        line = f"passed over, neither colour pictures nor vectors: {', '.join(passed_over[:12])}"
        self.remarks = (f"{self.name}: {line}",) * bool(passed_over)

    def roles(self) -> Roles:
        """By the names of diffusion policy, and of UMI, which has no actions: they are the poses to come."""
        vectors = [key for key, feature in self.features.items() if feature.kind == "vector"]
        poses = tuple(key for key in _ordered(vectors) if _POSE.fullmatch(key))
        state = next(((key,) for key in _STATES if key in vectors), poses)
        reasons = {"fps": f"the store has no rate; {'UMI records at 59.94 Hz' if poses else 'often 10 Hz'}"}
        action, lag = ("action",) if "action" in vectors else (), 0
        if not action and poses:
            action, lag = poses, 1
            reasons |= {
                "action": "UMI's poses",
                "lag": "an action is the pose that comes of it, a step later",
            }
        views = tuple(key for key, feature in self.features.items() if feature.kind == "picture")
        return Roles(views=views, state=state, action=action, lag=lag, reasons=reasons)

    def numbers(self, key: str, episode: int) -> Float32[np.ndarray, "n d"]:
        """A vector, as float32; beyond its range it becomes infinite."""
        rows = self._arrays[key].rows(self._steps(episode))
        with np.errstate(over="ignore", invalid="ignore"):
            return rows.reshape(len(rows), -1).astype(np.float32)

    def texts(self, key: str, episode: int) -> Sequence[str]:
        """There are none. Raises: KeyError."""
        raise KeyError(key)

    def pictures(
        self, key: str, episode: int, steps: Int64[np.ndarray, " k"]
    ) -> UInt8[np.ndarray, "k h w 3"]:
        """Pictures as bytes."""
        rows = self._arrays[key].rows(self._steps(episode)[steps])
        if rows.dtype == np.uint8:
            return rows
        pixels = rows.astype(np.uint8) if np.isfinite(rows).all() else rows
        if not np.array_equal(pixels, rows) or not np.isfinite(rows).all():
            low, high = float(rows.min()), float(rows.max())
            raise self._arrays[key].error(
                f"the pictures of episode {episode} are no bytes",
                "whole numbers from 0 to 255",
                f"{low:.4g} to {high:.4g}",
                cure="write the pictures as uint8.",
            )
        return pixels

    def another_reader(self) -> ZarrReader:
        """With arrays that keep what they have read last for themselves."""
        other = copy.copy(self)
        other._arrays = {key: array.another() for key, array in self._arrays.items()}
        return other

    def picture_files(self, key: str, episode: int) -> Sequence[Path]:
        """The files of the episode's chunks, or the zip file."""
        return list(self._arrays[key].files(self._steps(episode)))

    def picture_digest(self, key: str, episode: int) -> int:
        """Of the pictures, evenly spread steps of them where a view has over `SAMPLED_BYTES`."""
        length, size = int(self.lengths[episode]), self._arrays[key].row_bytes
        most = max(4, SAMPLED_BYTES // len(self.lengths) // size)
        steps = np.unique(np.linspace(0, length - 1, min(length, most)).astype(np.int64))
        return digest(self._arrays[key].rows(self._steps(episode)[steps]).tobytes())

    def _steps(self, episode: int) -> Int64[np.ndarray, " n"]:
        end = int(self._ends[episode])
        return np.arange(end - int(self.lengths[episode]), end)

    @staticmethod
    def _read_ends(array: ZarrArray) -> Int64[np.ndarray, " e"]:
        if len(array.shape) != 1 or array.dtype.kind not in "iu" or not array.shape[0]:
            found = f"{list(array.shape)} of {array.dtype}"
            raise array.error("no ends of episodes", "a list of whole numbers", found)
        if array.shape[0] > MAX_STEPS:
            raise array.error("too many episodes", f"{MAX_STEPS:,}", f"{array.shape[0]:,}")
        found = array.rows(np.arange(array.shape[0]))
        ends = found.astype(np.int64)
        rising = np.diff(ends, prepend=0) > 0
        if not rising.all() or found[-1] > MAX_STEPS:
            episode = int(np.argmin(rising))
            expected = f"ends that rise, {MAX_STEPS:,} at most"
            raise array.error(f"episode {episode} ends at {found[episode]}", expected)
        return ends


def _feature(key: str, array: ZarrArray) -> Feature | None:
    """What an array is, if it is read."""
    shape, kind = array.shape, array.dtype.kind
    if len(shape) == 4 and shape[3] == 3 and (kind == "f" or array.dtype == np.uint8):
        height, width = shape[1:3]
        return Feature(kind="picture", shape=(height, width)) if 0 < max(height, width) <= MAX_EDGE else None
    size = math.prod(shape[1:])
    if len(shape) > 3 or not 0 < size <= MAX_DIM:
        return None
    names, units = _PARTS[found[1]] if (found := _POSE.fullmatch(key)) else ((), ())
    told = {"names": names, "units": units} if len(names) == size else {}
    return Feature(kind="vector", shape=(size,), **told)


def _ordered(keys: Sequence[str]) -> list[str]:
    """Robot by robot, position, rotation, gripper."""
    parts = list(_PARTS)

    def place(key: str) -> tuple[str, int]:
        robot, _, part = key.partition("_")
        return robot, parts.index(part) if part in parts else len(parts)

    return sorted(keys, key=place)
