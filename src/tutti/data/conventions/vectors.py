"""Layout: where grippers and rotations lie in a recorded vector and in the learned one, and both ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from tutti.data.conventions.config import (
    CanonicalConfig,
    GripperConfig,
    RotationConfig,
    VectorConventions,
    places,
)
from tutti.data.conventions.rotations import (
    IDENTITY,
    RotationForm,
    lengths,
    of_quaternions,
    size_of,
    to_quaternions,
)
from tutti.data.formats.errors import data_error
from tutti.errors import UserError

OUTSIDE = 0.01
"""How far a gripper's value may lie outside of its range, as a share of it."""
UNEVEN = 0.05
"""How far a length that must be 1 may be off: as rounding or interpolation leaves it."""
MOST_ANGLE = 4 * np.pi
"""Radians beyond which an angle is taken for degrees."""
DEGENERATE = 1e-3
"""A predicted rotation of a shorter length tells no direction."""
_KEEP = 0.05
"""How far a command that changes a gripper must lie off the middle, as a share of its range."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some numbers of a vector: those recorded lie `here`, those learned `there`; `form` is that of a
    rotation as it is learned, None where it is kept as it is."""

    here: slice
    there: slice
    said: GripperConfig | RotationConfig
    form: RotationForm | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """A vector of `dim` numbers, of which some are grippers and rotations, and of `learned_dim` as the model
    has it. The numbers of no piece stay as they are, in their order. `key` names it in messages."""

    key: str
    dim: int
    learned_dim: int
    pieces: tuple[Piece, ...]
    near: Sequence[float] = IDENTITY

    @classmethod
    def of(
        cls,
        said: VectorConventions,
        dim: int,
        canonical: CanonicalConfig,
        key: str,
        *,
        moved: range = range(0),
        near: Sequence[float] = IDENTITY,
    ) -> Layout:
        """Of what is said of a vector; rotations in `moved` take part in a conversion of motions.

        Raises: UserError for dimensions that are not there, or that two parts name.
        """
        found: list[tuple[range, GripperConfig | RotationConfig]] = []
        for hand in said.grippers:
            at = hand.dimension + dim * (hand.dimension < 0)
            found.append((range(at, at + 1), hand))
        found += [(places(turn.dimensions), turn) for turn in said.rotations]
        found.sort(key=lambda one: one[0].start)
        check_places(key, [one for one, _ in found], dim)
        pieces: list[Piece] = []
        shift = 0
        for span, one in found:
            form: RotationForm | None = None
            if isinstance(one, RotationConfig):
                form = one.form if canonical.rotation == "keep" else canonical.rotation
                if canonical.rotation == "keep" and span.start not in moved:
                    form = None
            size = size_of(form) if form else len(span)
            start = span.start + shift
            pieces.append(Piece(slice(span.start, span.stop), slice(start, start + size), one, form))
            shift += size - len(span)
        return cls(key, dim, dim + shift, tuple(pieces), near)

    @property
    def changes(self) -> bool:
        """Whether any number becomes another one."""
        return any(isinstance(one.said, GripperConfig) or one.form for one in self.pieces)

    def rotation(self, at: int) -> Piece | None:
        """The rotation that begins at this recorded number."""
        turns = (one for one in self.pieces if isinstance(one.said, RotationConfig))
        return next((one for one in turns if one.here.start == at), None)

    def place(self, at: int) -> int:
        """Where the recorded number `at` lies in the learned vector."""
        before = [one for one in self.pieces if one.here.stop <= at]
        return at + sum(
            (one.there.stop - one.there.start) - (one.here.stop - one.here.start) for one in before
        )

    def learn(
        self, values: Float[np.ndarray, "n d"], starts: Int64[np.ndarray, " e"] | None = None
    ) -> Float64[np.ndarray, "n l"]:
        """Recorded rows as they are learned, NaN where they are NaN. `starts` are the rows at which episodes
        begin, for grippers that are told by their changes."""
        out = self._others(values, self.learned_dim)
        for one in self.pieces:
            part = np.asarray(values[..., one.here], np.float64)
            if isinstance(one.said, GripperConfig):
                out[..., one.there] = _opened(part, one.said, starts)
            elif one.form:
                turned = to_quaternions(part * one.said.scale, one.said.form)
                out[..., one.there] = of_quaternions(turned, one.form, self.near)
            else:
                out[..., one.there] = part
        return out

    def record(self, values: Float[np.ndarray, "n l"]) -> Float64[np.ndarray, "n d"]:
        """The inverse of `learn`, also of rotations that are predicted and hence not quite proper.

        Raises: UserError for a rotation without a direction.
        """
        out = self._others(values, self.dim, back=True)
        for one in self.pieces:
            part = np.asarray(values[..., one.there], np.float64)
            if isinstance(one.said, GripperConfig):
                if one.said.values in ("two", "changes"):
                    part = (part >= 0.5).astype(np.float64)
                part = one.said.closed + part * (one.said.open - one.said.closed)
            elif one.form:
                # Of a matrix the third column is not looked at, so that it need not fit.
                if (lengths(part, one.form)[..., :2] < DEGENERATE).any():
                    raise UserError(
                        f"{self.key}: the predicted rotation has no direction: {part!r:.200}. Nothing was "
                        "given to the robot; the state may be far from those of the training data."
                    )
                part = of_quaternions(to_quaternions(part, one.form), one.said.form) / one.said.scale
            out[..., one.here] = part
        return out

    def faults(self, values: Float[np.ndarray, "n d"]) -> Iterator[tuple[Bool[np.ndarray, " n"], Piece, str]]:
        """(rows, piece, what is expected) for what a piece that is learned in another form cannot be. Rows of
        NaN are none."""
        for one in self.pieces:
            part = np.asarray(values[..., one.here], np.float64)
            if isinstance(one.said, GripperConfig):
                hand = one.said
                share = (part[..., 0] - hand.closed) / (hand.open - hand.closed)
                if hand.values == "two":
                    away = np.minimum(np.abs(share), np.abs(share - 1))
                    yield away > OUTSIDE, one, f"{hand.open:g} or {hand.closed:g}"
                elif hand.values == "range":
                    low, high = sorted((hand.open, hand.closed))
                    yield (share < -OUTSIDE) | (share > 1 + OUTSIDE), one, f"{low:g} to {high:g}"
            elif one.form:
                yield from self._turns(part, one, one.said)

    @staticmethod
    def _turns(
        part: np.ndarray, one: Piece, said: RotationConfig
    ) -> Iterator[tuple[Bool[np.ndarray, " n"], Piece, str]]:
        if size_of(said.form) == 3:
            far = np.asarray((np.abs(part * said.scale) > MOST_ANGLE).any(axis=-1))
            yield far, one, "angles in radians, or a scale: 0.0174533 for degrees"
            return
        off = np.asarray((np.abs(lengths(part, said.form) - 1) > UNEVEN).any(axis=-1))
        what = "length 1" if said.form.startswith("quaternion") else "columns of length 1 at right angles"
        yield off, one, f"{said.form} of {what}"

    def names(self, recorded: Sequence[str], units: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names and units of the learned numbers; those of no piece are called as before."""
        taken = [number for one in self.pieces if one.form for number in range(self.dim)[one.here]]
        kept = [number for number in range(self.dim) if number not in taken]
        names = dict[int, tuple[str, str]]()
        for number in kept:
            unit = units[number] if units else ""
            names[self.place(number)] = (recorded[number] if recorded else "", unit)
        turns = [one for one in self.pieces if one.form]
        for count, one in enumerate(turns):
            assert one.form
            label = one.form if len(turns) == 1 else f"{one.form}.{count}"
            for number in range(one.there.start, one.there.stop):
                unit = "rad" if size_of(one.form) == 3 else ""
                names[number] = f"{label}[{number - one.there.start}]", unit
        for one in self.pieces:
            if isinstance(one.said, GripperConfig):
                names[one.there.start] = names[one.there.start][0], ""
        found = [names[number] for number in range(self.learned_dim)]
        told = tuple(unit for _, unit in found)
        return tuple(name for name, _ in found) if recorded else (), told if any(told) else ()

    def _others(self, values: np.ndarray, size: int, *, back: bool = False) -> Any:
        """A vector of the other size, with the numbers of no piece."""
        out = np.empty((*values.shape[:-1], size), np.float64)
        kept = np.ones(self.dim, bool)
        for one in self.pieces:
            kept[one.here] = False
        here = np.flatnonzero(kept)
        there = [self.place(int(number)) for number in here]
        out[..., here if back else there] = values[..., there if back else here]
        return out


def check_places(key: str, spans: Sequence[range], dim: int) -> None:
    """Raises: UserError for rising spans that are not all in a vector of `dim` numbers, or that overlap."""
    for span in spans:
        if span.start < 0 or span.stop > dim:
            said = span.start if len(span) == 1 else f"{span.start}-{span.stop - 1}"
            raise data_error(
                f"{key} names dimension {said}, which is not there.",
                expected=f"0 to {dim - 1}, as the vector has {dim}",
                found=said,
                cure="correct it; `tutti data inspect` numbers the dimensions.",
            )
    for before, after in pairwise(spans):
        if before.stop > after.start:
            raise data_error(
                f"{key}: two parts name dimension {after.start}.",
                expected="each dimension in one gripper or rotation at most",
                found=f"{before.start}-{before.stop - 1} and {after.start}-{after.stop - 1}",
                cure="correct the dimensions.",
            )


def _opened(
    part: Float64[np.ndarray, "n 1"], hand: GripperConfig, starts: Int64[np.ndarray, " e"] | None
) -> Float64[np.ndarray, "n 1"]:
    """A gripper as 0 closed to 1 open."""
    share = (part - hand.closed) / (hand.open - hand.closed)
    if hand.values == "clipped":
        return share.clip(0, 1)
    if hand.values == "two":
        return np.where(np.isnan(share), share, np.round(share.clip(0, 1)))
    return _held(share, starts) if hand.values == "changes" else share


def _held(
    share: Float64[np.ndarray, "n 1"], starts: Int64[np.ndarray, " e"] | None
) -> Float64[np.ndarray, "n 1"]:
    """Commands that change a gripper as what it is: the last command, before the first one its opposite;
    open in an episode without any."""
    flat = share[..., 0]
    asked = np.abs(flat - 0.5) > _KEEP
    rows = np.arange(len(flat))
    begin = np.zeros(len(flat), np.int64)
    begin[[] if starts is None else starts] = [] if starts is None else starts
    begin = np.maximum.accumulate(begin)
    last = np.maximum.accumulate(np.where(asked, rows, -1))
    following = np.minimum.accumulate(np.where(asked, rows, len(rows))[::-1])[::-1]
    same = np.append(begin, -1)[following] == begin  # the next command is of the same episode
    first = np.where(same, flat[np.minimum(following, len(rows) - 1)] < 0.5, True)
    held = np.where(last >= begin, flat[last] > 0.5, first).astype(np.float64)
    return np.where(np.isnan(flat), np.nan, held)[..., None]
