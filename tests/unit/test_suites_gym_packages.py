"""PushT and ALOHA through their own packages, where these are installed."""

from __future__ import annotations

import numpy as np
import pytest

from tutti.suites.registry import SUITES


@pytest.mark.parametrize("name", ["pusht", "aloha-transfer-cube", "aloha-insertion"])
def test_a_start_is_a_function_of_its_seed_and_pictures_are_of_the_policys_size(name: str) -> None:
    pytest.importorskip("gym_pusht" if name == "pusht" else "gym_aloha")
    suite = SUITES[name]
    world = suite.make(suite.tasks[0])
    world.reset(3)
    first, seen = world.privileged, world.render()
    assert seen.shape == (1, suite.image_size, suite.image_size, 3) and seen.std() > 10
    assert world.state.shape == (suite.state_dim,) and suite.one_a_process is (name != "pusht")
    goal = world.state + 1
    for _ in range(3):
        world.step(goal.astype(np.float32))
    assert not world.success and np.abs(world.state - first[: suite.state_dim]).max() > 0
    assert (world.render() != seen).any()
    world.reset(4)
    assert not np.array_equal(world.privileged, first)
    world.reset(3)
    np.testing.assert_array_equal(world.privileged, first)
    world.close()
