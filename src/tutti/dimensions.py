"""What a model must know of its data: views, sizes, names and units, robots that differ, grippers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from tutti.errors import UserError

CLOSE = 0.05
"""How near to one of the two values counts as being there, as a share of their distance."""
MAX_AWAY = 0.02
"""The share of the values of a gripper that may lie elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What each number of a state and of an action is: its name and its unit ("m", "" where it has none).

    Empty where it is not known: names in older checkpoints, units in data that do not tell them.
    """

    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    state_units: tuple[str, ...] = ()
    action_units: tuple[str, ...] = ()

    def dimensions(self) -> dict[str, tuple[str, ...]]:
        """The names and units alone, by their fields."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Dimensions)}

    def contradiction(self, other: Dimensions) -> str:
        """How numbers at one place mean something else in `other`, in one sentence; empty if they do not.

        They do where a name that both have is at another place, or both name another unit. A name that is
        spelt or chosen otherwise is none: "Left Waist" and "left_waist" are one name.
        """
        for what in ("state", "action"):
            names, others = getattr(self, f"{what}_names"), getattr(other, f"{what}_names")
            mine, theirs = _spellings(names), _spellings(others)
            for name in mine.keys() & theirs.keys() if len(names) == len(others) else ():
                if mine[name] != theirs[name]:
                    return f"the same names of {what} dimensions in another order: {others} and {names}"
            units = zip(names, getattr(self, f"{what}_units"), getattr(other, f"{what}_units"), strict=False)
            for name, unit, unit_there in units:
                if unit and unit_there and unit != unit_there:
                    return f"{what} dimension {name!r} in {unit_there!r} and in {unit!r}"
        return ""


def dimension_label(names: Sequence[str], number: int) -> str:
    """How a message calls a dimension: "dimension 3 (gripper)", by its number where it has no name."""
    return f"dimension {number} ({names[number]})" if names else f"dimension {number}"


UNNAMED = Dimensions()
"""Nothing is known of the numbers."""


def _spellings(names: Sequence[str]) -> dict[str, int]:
    """The place of each name, without case and punctuation where that leaves them distinct."""
    plain = [re.sub(r"[\W_]+", "", name.casefold()) for name in names]
    return {name: place for place, name in enumerate(plain if len(set(plain)) == len(plain) else names)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embodiment(Dimensions):
    """What one of several robots has of a model's views and numbers.

    `state_slots[i]` is the place in the model's state at which the robot's own number i stands, and
    `action_slots` the same of the action; the other places are masked. Names and units are of its numbers.
    """

    views: tuple[str, ...]
    state_slots: tuple[int, ...]
    action_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec(Dimensions):
    """The sizes that a model must know of its data, and what its numbers are. Saved in every checkpoint.

    `image_size` is the edge of the square pictures in pixels, `text_length` the padded number of text
    tokens, `fps` the number of actions a second, `history` the steps that are observed, 0 the present.

    Of several `embodiments` that differ, `robots` has what each of them is, in this order, and the sizes are
    those that all of them fit into; names and units are then there only where all robots share them.
    """

    views: tuple[str, ...]
    image_size: int
    state_dim: int
    action_dim: int
    horizon: int
    vocab_size: int
    text_length: int
    embodiments: tuple[str, ...]
    fps: float
    history: tuple[int, ...] = (0,)
    robots: tuple[Embodiment, ...] = ()

    def robot(self, name: str) -> Embodiment:
        """What an embodiment has: all of it, where they do not differ. Raises: KeyError for another name."""
        if name not in self.embodiments:
            raise KeyError(name)
        if self.robots:
            return self.robots[self.embodiments.index(name)]
        state, action = tuple(range(self.state_dim)), tuple(range(self.action_dim))
        return Embodiment(views=self.views, state_slots=state, action_slots=action, **self.dimensions())

    def present(self, what: Literal["state", "action"]) -> list[list[bool]] | None:
        """Which dimensions each embodiment has, and last, those of no robot: none. None: all have all. Plain
        numbers, since in a plan tensors have no values."""
        slots = [getattr(self.robot(name), f"{what}_slots") for name in self.embodiments]
        places = range(getattr(self, f"{what}_dim"))
        if all(len(own) == len(places) for own in slots):
            return None
        return [[place in own for place in places] for own in [*slots, ()]]

    def label(self, what: Literal["state", "action"], place: int) -> str:
        """How a message calls a number of the model's state or action: "3 (gripper)"; where robots name it
        differently, "3 (arm z, hand grip)"."""
        names = getattr(self, f"{what}_names")
        told = [names[place]] if names else []
        for name, robot in zip(self.embodiments, () if told else self.robots, strict=False):
            slots, names = getattr(robot, f"{what}_slots"), getattr(robot, f"{what}_names")
            told += [f"{name} {names[slots.index(place)]}"] if names and place in slots else []
        return f"{place} ({', '.join(told)})" if told else str(place)

    def alone(self, name: str) -> DataSpec:
        """That of one embodiment by itself: its own views, sizes, names and units. Raises: KeyError."""
        own = self.robot(name)
        return replace(
            self,
            views=own.views,
            state_dim=len(own.state_slots),
            action_dim=len(own.action_slots),
            embodiments=(name,),
            robots=(),
            **own.dimensions(),
        )


def share_away(values: Tensor, low: Tensor, high: Tensor) -> float:
    """The share of `values` that are near to neither `low` nor `high`, which broadcast to them."""
    distance = torch.minimum((values - low).abs(), (values - high).abs())
    return float((distance > CLOSE * (high - low)).double().mean())


def gripper_dimensions(
    dimensions: Sequence[int],
    action_dim: int,
    key: str,
    names: Sequence[str] = (),
    robots: Sequence[Embodiment] = (),
) -> tuple[int, ...]:
    """The dimensions from 0 on, in rising order; `key` names them in the config, `names` in the data.

    Raises: UserError if one of them is none of an action's, is named twice, or is counted from the end, which
    lies elsewhere for each of several `robots`.
    """
    if robots and min(dimensions, default=0) < 0:
        raise UserError(
            f"{key} is {min(dimensions)}, counted from the end of an action, but the robots have actions of "
            f"{', '.join(str(len(robot.action_slots)) for robot in robots)} numbers.\n  cure: count from 0."
        )
    for dimension in dimensions:
        if not -action_dim <= dimension < action_dim:
            called = f" ({', '.join(f'{place} {name}' for place, name in enumerate(names))})" if names else ""
            raise UserError(
                f"{key} is {dimension}, but actions have {action_dim} dimensions{called}: choose from 0 to "
                f"{action_dim - 1}, or -1 for the last."
            )
    from_zero = tuple(sorted(dimension % action_dim for dimension in dimensions))
    if len(set(from_zero)) < len(from_zero):
        raise UserError(f"{key} names a dimension twice: {', '.join(map(str, dimensions))}. Keep one.")
    return from_zero
