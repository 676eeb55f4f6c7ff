"""Key frames: gripper changes and episode ends, never across an episode's border."""

from __future__ import annotations

import numpy as np

from tutti.data.keyframes import next_keyframes


def actions(command: list[float]) -> np.ndarray:
    return np.stack([np.zeros(len(command)), np.array(command)], axis=1).astype(np.float32)


def test_the_next_change_of_the_gripper_or_the_end() -> None:
    ends = np.array([5] * 5 + [8] * 3)
    found = next_keyframes(actions([0, 0, 1, 1, 1, 0, 0, 1]), ends)
    # Row 2 closes; rows 2 and 3 look ahead to the end; row 5 opens anew but begins an episode.
    assert found.tolist() == [2, 2, 4, 4, 4, 7, 7, 7]


def test_small_changes_do_not_count() -> None:
    found = next_keyframes(actions([0, 0.1, 0.05, 1.0, 0.9]), np.full(5, 5))
    assert found.tolist() == [3, 3, 3, 4, 4]


def test_a_gripper_that_never_moves_leaves_the_ends() -> None:
    assert next_keyframes(actions([1, 1, 1]), np.full(3, 3)).tolist() == [2, 2, 2]


def test_the_key_frame_is_never_before_its_row_nor_past_the_end() -> None:
    random = np.random.default_rng(0)
    ends = np.repeat([40, 100], [40, 60])
    found = next_keyframes(actions(random.integers(0, 2, 100).tolist()), ends)
    rows = np.arange(100)
    assert ((found > rows) | (rows == ends - 1)).all() and (found < ends).all()
