"""A script that picks a thing up and puts it into or onto another, seeing where everything is.

LIBERO has no expert. This one turns the hand so that the fingers close over the narrowest side, and goes
through six stages; it solves most tasks of LIBERO-Object and some of LIBERO-Spatial.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from tutti.errors import UserError

REACH = 0.05
"""Metres that an action of 1 moves the hand's target by; 0.5 rad that it turns it by."""
TURN = 0.5
ABOVE, CARRY = 0.12, 0.30
"""Metres above the thing from which the hand comes down, and the height at which it is carried."""
OPEN, CLOSED = -1.0, 1.0
CLOSING = 12
"""Steps that the fingers are given to close."""
OPENING, LOWER = 0.075, 0.1
"""Metres that the fingers can hold between them; above the goal where a thing is let go."""
DEPTH = 0.02
"""How far the fingertips go below the top of a thing."""


class Expert:
    """Stages: above the thing, down, close, up and over the goal, down to it, let go.

    A thing that is wider than the fingers open is held by its rim.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        self._stage = self._waited = 0
        self._yaw: float | None = None
        self._grasp, self._aside = np.zeros(3), np.zeros(3)

    def action(self, env: Any, seen: Mapping[str, Any]) -> Float32[np.ndarray, " 7"]:
        """What it does now. Raises: UserError for a task that is no pick and place of one thing."""
        relation, thing, goal = _pick_and_place(env)
        hand = np.asarray(seen["robot0_eef_pos"])
        if self._yaw is None:
            self._plan(_corners(env, thing))
        turn = _turn(_rotation(np.asarray(seen["robot0_eef_quat"])), self._yaw or 0.0)
        over = np.asarray(seen[f"{goal}_pos"]) + self._aside + [0, 0, CARRY]
        if np.linalg.norm(hand[:2] - over[:2]) > 0.05 and hand[2] < over[2] - 0.1:
            over = np.array([*hand[:2], over[2]])  # straight up first
        down = over - [0, 0, CARRY - LOWER] if relation == "on" else over
        above = self._grasp + np.array([0, 0, ABOVE])
        target = (above, self._grasp, hand, over, down, hand)[self._stage]
        closed, turns = 2 <= self._stage < 5, self._stage < 2
        self._advance(float(np.linalg.norm(hand - target)), turn)
        move = np.clip(2 * (target - hand) / REACH, -1, 1)
        spin = np.clip(2 * turn / TURN, -1, 1) if turns else 0.0
        return np.array([*move, 0, 0, spin, CLOSED if closed else OPEN], np.float32)

    def _plan(self, corners: Float64[np.ndarray, "n 3"]) -> None:
        """Where to take hold of a thing with these corners."""
        self._yaw = narrowest(corners[:, :2])
        across = np.array([np.cos(self._yaw), np.sin(self._yaw), 0.0])
        low, high = corners.min(0), corners.max(0)
        if (width := float(np.ptp(corners @ across))) > OPENING:
            self._aside = across * width / 2
        height = max(high[2] - DEPTH, (high[2] + low[2]) / 2 - 0.01)
        self._grasp = np.array([*(low + high)[:2] / 2, height]) + self._aside

    def _advance(self, distance: float, turn: float) -> None:
        self._waited += 1
        near = {0: distance < 0.015 and abs(turn) < 0.05, 1: distance < 0.008, 3: distance < 0.03}
        near[4] = distance < 0.02
        late = {1: 40, 2: CLOSING, 4: 40}
        if near.get(self._stage, False) or self._waited >= late.get(self._stage, 200):
            self._stage, self._waited = min(self._stage + 1, 5), 0


def narrowest(points: Float64[np.ndarray, "n 2"]) -> float:
    """The direction, radians in [0, pi), across which the points are narrowest.

    >>> corners = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    >>> round(float(np.degrees(narrowest(corners))))
    90
    """
    angles = np.radians(np.arange(0, 180, 3))
    across = points @ np.stack([np.cos(angles), np.sin(angles)])
    return float(angles[np.argmin(np.ptp(across, axis=0))])


def _pick_and_place(env: Any) -> tuple[str, str, str]:
    """How, what and where to, by the names of the simulation."""
    goals = env.env.parsed_problem["goal_state"]
    things = env.env.objects_dict
    if len(goals) == 1 and goals[0][0] in ("in", "on") and goals[0][1] in things:
        goal = next((name for name in things if goals[0][2].startswith(name)), None)
        if goal is not None:
            return goals[0][0], goals[0][1], goal
    raise UserError(
        f"LIBERO's expert picks one thing up and puts it into or onto another; this task asks for {goals}. "
        "Record tasks of libero-object or libero-spatial (record.tasks)."
    )


def _corners(env: Any, thing: str) -> Float64[np.ndarray, "n 3"]:
    """The vertices of a thing's visible meshes, in the world."""
    model, data = env.sim.model._model, env.sim.data._data
    body = env.env.obj_body_id[thing]
    found = []
    for geom in range(model.ngeom):
        mesh = int(model.geom_dataid[geom])
        if model.body_rootid[model.geom_bodyid[geom]] != model.body_rootid[body] or mesh < 0:
            continue
        if model.geom_group[geom] == 1:
            first, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
            vertices = np.asarray(model.mesh_vert[first : first + count])
            found.append(vertices @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(found)


def _rotation(quaternion: Float64[np.ndarray, " 4"]) -> Float64[np.ndarray, "3 3"]:
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _turn(rotation: Float64[np.ndarray, "3 3"], yaw: float) -> float:
    """Radians about the world's z to turn the fingers, which open along the hand's y, into this direction."""
    now = np.arctan2(rotation[1, 1], rotation[0, 1])
    return float((yaw - now + np.pi / 2) % np.pi - np.pi / 2)
