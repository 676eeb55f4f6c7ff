"""The layouts of HDF5 files, as data: where episodes, pictures and vectors lie, and what their names mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutti.data.conventions.config import ConventionsConfig
from tutti.data.formats.interface import Feature, Flip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a family of files keeps what. Paths are those inside of an episode.

    `episodes` is the group whose members `demo_<number>` are the episodes; empty where a file is one episode.
    `marks`: a file is of the first layout of which its first episode has one of these. `groups` hold vectors,
    `pictures` is the one that holds pictures, which may be encoded where `encoded` is set. Of `states` the
    first choice of which a file has all members is the state; robots are counted for `{robot}`. What is
    `privileged` only a simulator knows; `without_steps` has not one row a step.
    """

    name: str
    episodes: str
    marks: tuple[str, ...]
    groups: tuple[str, ...]
    pictures: str
    encoded: bool
    action: str
    states: tuple[tuple[str, ...], ...]
    privileged: tuple[str, ...] = ()
    without_steps: tuple[str, ...] = ()
    flip: Flip = "none"
    embodiment: str = "unknown"
    fps: str = ""


LIBERO = Layout(
    name="LIBERO",
    episodes="data",
    marks=("obs/ee_states", "obs/agentview_rgb", "obs/eye_in_hand_rgb"),
    groups=("", "obs"),
    pictures="obs",
    encoded=False,
    action="actions",
    states=(("obs/ee_states", "obs/gripper_states"), ("robot_states",)),
    privileged=("states",),
    flip="vertical",
    embodiment="panda",
    fps="LIBERO runs at 20 Hz",
)
ROBOMIMIC = Layout(
    name="robomimic",
    episodes="data",
    marks=("obs", "actions"),
    groups=("", "obs"),
    pictures="obs",
    encoded=False,
    action="actions",
    states=(("obs/{robot}_eef_pos", "obs/{robot}_eef_quat", "obs/{robot}_gripper_qpos"),),
    privileged=("states", "obs/object"),
    fps="robosuite usually runs at 20 Hz",
)
ALOHA = Layout(
    name="ALOHA",
    episodes="",
    marks=("observations/qpos", "observations/images"),
    groups=("", "observations"),
    pictures="observations/images",
    encoded=True,
    action="action",
    states=(("observations/qpos",),),
    without_steps=("compress_len",),
    embodiment="aloha",
    fps="ALOHA usually runs at 50 Hz",
)
LAYOUTS = (LIBERO, ROBOMIMIC, ALOHA)
EXPECTED = (
    "data/demo_<number> with actions and obs (LIBERO, robomimic), or action and observations, one file an "
    "episode (ALOHA)"
)

_POSITION, _ROTATION = ("x", "y", "z"), ("rx", "ry", "rz")
_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_ARMS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _JOINTS)
_FINGERS = ("finger_1", "finger_2")
_METRES, _RADIANS = ("m",) * 3, ("rad",) * 3
_KNOWN: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (r"obs/ee_states", (*_POSITION, *_ROTATION), (*_METRES, *_RADIANS)),
    (r"obs/ee_pos|obs/robot\d_(base_to_)?(eef|base)_pos", _POSITION, _METRES),
    (r"obs/ee_ori", _ROTATION, _RADIANS),
    (r"obs/robot\d_(base_to_)?(eef|base)_quat", ("qx", "qy", "qz", "qw"), ("",) * 4),
    (r"obs/gripper_states|obs/robot\d_gripper_qpos", _FINGERS, ("m",) * 2),
    (r"obs/joint_states|obs/robot\d_joint_pos", tuple(f"joint_{i}" for i in range(1, 8)), ("rad",) * 7),
    (r"observations/qpos|action", _ARMS, (*("rad",) * 6, "") * 2),
    (r"observations/qvel", _ARMS, (*("rad/s",) * 6, "") * 2),
)
"""Patterns of keys, with the names and units of their numbers; they hold where there are as many. The
grippers of ALOHA are shares, 0 closed and 1 open."""
_OSC_POSE = (*_POSITION, *_ROTATION, "gripper")
"""A change of the hand's pose as shares of the controller's largest, 1 for 0.05 m or 0.5 rad; gripper -1
open, 1 closed."""


def usual(state: Sequence[str], action: Sequence[str], *, robot: str) -> ConventionsConfig:
    """What the numbers of LIBERO's and robomimic's usual features are, by the names of the state's and the
    action's: those of the controller OSC_POSE, changes of the hand's pose, of a Panda's fingers; of ALOHA's
    grippers, which are shares."""
    found: dict[str, Any] = {"state": {}, "action": {}}
    forms = {_ROTATION: ("axis_angle", 6), ("qx", "qy", "qz", "qw"): ("quaternion_xyzw", 7)}
    form, size = next((one for names, one in forms.items() if tuple(state[3 : one[1]]) == names), ("", 0))
    if size and tuple(state[:3]) == _POSITION:
        found["state"]["rotation"] = {"dimensions": f"3-{size - 1}", "form": form}
        if tuple(state[size:]) == _FINGERS and robot.casefold() == "panda":
            hand = {"dimension": size, "open": 0.04, "closed": 0.0, "values": "clipped"}
            found["state"]["gripper"] = hand
    if tuple(action) == _OSC_POSE:
        hand = {"dimension": 6, "open": -1.0, "closed": 1.0, "values": "clipped"}
        turn = {"dimensions": "3-5", "form": "axis_angle", "scale": 0.5}
        found["action"] = {"gripper": hand, "rotation": turn}
        if found["state"]:
            moved = {"kind": "delta", "dimensions": "0-5", "state": f"0-{size - 1}", "scale": 0.05}
            found["action"]["motion"] = moved
    for what, names in (("state", state), ("action", action)):
        if tuple(names) == _ARMS:
            places = (number for number, name in enumerate(_ARMS) if name.endswith("gripper"))
            hands = [{"dimension": n, "open": 1.0, "closed": 0.0, "values": "clipped"} for n in places]
            found[what] = {"gripper": hands}
    return ConventionsConfig.model_validate(found)


def vector(key: str, size: int, controller: str) -> Feature:
    """The feature of a vector, with the names and units of its numbers where they are known."""
    robot = found[1] if (found := re.match(r"obs/(robot[1-9])_", key)) else ""
    if key == "actions" and controller == "OSC_POSE" and size == len(_OSC_POSE):
        return Feature(kind="vector", shape=(size,), names=_OSC_POSE, units=("",) * size)
    for pattern, names, units in _KNOWN:
        if re.fullmatch(pattern, key) and len(names) == size:
            called = tuple(f"{robot}_{name}" for name in names) if robot else names
            return Feature(kind="vector", shape=(size,), names=called, units=units)
    return Feature(kind="vector", shape=(size,))
