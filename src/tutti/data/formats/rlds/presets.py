"""What the features of an RLDS set are for: presets of the Open X sets, guesses by usual names elsewhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tutti.data.conventions.config import (
    ActionConventions,
    ConventionsConfig,
    GripperConfig,
    RotationConfig,
)
from tutti.data.conventions.rotations import RotationForm, size_of
from tutti.data.formats.interface import Feature, Roles

Gripper = Literal[
    "open_is_one", "closed_is_one", "clipped_open", "clipped_closed", "relative_closed", "none", "unknown"
]
_SLICE = re.compile(r"(.+)\[(\d{1,6}):(\d{1,6})\]")
_STATES = ("state", "proprio", "robot_state", "robot_obs", "eef_state", "joint_states", "joint_state")
_TEXTS = ("language_instruction", "natural_language_instruction", "instruction")
_PARTS = ("world_vector", "rotation_delta", "open_gripper", "gripper_closedness_action")
_NO_ACTION = ("terminate_episode", "is_terminal")


_OPEN, _CLOSED = {"open": 1.0, "closed": 0.0}, {"open": 0.0, "closed": 1.0}
_GRIPPERS: Mapping[Gripper, dict[str, Any]] = {
    "open_is_one": _OPEN,
    "closed_is_one": _CLOSED,
    "clipped_open": {**_OPEN, "values": "clipped"},
    "clipped_closed": {**_CLOSED, "values": "clipped"},
    "relative_closed": {"open": -1.0, "closed": 1.0, "values": "changes"},
}
_ROTATIONS: Mapping[str, RotationForm] = {
    "euler": "euler_xyz",
    "axis_angle": "axis_angle",
    "quaternion": "quaternion_xyzw",
}
"""What is read where only the kind is known: roll, pitch and yaw about fixed axes, and w last."""
GUESSED = {
    "euler": "their order is taken to be roll, pitch, yaw",
    "quaternion": "w is taken to be the last number",
}


class Preset(BaseModel):
    """What is known of a set: keys of its roles, robot, rate, and conventions.

    `gripper` says how the action's last number becomes 1 = open and 0 = closed, `rotation` in which form the
    action turns, `drop` what other trainings leave out; presets.toml lists the words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...] = ()
    robot: str = "unknown"
    fps: float | None = Field(default=None, gt=0)
    views: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    text: str | None = None
    gripper: Gripper = "unknown"
    rotation: Literal["euler", "axis_angle", "quaternion", "none", "unknown"] = "unknown"
    drop: tuple[Literal["first_step", "zero_actions"], ...] = ()
    remarks: tuple[str, ...] = ()

    def conventions(self, action_dim: int) -> ConventionsConfig:
        """Gripper and rotation of an action of three numbers of position, the rotation, and the gripper."""
        known: dict[str, Any] = {}
        if hand := _GRIPPERS.get(self.gripper):
            known["gripper"] = GripperConfig(dimension=action_dim - 1, **hand)
        if form := _ROTATIONS.get(self.rotation):
            last = 2 + size_of(form)
            if last < action_dim:
                known["rotation"] = RotationConfig(dimensions=f"3-{last}", form=form)
        return ConventionsConfig(action=ActionConventions(**known))


@cache
def read_presets() -> Mapping[str, Preset]:
    """All presets by the name of their set."""
    text = Path(__file__).with_name("presets.toml").read_text(encoding="utf-8")
    return {name: Preset.model_validate(values) for name, values in tomllib.loads(text).items()}


def find_preset(name: str) -> Preset | None:
    """The preset of the set that dataset_info.json calls `name`."""
    for pattern, preset in read_presets().items():
        if any(fnmatchcase(name, one) for one in (pattern, *preset.names)):
            return preset
    return None


def cut(key: str) -> tuple[str, slice]:
    """A key, and which numbers of the vector it takes: "state[0:6]" the first six."""
    found = _SLICE.fullmatch(key)
    return (found[1], slice(int(found[2]), int(found[3]))) if found else (key, slice(None))


def choose_roles(name: str, preset: Preset | None, features: Mapping[str, Feature]) -> tuple[Roles, Preset]:
    """The roles by the preset where the set has its features, else by usual names, with reasons; and what of
    the conventions is known."""
    guessed = _guess(features)
    if preset is None:
        return _roles(guessed, dict.fromkeys(_ROLES, f"{name} has no preset; by usual names")), guessed
    chosen: dict[str, tuple[str, ...] | str | None] = {}
    reasons = {}
    for role in _ROLES:
        keys = getattr(preset, role)
        missing = [key for key in _many(keys) if not _is_there(key, features)]
        chosen[role] = getattr(guessed, role) if missing else keys
        if missing:
            named = ", ".join(missing)
            reasons[role] = f"the preset of {name} names {named}, which this set lacks; by usual names"
    known = preset.model_copy(update=chosen)
    if "action" in reasons:
        known = known.model_copy(update={"gripper": guessed.gripper, "rotation": guessed.rotation})
    return _roles(known, reasons), known


_ROLES = ("views", "state", "action", "text")


def _roles(known: Preset, reasons: Mapping[str, str]) -> Roles:
    return Roles(
        views=known.views, state=known.state, action=known.action, text=known.text, reasons=dict(reasons)
    )


def _many(keys: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return keys if isinstance(keys, tuple) else (keys,) if keys else ()


def _is_there(key: str, features: Mapping[str, Feature]) -> bool:
    name, part = cut(key)
    feature = features.get(name)
    return feature is not None and (part.stop is None or part.start < part.stop <= feature.shape[0])


def _guess(features: Mapping[str, Feature]) -> Preset:
    def of_kind(kind: str, *within: str) -> Iterator[str]:
        return (key for key, one in features.items() if one.kind == kind and key.startswith(within))

    def first(kind: str, names: Iterable[str], *folders: str) -> tuple[str, ...]:
        known = set(of_kind(kind, ""))
        return tuple(key for name in names for folder in folders if (key := folder + name) in known)[:1]

    views = tuple(of_kind("picture", "observation/")) or tuple(of_kind("picture", ""))
    action = first("vector", ("action", "actions"), "")
    if not action:
        within = [key for key in of_kind("vector", "action/") if not key.endswith(_NO_ACTION)]
        parts = [key for part in _PARTS for key in within if key == f"action/{part}"]
        action = tuple(parts or within)
    text = first("text", _TEXTS, "", "observation/", "episode_metadata/")
    state = first("vector", _STATES, "observation/", "")
    last = action[-1] if action else ""
    gripper: Gripper = "unknown"
    if last.endswith("open_gripper"):
        gripper = "open_is_one"
    elif last.endswith("gripper_closedness_action"):
        gripper = "relative_closed"
    return Preset(views=views, state=state, action=action, text=text[0] if text else None, gripper=gripper)
