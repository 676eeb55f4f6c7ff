"""Normalises actions and states and inverts it: statistics per embodiment, saved with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tutti.errors import UserError

NormalizationKind = Literal["quantile", "standard"]
_Numbers = TypeVar("_Numbers", np.ndarray, Tensor)
_FLOOR = 1e-5
BLOCK = 1 << 18
"""Rows that are taken to float64 at a time."""
_ROWS = 1 << 14
_LOW, _HIGH = 0.01, 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionStats:
    """Statistics of each dimension of actions (or states), in data units, over all training frames.

    The quantiles are those of the data itself, not the means of per-episode quantiles that LeRobot
    0.6.1 stores, which leave up to 55 % of the frames outside.
    """

    q01: Float64[np.ndarray, " d"]
    q99: Float64[np.ndarray, " d"]
    mean: Float64[np.ndarray, " d"]
    std: Float64[np.ndarray, " d"]
    min: Float64[np.ndarray, " d"]
    max: Float64[np.ndarray, " d"]

    @classmethod
    def fit(cls, *parts: Float[np.ndarray, "_ d"]) -> Self:
        """Of all rows of some arrays, laid end to end (`of`)."""
        return cls.of(parts, sum(map(len, parts)))

    @classmethod
    def of(cls, parts: Iterable[Float[np.ndarray, "_ d"]], most: int) -> Self:
        """Of all rows of some arrays, `most` at most, in one pass: each is looked at once, a block of rows at
        a time, and of all of them 2 % at each end are kept, for quantiles that are exact.

        Quantiles interpolate linearly between neighbours. All but `std` are the bits that NumPy gives of all
        rows at once, in whatever parts they come; so is `std` of one block, of several to 1e-12 of it: their
        sums of squares about their own means are added up (Chan et al. 1979).
        """
        count, total, squares = 0, np.zeros((1, 0)), np.zeros(0)
        lowest, highest = list[_Smallest](), list[_Smallest]()
        for rows in _blocks(parts):
            if not count:
                total, squares = np.zeros((1, rows.shape[1])), np.zeros(rows.shape[1])
                kept = int((most - 1) * _LOW) + 2, most - int((most - 1) * _HIGH)
                lowest, highest = ([_Smallest(size) for _ in squares] for size in kept)
            wide, before = rows.astype(np.float64), total[0] / max(1, count)
            total = np.concatenate([total, wide]).sum(axis=0, keepdims=True)
            # Of the first block this is the mean of all rows so far.
            mean = (total[0] if not count else wide.sum(axis=0)) / len(wide)
            own = np.concatenate([np.zeros_like(total), np.square(wide - mean)]).sum(axis=0)
            share = count * len(wide) / (count + len(wide))
            squares, count = squares + own + np.square(mean - before) * share, count + len(wide)
            for column, low, high in zip(rows.T, lowest, highest, strict=True):
                low.add(column)
                high.add(-column)
        ends = [(low.sorted(), -high.sorted()[::-1]) for low, high in zip(lowest, highest, strict=True)]
        quantiles = np.array([_quantiles(*both, count) for both in ends], np.float64).reshape(-1, 2)
        low, high = (np.array([both[place][place] for both in ends], np.float64) for place in (0, -1))
        mean, std = total[0] / count, np.sqrt(squares / count)
        return cls(q01=quantiles[:, 0], q99=quantiles[:, 1], mean=mean, std=std, min=low, max=high)

    def center_and_scale(
        self, kind: NormalizationKind
    ) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, " d"]]:
        """The affine map of each dimension: normalised = (x - center) / scale.

        quantile: q01 to -1 and q99 to 1, unclipped; where these two coincide, min to -1 and max to 1.
        standard: mean to 0, standard deviation to 1.
        A dimension that does not move (by less than 1e-5, relative to its size above 1) only gets its
        center taken off: scale 1.
        """
        floor = _FLOOR * np.maximum(1.0, np.abs(self.mean))
        if kind == "standard":
            return self.mean, np.where(self.std < floor, 1.0, self.std)
        center, scale = (self.q99 + self.q01) / 2, (self.q99 - self.q01) / 2
        rare = scale < floor  # for example a gripper that closes in under 1 % of the frames
        center = np.where(rare, (self.max + self.min) / 2, center)
        scale = np.where(rare, (self.max - self.min) / 2, scale)
        return center, np.where(scale < floor, 1.0, scale)

    @property
    def moves(self) -> Bool[np.ndarray, " d"]:
        """The dimensions that are not constant."""
        return self.max - self.min > _FLOOR * np.maximum(1.0, np.abs(self.mean))

    def is_far(self, values: Float[np.ndarray, " d"]) -> Bool[np.ndarray, " d"]:
        """Where a value is below min or above max by more than (max - min) / 2; by more than half a unit in a
        dimension that does not move."""
        margin = np.where(self.moves, self.max - self.min, 1.0) / 2
        return (values < self.min - margin) | (values > self.max + margin)

    def to_dict(self) -> dict[str, list[float]]:
        """Plain numbers for JSON; `from_dict` gives the same statistics back to the last bit."""
        return {name: values.tolist() for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises: UserError naming the dimension, for numbers that no data can have.
        """
        numbers = {name: np.asarray(data[name], dtype=np.float64) for name in cls.__slots__}
        shapes = {name: value.shape for name, value in numbers.items()}
        if len(set(shapes.values())) > 1 or numbers["min"].ndim != 1:
            raise UserError(f"expected as many numbers of each kind as there are dimensions, found {shapes}")
        stats = cls(**numbers)
        wrong = {f"{name} is not finite": ~np.isfinite(value) for name, value in numbers.items()} | {
            "min is above max": stats.min > stats.max,
            "q01 is above q99": stats.q01 > stats.q99,
            "std is below 0": stats.std < 0,
            "std is 0 although min and max differ": (stats.std == 0) & stats.moves,
        }
        for what, where in wrong.items():
            if where.any():
                raise UserError(f"dimension {np.flatnonzero(where)[0]}: {what}")
        return stats


def _blocks(parts: Iterable[Float[np.ndarray, "_ d"]]) -> Iterator[Float[np.ndarray, "_ d"]]:
    """All rows in blocks of one size, the last one smaller."""
    held: list[np.ndarray] = []
    for part in parts:
        # NumPy adds rows of several numbers one by one, but a lone column in pairs, so that its blocks count.
        begin, size = 0, BLOCK if part.shape[1] == 1 else _ROWS
        while begin < len(part):
            held.append(part[begin : begin + size - sum(map(len, held))])
            begin += len(held[-1])
            if sum(map(len, held)) == size:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)


class _Smallest:
    """The `count` smallest of some numbers, of which at most twice as many and a block are held."""

    def __init__(self, count: int) -> None:
        self._count, self._limit = count, np.inf
        self._held, self._size = list[np.ndarray](), 0

    def add(self, values: Float[np.ndarray, " n"]) -> None:
        """More of them."""
        self._held.append(found := values[values < self._limit])
        self._size += len(found)
        if self._size > 2 * self._count:
            values = np.concatenate(self._held)
            values.partition(self._count - 1)
            self._held, self._limit = [values[: self._count].copy()], values[self._count - 1]
            self._size = self._count

    def sorted(self) -> Float[np.ndarray, " _"]:
        """In order."""
        return np.sort(np.concatenate(self._held))[: self._count]


def _quantiles(low: Float[np.ndarray, " m"], high: Float[np.ndarray, " k"], count: int) -> list[float]:
    """The quantiles 0.01 and 0.99 of `count` numbers, as `np.quantile` gives them in float64; `low` are the
    smallest of them and `high` the largest, in order."""
    found: list[float] = []
    for values, first, quantile in ((low, 0, _LOW), (high, count - len(high), _HIGH)):
        place = (count - 1) * quantile
        below, share = int(place), place - int(place)
        near = (values[min(one, count - 1) - first] for one in (below, below + 1))
        small, large = map(float, near)
        # From the nearer end, as NumPy does, so that the last bits are the same.
        found.append(
            small + (large - small) * share if share < 0.5 else large - (large - small) * (1 - share)
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbodimentStats:
    """The statistics of one embodiment's states and actions."""

    state: ActionStats
    action: ActionStats


class Normalizer:
    """Maps states and actions of each embodiment to normalised units, and actions back.

    Works on numpy arrays and tensors of shape (..., d) alike and keeps their type. `embodiment` may be
    left out where there is only one.
    """

    def __init__(self, kind: NormalizationKind, stats: dict[str, EmbodimentStats]) -> None:
        self.kind: NormalizationKind = kind
        self.stats = stats
        self._maps = {
            (name, what): getattr(both, what).center_and_scale(kind)
            for name, both in stats.items()
            for what in ("state", "action")
        }

    @classmethod
    def fit(
        cls,
        kind: NormalizationKind,
        embodiment: str,
        states: Float[np.ndarray, "n s"],
        actions: Float[np.ndarray, "m a"],
    ) -> Self:
        """Of the training frames of one embodiment, those that have states and those that have actions."""
        both = EmbodimentStats(state=ActionStats.fit(states), action=ActionStats.fit(actions))
        return cls(kind, {embodiment: both})

    def apply_action(self, actions: _Numbers, embodiment: str | None = None) -> _Numbers:
        """Data units to normalised."""
        center, scale = self._map(actions, "action", embodiment)
        return (actions - center) / scale

    def apply_state(self, states: _Numbers, embodiment: str | None = None) -> _Numbers:
        """Data units to normalised."""
        center, scale = self._map(states, "state", embodiment)
        return (states - center) / scale

    def undo_action(self, actions: _Numbers, embodiment: str | None = None) -> _Numbers:
        """Normalised to data units: the inverse of `apply_action`."""
        center, scale = self._map(actions, "action", embodiment)
        return actions * scale + center

    def to_dict(self) -> dict[str, Any]:
        """For JSON and checkpoints; `from_dict` gives an equal normalizer back."""
        stats = {
            name: {"state": both.state.to_dict(), "action": both.action.to_dict()}
            for name, both in self.stats.items()
        }
        return {"kind": self.kind, "stats": stats}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises: UserError for an unknown kind, or statistics that no data can have.
        """
        if data["kind"] not in get_args(NormalizationKind):
            known = " or ".join(get_args(NormalizationKind))
            raise UserError(f"kind: expected {known}, found {data['kind']!r:.80}")
        found: dict[str, dict[str, ActionStats]] = {}
        for name, both in data["stats"].items():
            for what in ("state", "action"):
                try:
                    found.setdefault(name, {})[what] = ActionStats.from_dict(both[what])
                except UserError as error:
                    raise UserError(f"{what} of embodiment {name!r}: {error}") from error
        return cls(data["kind"], {name: EmbodimentStats(**both) for name, both in found.items()})

    def check(self, embodiment: str, state_dim: int, action_dim: int) -> None:
        """Raises: UserError unless it has statistics of these numbers of dimensions for the embodiment."""
        self._map(np.empty(state_dim), "state", embodiment)
        self._map(np.empty(action_dim), "action", embodiment)

    def _map(self, values: _Numbers, what: str, embodiment: str | None) -> tuple[_Numbers, _Numbers]:
        name = next(iter(self.stats)) if embodiment is None and len(self.stats) == 1 else embodiment
        if name is None or name not in self.stats:
            raise UserError(
                f"embodiment {embodiment!r} has no statistics; expected one of {tuple(self.stats)}."
            )
        center, scale = self._maps[name, what]
        if values.shape[-1] != len(center):
            raise UserError(
                f"The {what} of embodiment {name!r} has {len(center)} dimensions in the statistics; found "
                f"{values.shape[-1]}."
            )
        if isinstance(values, Tensor):
            like = {"dtype": values.dtype, "device": values.device}
            return torch.as_tensor(center, **like), torch.as_tensor(scale, **like)
        return center.astype(values.dtype), scale.astype(values.dtype)
