"""Key frames: changes of named grippers and episode ends, never across an episode's border."""

from __future__ import annotations

import numpy as np
import pytest

from tutti.data.keyframes import check_grippers, next_keyframes
from tutti.types import UserError


def actions(command: list[float]) -> np.ndarray:
    return np.stack([np.zeros(len(command)), np.array(command)], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("command", "ends", "expected"),
    [
        # Row 2 closes; rows 2 and 3 look ahead to the end; row 5 opens anew but begins an episode.
        ([0, 0, 1, 1, 1, 0, 0, 1], [5] * 5 + [8] * 3, [2, 2, 4, 4, 4, 7, 7, 7]),
        ([0, 0.1, 0.05, 1.0, 0.9], [5] * 5, [3, 3, 3, 4, 4]),  # small changes do not count
        ([1, 1, 1], [3] * 3, [2, 2, 2]),  # it never moves
    ],
)
def test_the_next_change_of_the_gripper_or_the_end(
    command: list[float], ends: list[int], expected: list[int]
) -> None:
    assert next_keyframes(actions(command), np.array(ends), (1,)).tolist() == expected


def test_the_key_frame_is_never_before_its_row_nor_past_the_end() -> None:
    random = np.random.default_rng(0)
    ends = np.repeat([40, 100], [40, 60])
    found = next_keyframes(actions(random.integers(0, 2, 100).tolist()), ends, (1,))
    rows = np.arange(100)
    assert ((found > rows) | (rows == ends - 1)).all() and (found < ends).all()


def two_arms() -> tuple[np.ndarray, np.ndarray]:
    """Smooth joints of two arms, grippers at 3 and 7; two episodes, whose grippers have other values."""
    time = np.arange(300) / 30
    joints = np.stack([np.sin(time * (1 + place)) for place in range(8)], axis=1).astype(np.float32)
    joints[:, 3] = np.where((time > 3) & (time < 6), 1.0, 0.0)
    joints[:, 7] = np.where((time > 2) & (time < 4), 0.6, -1.0)
    joints[150:, 7] = np.where(time[150:] > 8, 1.0, 0.0)
    return joints, np.repeat([150, 300], 150)


def test_each_hand_makes_key_frames() -> None:
    joints, ends = two_arms()
    one, other, both = (set(next_keyframes(joints, ends, named).tolist()) for named in ((3,), (7,), (3, 7)))
    assert one | other == both and one != both != other
    assert np.unique(next_keyframes(joints, ends)).tolist() == [149, 299]  # without one, the ends alone
    assert both == {61, 91, 120, 149, 180, 241, 299}


def test_what_opens_and_closes_is_a_gripper_though_tasks_have_other_commands() -> None:
    joints, ends = two_arms()
    assert check_grippers(joints, ends, (3, 7), "set") == ()
    joints[40, 3] = 0.5  # 1 of 300 on its way
    assert check_grippers(joints, ends, (3, 7), "set") == ()


def test_a_second_hand_that_is_not_named_is_said_and_one_that_never_moves_is_none() -> None:
    joints, ends = two_arms()
    joints = np.concatenate([joints, np.ones((300, 1), np.float32)], axis=1)
    names = tuple(f"left.{place}" for place in range(4)) + tuple(f"right.{place}" for place in range(5))
    (remark,) = check_grippers(joints, ends, (7,), "set", names)
    assert remark.startswith("set: action dimension 3 (left.3) opens and closes too")
    assert "names 7 (right.3) alone" in remark and remark.endswith("gripper.dimension=[3, 7].")
    with pytest.raises(UserError, match=r"0 \(left\.0\) .*(\n.*)+3 \(left\.3\), 7 \(right\.3\) would do"):
        check_grippers(joints, ends, (0,), "set", names)


@pytest.mark.parametrize("dimension", [0, 6, "noise", "slow"])
def test_a_dimension_with_more_values_is_refused_with_those_that_would_do(dimension: int | str) -> None:
    joints, ends = two_arms()
    if dimension == "noise":
        joints[:, 0] = np.random.default_rng(0).normal(size=300)
    if dimension == "slow":
        joints[:, 0] = np.linspace(0, 1e-3, 300)
    place = dimension if isinstance(dimension, int) else 0
    with pytest.raises(UserError, match=rf"gripper\.dimension {place} .* no gripper in set") as caught:
        check_grippers(joints, ends, (3, place), "set")
    assert "(3, 7 would do)" in str(caught.value) and len(str(caught.value).splitlines()) == 4
