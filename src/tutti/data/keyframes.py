"""Key frames: where the gripper's command changes, and where an episode ends.

Between two of them the hand travels; at each of them something happens to an object. So the next key frame's
state says where the next object, or the goal, is (the heuristic of ARM, 2105.14829, and PerAct, 2209.05451,
which also count standstills; ours does not, because scripted hands slow down in the air).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64

CHANGE = 0.15
"""A change of the command from one frame to the next that counts, as a share of its range over the data."""


def next_keyframes(
    actions: Float[np.ndarray, "n a"], ends: Int64[np.ndarray, " n"], gripper: int = -1
) -> Int64[np.ndarray, " n"]:
    """For each row the first key frame after it in its episode; the last row of an episode is its own.

    `ends` is the exclusive end of each row's episode, `gripper` the dimension of the action that opens and
    closes the hand. Row r is a key frame if the gripper's command differs from that of row r - 1 of the
    same episode by more than `CHANGE` times its range, or if r is the episode's last row. A command that
    never changes leaves only the ends.
    """
    rows = np.arange(len(actions))
    command = actions[:, gripper].astype(np.float64)
    span = float(command.max() - command.min()) if len(command) else 0.0
    last = rows == ends - 1
    changes = np.zeros(len(rows), dtype=bool)
    changes[1:] = (np.abs(np.diff(command)) > CHANGE * span) & ~last[:-1]
    keys = np.flatnonzero(changes | last)
    following = keys[np.minimum(np.searchsorted(keys, rows, side="right"), len(keys) - 1)]
    return np.where(last, rows, following).astype(np.int64)
