"""Other control rates: a recording of one rate as if it had been recorded at another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from tutti.data.content import Digests, digest
from tutti.data.conventions.config import GripperConfig, MotionConfig, RotationConfig, places
from tutti.data.conventions.conversion import Conversion, Resample
from tutti.data.conventions.rotations import (
    IDENTITY,
    RotationForm,
    as_near,
    inverse,
    of_quaternions,
    product,
    rotate,
    to_quaternions,
)
from tutti.data.conventions.vectors import Layout, Piece
from tutti.data.episodes import Episodes, EpisodeStore
from tutti.data.formats.chosen import excluding
from tutti.data.formats.errors import data_error

_DIGITS = 9
"""Decimals of a time in recorded steps: a rate such as 29.97 is no fraction that floats hold."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows of some episodes at another rate, in `steps` recorded ones each: the first and the last
    recorded row of each row's episode, and its number in it."""

    steps: float
    start: Int64[np.ndarray, " n"]
    last: Int64[np.ndarray, " n"]
    step: Int64[np.ndarray, " n"]

    def block(self, recorded: slice) -> Grid:
        """The rows of the whole episodes that are recorded in these rows, which count from 0."""
        own = slice(*np.searchsorted(self.start, (recorded.start, recorded.stop)))
        return Grid(
            self.steps, self.start[own] - recorded.start, self.last[own] - recorded.start, self.step[own]
        )

    def nearest(self) -> Int64[np.ndarray, " n"]:
        """The recorded row that is nearest in time to each row, the later of two."""
        return self._rows(np.floor(np.round(self.step * self.steps, _DIGITS) + 0.5))

    def _held(self) -> Int64[np.ndarray, " n"]:
        """The recorded row whose action is in force when that of each row ends."""
        return self._rows(np.ceil(np.round((self.step + 1) * self.steps, _DIGITS)) - 1)

    def _rows(self, steps: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The recorded rows of whole steps of each row's episode, within the episode."""
        return np.clip(self.start + steps.astype(np.int64), self.start, self.last)

    def _between(self, *, aimed: bool) -> tuple[np.ndarray, np.ndarray, Float64[np.ndarray, "n 1"]]:
        """The recorded rows before and after each row's time, and how far it lies between them. `aimed`: the
        time at which its action ends, of recorded rows by those at which theirs end."""
        time = np.round((self.step + 1) * self.steps - 1 if aimed else self.step * self.steps, _DIGITS)
        time = np.maximum(time, 0)  # a target is held before the first one
        before = np.floor(time)
        return self._rows(before), self._rows(np.ceil(time)), (time - before)[:, None]

    def states_of(self, learned: Float64[np.ndarray, "m s"], conversion: Conversion) -> np.ndarray:
        """The states at each row's time: numbers that a motion moves by a straight line, rotations along the
        shortest turn, grippers and whatever nothing is said of as at the nearest recorded row."""
        moved = conversion.said.action.motion
        straight = places(moved.of_state) if moved else range(0)
        out = learned[self.nearest()]
        self._interpolate(out, learned, conversion.state, straight, aimed=False)
        return out

    def actions_of(self, acting: Float64[np.ndarray, "m a"], conversion: Conversion) -> np.ndarray:
        """The actions of each row. Targets are those of the time at which the row's action ends: by a
        straight line, rotations along the shortest turn. Changes are what the recorded ones do between the
        row's time and the next: summed at a lower rate, split at a higher one, rotations by their product.
        Grippers and what nothing is said of are those in force when the row's action ends."""
        moved = conversion.said.action.motion
        out = acting[self._held()]
        if moved is None:
            return out
        span = places(moved.dimensions)
        delta = moved.kind == "delta"
        self._interpolate(out, acting, conversion.action, range(0) if delta else span, aimed=True, but=delta)
        if delta:
            self._sum(out, acting, conversion.action, moved)
        return out

    def _interpolate(
        self,
        out: np.ndarray,
        values: np.ndarray,
        layout: Layout,
        straight: range,
        *,
        aimed: bool,
        but: bool = False,
    ) -> None:
        """Fills in the dimensions `straight` of a layout, and its rotations unless `but`."""
        before, after, share = self._between(aimed=aimed)
        a, b = values[before], values[after]
        plain = _plain(layout, straight)
        out[:, plain] = np.where(share == 0, a[:, plain], (1 - share) * a[:, plain] + share * b[:, plain])
        for one in () if but else _turns(layout):
            form, scale = _form(one)
            first, second = (to_quaternions(x[:, one.there] * scale, form) for x in (a, b))
            turned = product(first, _part(product(inverse(first), second), share))
            found = as_near(of_quaternions(turned, form, layout.near), a[:, one.there] * scale, form) / scale
            out[:, one.there] = np.where(share == 0, a[:, one.there], found)

    def _sum(self, out: np.ndarray, acting: np.ndarray, layout: Layout, moved: MotionConfig) -> None:
        span = places(moved.dimensions)
        plain = _plain(layout, span)
        turns = [one for one in _turns(layout) if one.here.start in span]
        begin = np.round(self.step * self.steps, _DIGITS)
        end = np.round((self.step + 1) * self.steps, _DIGITS)
        sums = np.zeros((len(begin), len(plain)))
        whole = [np.tile(np.array(IDENTITY), (len(begin), 1)) for _ in turns]
        for number in range(math.ceil(self.steps) + 1):
            step = np.floor(begin) + number
            low, high = np.maximum(begin, step), np.minimum(end, step + 1)
            there = high > low
            rows, share = self._rows(step), np.where(there, high - low, 0.0)[:, None]
            moves = np.where(there[:, None], share * acting[rows][:, plain], 0.0)
            for k, one in enumerate(turns):
                form, scale = _form(one)
                change = to_quaternions(acting[rows][:, one.there] * scale, form)
                if moved.frame == "hand":
                    at = [plain.index(place) for place in _before(layout, one, span)]
                    passed = inverse(_part(change, (low - step)[:, None] * there[:, None]))
                    moves[:, at] = rotate(whole[k], rotate(passed, moves[:, at]))
                change = np.where(there[:, None], _part(change, share), IDENTITY)
                whole[k] = product(whole[k], change) if moved.frame == "hand" else product(change, whole[k])
            sums += moves
        out[:, plain] = sums
        for one, turned in zip(turns, whole, strict=True):
            form, scale = _form(one)
            out[:, one.there] = of_quaternions(turned, form) / scale


class ResampledStore(EpisodeStore):
    """A data set at `rate` steps a second instead of its own: row i of an episode is the time i / rate.

    Pictures and texts are those of the nearest recorded row. A row is there if its time lies in the recording
    and its action ends in it. Episodes are those of the data set, by the same digests, so that they are held
    out alike at any rate. States and actions are filled in by `conventions.store.apply`.

    Raises: UserError if an episode becomes shorter than two rows.
    """

    def __init__(self, store: EpisodeStore, rate: float) -> None:
        for name in EpisodeStore.__annotations__:  # all that a store says, but for what follows here
            setattr(self, name, getattr(store, name))
        self._recorded = store
        steps = store.spec.fps / rate
        before, self.known_digests = Episodes.of(store.episodes), {}
        old = before.lengths
        inside = np.floor(np.round((old - 1) / steps, _DIGITS)).astype(np.int64) + 1
        new = np.minimum(inside, np.floor(np.round(old / steps, _DIGITS)).astype(np.int64))
        if len(short := np.flatnonzero(new < 2)):
            one = before[int(short[0])]
            raise data_error(
                f"{store.name}: episode {one.index} has {one.length} steps at {store.spec.fps:g} a second, "
                f"{new[short[0]]} at {rate:g} (sources.resample); {len(short):,} such episodes in all.",
                expected="2 or more",
                cure=f"choose a higher rate, or leave them out: {excluding(before.numbers[short].tolist())}",
            )
        ends = np.cumsum(new)
        self.spec = replace(store.spec, fps=rate, num_frames=int(ends[-1]))
        start = np.repeat(before.starts, new)
        step = np.arange(len(start)) - np.repeat(ends - new, new)
        self.grid = Grid(steps, start, start + np.repeat(old - 1, new), step)
        self._nearest = self.grid.nearest()
        self.instruction_of = store.instruction_of[self._nearest]
        self.episodes = Episodes(before.numbers, ends - new, new, before.texts, before.instructions)
        self.remarks = (
            *store.remarks,
            f"{store.name}: {store.spec.fps:g} steps a second are resampled to {rate:g} (sources.resample)",
        )
        self.states = self.actions = np.empty((len(start), 0), np.float32)

    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures nearest in time."""
        return self._recorded.frames(view, self._nearest[rows])

    def share(self, how: Callable[[object], None]) -> None:
        """Those of what was recorded, too."""
        how(self)
        self._recorded.share(how)

    def another_reader(self) -> ResampledStore | None:
        """With another reader of the same files, if the data set has one."""
        if (reader := self._recorded.another_reader()) is None:
            return None
        other = copy.copy(self)
        other._recorded = reader
        return other

    def picture_files(self, view: str, rows: Int64[np.ndarray, " k"]) -> Iterable[Path]:
        """The files of the nearest pictures."""
        return self._recorded.picture_files(view, self._nearest[rows])

    def picture_digests(self) -> Digests:
        """Those of the recording."""
        return self._recorded.content.episodes["pictures"]

    @cached_property
    def number_digests(self) -> dict[str, Digests]:
        """Those of the recorded numbers, with the two rates."""
        rates = f"{self._recorded.spec.fps} {self.spec.fps}".encode()
        return {
            name: np.array([digest(rates, one.tobytes()) for one in many], np.uint64)
            for name, many in self._recorded.number_digests.items()
        }

    @property
    def identities(self) -> list[int]:
        """Those of the recording."""
        return self._recorded.identities

    def resampling(self, recorded: slice, conversion: Conversion) -> Resample:
        """What makes the rows of the episodes that lie in these recorded rows.

        Raises: UserError unless the conventions tell how actions move the robot: targets and changes are
        resampled in other ways.
        """
        if conversion.said.action.motion is None and conversion.action.dim:
            raise data_error(
                f"{self.name}: sources.resample is {self.spec.fps:g}, but its conventions do not say how its "
                "actions move the robot: changes (delta) are summed or split, targets (absolute) are not.",
                expected="conventions.action.motion: {kind: absolute or delta, dimensions: ...}",
                cure="say it, or keep the recorded rate (sources.resample=keep).",
            )
        grid = self.grid.block(recorded)
        return lambda states, actions: (
            grid.states_of(states, conversion),
            grid.actions_of(actions, conversion),
        )


def _plain(layout: Layout, span: range) -> list[int]:
    """The places of those recorded dimensions that are of no piece."""
    taken = {number for one in layout.pieces for number in range(one.here.start, one.here.stop)}
    return [layout.place(number) for number in span if number not in taken]


def _turns(layout: Layout) -> list[Piece]:
    return [one for one in layout.pieces if not isinstance(one.said, GripperConfig)]


def _form(one: Piece) -> tuple[RotationForm, float]:
    """The form that a rotation has in the learned vector, and the radians that 1 stands for."""
    assert isinstance(one.said, RotationConfig)
    return one.form or one.said.form, 1.0 if one.form else one.said.scale


def _before(layout: Layout, one: Piece, span: range) -> list[int]:
    """The places of the hand's position, the three plain numbers before its rotation. Raises: UserError."""
    found = _plain(layout, range(max(span.start, one.here.start - 3), one.here.start))
    if len(found) != 3:
        raise data_error(
            f"{layout.key}.motion: axes of the hand need its position and rotation.",
            expected="three numbers and then a rotation",
            cure="name the rotation (rotation), or use the frame base.",
        )
    return found


def _part(turn: Float64[np.ndarray, "n 4"], share: Float64[np.ndarray, "n 1"]) -> Float64[np.ndarray, "n 4"]:
    """This share of each rotation, the short way."""
    return to_quaternions(share * of_quaternions(turn, "axis_angle"), "axis_angle")
