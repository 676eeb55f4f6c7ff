"""Conventions that names and units tell: rotation types of GR00T, grippers whose name says what 1 is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from tutti.data.conventions.config import NOTHING_SAID, ConventionsConfig, GripperConfig, RotationConfig
from tutti.data.conventions.rotations import RotationForm, size_of
from tutti.data.episodes import VECTORS, EpisodeStore

_EULER: tuple[tuple[str, RotationForm], ...] = (
    ("rpy", "euler_XYZ"),
    ("ryp", "euler_XZY"),
    ("pry", "euler_YXZ"),
    ("pyr", "euler_YZX"),
    ("yrp", "euler_ZXY"),
    ("ypr", "euler_ZYX"),
)
ROTATIONS: Mapping[str, RotationForm] = {
    "axis_angle": "axis_angle",
    "quaternion": "quaternion_wxyz",
    **{f"euler_angles_{order}": form for order, form in _EULER},
}
"""GR00T's rotation types, which it reads by PyTorch3D: w first, Euler angles about turning axes. Its
rotation_6d and matrix are by rows, which no form here is."""
_GRIPPERS = ((r"clos", 0.0, 1.0), (r"open", 1.0, 0.0))
"""Of a gripper's name: what is 1 by it, with the values of open and closed."""


def usual_conventions(store: EpisodeStore) -> ConventionsConfig:
    """Those that the format stores, else what its layout tells, else names and units: of each vector its
    grippers, its rotations and its motion."""
    found: dict[str, Any] = {}
    for vector in VECTORS:
        stored, usual = getattr(store.conventions, vector), getattr(store.usual, vector)
        nothing = getattr(NOTHING_SAID, vector)
        names, units = (getattr(store.spec, f"{vector}_{what}") for what in ("names", "units"))
        parts: dict[str, Any] = {"rotation": tuple(_turns(units)), "gripper": tuple(_hands(names))}
        for said in (usual, stored):
            parts |= {name: one for name, one in said if one != getattr(nothing, name)}
        found[vector] = type(nothing)(**parts)
    return ConventionsConfig(**found)


def _turns(units: Sequence[str]) -> Iterator[RotationConfig]:
    kinds = [unit.partition(",")[0] for unit in units]
    for kind, group in groupby(range(len(kinds)), key=lambda number: kinds[number]):
        if form := ROTATIONS.get(kind):
            run, size = list(group), size_of(form)
            for first in run[: len(run) - size + 1 : size]:
                yield RotationConfig(dimensions=f"{first}-{first + size - 1}", form=form)


def _hands(names: Sequence[str]) -> Iterator[GripperConfig]:
    for number, name in enumerate(names):
        told = [said for said in _GRIPPERS if is_hand(name) and re.search(said[0], name.casefold())]
        if len(told) == 1:
            yield GripperConfig(dimension=number, open=told[0][1], closed=told[0][2], values="clipped")


def is_hand(name: str) -> bool:
    """Whether a number is called a gripper."""
    return re.search(r"grip|claw", name.casefold()) is not None
