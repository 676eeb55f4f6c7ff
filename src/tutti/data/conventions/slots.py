"""Canonical slots: places of a model's vectors that mean the same of every robot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from tutti.data.conventions.config import GripperConfig, RotationConfig, Span, places
from tutti.data.conventions.usual import is_hand
from tutti.data.conventions.vectors import Layout, check_places
from tutti.data.episodes import VECTORS, EpisodeStore, Slot, Vector
from tutti.data.formats.errors import data_error
from tutti.frozen_config import FrozenConfig

Slots = Mapping[Vector, tuple[Slot, ...]]
"""The slot of each learned number of a robot's state and action."""
ORDER: tuple[Slot, ...] = get_args(Slot)
_OF_SECOND: Mapping[Slot, Slot] = {
    "position": "second_position",
    "rotation": "second_rotation",
    "joints": "second_joints",
    "gripper": "second_gripper",
}
_MOST = {"position": 3, "rotation": 9, "gripper": 1, "joints": 16, "base": 16}
"""Numbers that a slot of one arm may have at most."""
_POSITIONS: tuple[Slot, ...] = ("position", "second_position")
Numbers = Span | Annotated[int, Field(ge=0, le=4095)]


class VectorSlots(FrozenConfig):
    """Which recorded dimensions of a vector are of which slot: "0-2", both ends included, or one, 6. The rest
    is of the slot `other`."""

    position: Numbers | None = Field(default=None, description="Of the hand: x, y, z, or a change of it.")
    rotation: Numbers | None = Field(default=None, description="Of the hand, in any one form.")
    joints: Numbers | None = Field(default=None, description="The joints of the arm.")
    gripper: Numbers | None = Field(
        default=None, description="The gripper, of which conventions tell; it is 0 closed to 1 open."
    )
    base: Numbers | None = Field(default=None, description="A base that drives.")
    second_position: Numbers | None = Field(default=None, description="Likewise of a second arm.")
    second_rotation: Numbers | None = Field(default=None, description="Likewise of a second arm.")
    second_joints: Numbers | None = Field(default=None, description="Likewise of a second arm.")
    second_gripper: Numbers | None = Field(default=None, description="Likewise of a second arm.")

    def spans(self) -> dict[Slot, range]:
        """The dimensions of each slot that is said."""
        return {
            slot: range(said, said + 1) if isinstance(said, int) else places(said)
            for slot in ORDER[:-1]
            if (said := getattr(self, slot)) is not None
        }


class SlotsConfig(FrozenConfig):
    """Which numbers of a source are of which canonical slot."""

    state: VectorSlots | Literal["auto"] = Field(
        default="auto", description="Those of the state; auto: by names and conventions."
    )
    action: VectorSlots | Literal["auto"] = Field(
        default="auto", description="Those of the action; auto: by names and conventions."
    )

    @field_validator("state", "action")
    @classmethod
    def _rise(cls, said: VectorSlots | Literal["auto"]) -> VectorSlots | Literal["auto"]:
        for slot, span in said.spans().items() if isinstance(said, VectorSlots) else ():
            most = _MOST[slot.removeprefix("second_")]
            if not 0 < len(span) <= most:
                raise ValueError(f"{slot}: expected 1 to {most} rising dimensions, found {len(span)}")
        return said


AUTO = SlotsConfig()


def assign(store: EpisodeStore, said: SlotsConfig) -> tuple[Slots, tuple[str, ...]]:
    """The slot of each number of a store in its learned form, and lines for the user.

    Raises: UserError for dimensions that are not there or said twice, a rotation that is cut in two, or a
    gripper of which no convention tells when it is open.
    """
    assert store.converted is not None
    found: dict[Vector, tuple[Slot, ...]] = {}
    lines: list[str] = []
    for vector in VECTORS:
        layout: Layout = getattr(store.converted.conversion, vector)
        own, names = getattr(said, vector), getattr(store.spec, f"{vector}_names")
        key = f"{store.name}: sources.slots.{vector}"
        if isinstance(own, VectorSlots):
            slots, how = _said(own, layout, key, vector), "as said"
        else:
            slots, how = _guessed(layout, names), "guessed by conventions and names"
        found[vector] = tuple(slots)
        if slots:
            lines.append(f"{key}, {how}: {describe(slots, names)}")
        held = [name for name, slot in zip(names, slots, strict=False) if slot == "other" and is_hand(name)]
        if held and not isinstance(own, VectorSlots):
            lines.append(
                f"{store.name}: {', '.join(held)} of the {vector} may be a gripper, but nothing tells when "
                f"it is open: it is in no slot. sources.conventions.{vector}.gripper says it."
            )
    return found, tuple(lines)


def describe(slots: Sequence[Slot], names: Sequence[str] = ()) -> str:
    """Which numbers are of which slot, in words: "position 0-2 (x, y, z), gripper 6"."""
    parts: list[str] = []
    for slot, group in groupby(range(len(slots)), key=lambda number: slots[number]):
        run = list(group)
        span = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
        called = ", ".join(names[number] for number in run[:4]) + ", ..." * (len(run) > 4) if names else ""
        parts.append(f"{slot} {span}" + f" ({called})" * bool(called))
    return ", ".join(parts)


def places_in(each: Sequence[Sequence[Slot]]) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """Where the numbers of each robot stand in one vector, slot behind slot, each as wide as the widest robot
    has it; and the names of that vector's numbers."""
    widths = {slot: max((list(own).count(slot) for own in each), default=0) for slot in ORDER}
    starts = {slot: sum(widths[before] for before in ORDER[:place]) for place, slot in enumerate(ORDER)}
    found: list[tuple[int, ...]] = []
    for own in each:
        before = [list(own[:number]).count(slot) for number, slot in enumerate(own)]
        found.append(tuple(starts[slot] + count for slot, count in zip(own, before, strict=True)))
    names = (
        slot if width == 1 else f"{slot}[{place}]" for slot, width in widths.items() for place in range(width)
    )
    return found, tuple(names)


def check_same(stores: Sequence[EpisodeStore]) -> None:
    """Raises: UserError where a slot would hold other numbers of one robot than of another: rotations in two
    forms, or targets and changes."""
    told: dict[tuple[Vector, Slot], tuple[str, str, str]] = {}
    for store in stores:
        for key, (form, cure) in _forms(store, store.slots or {}).items():
            first, its, _ = told.setdefault(key, (store.name, form, cure))
            if its != form:
                vector, slot = key
                raise data_error(
                    f"data.slots is canonical, but the slot {slot} of the {vector} would mean two things.",
                    expected=f"{its}, as in {first}",
                    found=f"{form} in {store.name}",
                    cure=f"bring all to one form: {cure}",
                )


def _forms(store: EpisodeStore, slots: Slots) -> dict[tuple[Vector, Slot], tuple[str, str]]:
    """What the numbers of a slot are, where it is known, and the key that changes it."""
    assert store.converted is not None
    conversion, found = store.converted.conversion, dict[tuple[Vector, Slot], tuple[str, str]]()
    for vector in VECTORS:
        for piece in getattr(conversion, vector).pieces:
            if isinstance(piece.said, RotationConfig) and slots.get(vector):
                form = piece.form or piece.said.form
                cure = "data.canonical.rotation=rotation_6d, say."
                found[vector, slots[vector][piece.there.start]] = f"a rotation as {form}", cure
    moved, kept = conversion.said.action.motion, conversion.canonical.actions
    if slots.get("action") and (moved or kept != "keep"):
        kind = kept if kept != "keep" or moved is None else moved.kind
        cure = "data.canonical.actions=delta or absolute, with sources.conventions.action.motion of each."
        here: list[Slot] = [slot for slot in _POSITIONS if slot in slots["action"]]
        found |= {("action", slot): (f"{kind} actions", cure) for slot in here}
    return found


def _said(own: VectorSlots, layout: Layout, key: str, vector: Vector) -> list[Slot]:
    slots: list[Slot] = ["other"] * layout.learned_dim
    spans = own.spans()
    check_places(key, sorted(spans.values(), key=lambda span: span.start), layout.dim)
    for slot, span in spans.items():
        for number in span:
            piece = next((one for one in layout.pieces if one.here.start <= number < one.here.stop), None)
            if piece is None:
                slots[layout.place(number)] = slot
                continue
            if not (span.start <= piece.here.start and piece.here.stop <= span.stop):
                raise data_error(
                    f"{key}.{slot} cuts the rotation in dimensions {piece.here.start}-{piece.here.stop - 1}.",
                    expected="all of a rotation in one slot",
                    found=f"{span.start}-{span.stop - 1}",
                    cure="correct the dimensions.",
                )
            slots[piece.there] = [slot] * (piece.there.stop - piece.there.start)
        if slot.endswith("gripper") and not _is_told(layout, span.start):
            raise data_error(
                f"{key}.{slot} is dimension {span.start}, of which nothing tells when it is open.",
                expected="a number that becomes 0 closed to 1 open",
                found="no convention of it",
                cure=f"say it by sources.conventions.{vector}.gripper, or leave it out of the slots.",
            )
    return slots


def _is_told(layout: Layout, number: int) -> bool:
    return any(isinstance(one.said, GripperConfig) and one.here.start == number for one in layout.pieces)


_JOINTS = r"joint|shoulder|elbow|forearm|wrist|(left|right)_waist|_arm\b|^arm\b|main_|pan\b|lift\b|flex\b"
_NAMES: tuple[tuple[str, Slot], ...] = (
    (r"^base_|mobile_base|^base\b", "base"),
    (r"vel|effort|torque|force|leg|hand\b|finger|neck|head|torso", "other"),
    (_JOINTS, "joints"),
    (r"(^|[._])d?(r[xyz]|q[xyzw]|roll|pitch|yaw)$", "rotation"),
    (r"rotation|quat|euler|axis_angle|orientation|_ori\b", "rotation"),
    (r"(^|[._])d?[xyz]$|world_vector|(eef|ee|effector|cartesian|tcp)_?(pos|xyz|translation)", "position"),
    (r"^(position|translation|xyz)\b", "position"),
)
"""Patterns of names, in lower case and without a number in brackets; the first that fits tells the slot."""
_SECOND = re.compile(r"(left|right|robot\d)")


def _guessed(layout: Layout, names: Sequence[str]) -> list[Slot]:
    """By conventions first, then by names. A second arm is the one that is named second."""
    slots: list[Slot] = ["other"] * layout.learned_dim
    sides = list(dict.fromkeys(found[1] for name in names if (found := _SECOND.search(name.casefold()))))

    def of_arm(slot: Slot, number: int, *, later: bool = False) -> Slot:
        side = _SECOND.search(names[number].casefold()) if names else None
        second = later or (side is not None and sides.index(side[1]) == 1)
        return _OF_SECOND.get(slot, slot) if second else slot

    for number, name in enumerate(names):
        slots[number] = of_arm(_named(name), number)
    for piece in layout.pieces:
        kind: Slot = "gripper" if isinstance(piece.said, GripperConfig) else "rotation"
        before = slots[: piece.there.start]
        own = of_arm(kind, piece.there.start, later=before.count(kind) > 0)
        for number in range(piece.there.start, piece.there.stop):
            slots[number] = own
        three = range(piece.there.start - 3, piece.there.start)
        if kind == "rotation" and three.start >= 0 and {slots[number] for number in three} == {"other"}:
            for number in three:
                slots[number] = of_arm("position", piece.there.start, later=own != "rotation")
    for slot, most in ((one, _MOST[one.removeprefix("second_")]) for one in ORDER[:-1]):
        for number in [number for number, one in enumerate(slots) if one == slot][most:]:
            slots[number] = "other"
    return slots


def _named(name: str) -> Slot:
    plain = re.sub(r"\[\d+\]$", "", name.casefold())
    for pattern, slot in _NAMES:
        if re.search(pattern, plain):
            return slot
    return "other"


def slots_of_robot(used: Iterable[tuple[EpisodeStore, Sequence[Vector]]]) -> Slots:
    """The slots of the numbers of one embodiment, by its sources and what they use. Raises: UserError where
    these differ."""
    found: dict[Vector, tuple[Slot, ...]] = {"state": (), "action": ()}
    origin: dict[Vector, EpisodeStore] = {}
    for store, vectors in used:
        for vector in vectors:
            own = (store.slots or found)[vector]
            first = origin.setdefault(vector, store)
            if first is not store and own != found[vector]:
                raise data_error(
                    f"data.sources: {first.name} and {store.name} differ in slots of the {vector}; both are "
                    f"of the robot {first.spec.embodiment}.",
                    expected=describe(found[vector]),
                    found=describe(own),
                    cure="say them alike by sources.slots, and conventions by sources.conventions.",
                )
            found[vector] = own
    return found
