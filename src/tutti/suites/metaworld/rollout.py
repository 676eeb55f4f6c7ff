"""Whole rollouts from a seed: replayed in high resolution for videos, and the expert and no-op controls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from tutti.suites.metaworld.task import ACTION_DIM, STEP_LIMIT, MetaWorldTask


class Outcome(NamedTuple):
    """How a rollout ended: solved or not, after how many decisions."""

    success: bool
    decisions: int


def replay(
    task: str,
    seed: int,
    actions: Iterable[np.ndarray],
    views: tuple[str, ...] = ("right",),
    image_size: int = 256,
    *,
    action_repeat: int = 4,
) -> UInt8[np.ndarray, "t v h w 3"]:
    """Frames of the rollout that executed `actions` (one for each decision), T + 1 with the first.

    The physics is that of the rollout to the last bit; the pictures are finer (smooth edges, and above
    128 px all triangles). Shadows and reflections stay off.

    Raises:
        UserError: no OpenGL context can be opened, or task or view is unknown.
        ValueError: an action is not 4 finite numbers, or there are more than fit in 500 simulation steps.
    """
    with MetaWorldTask(task, views, image_size, action_repeat=action_repeat, samples=4) as simulation:
        simulation.reset(seed)
        frames = [simulation.render()]
        for action in actions:
            simulation.step(action)
            frames.append(simulation.render())
    return np.stack(frames)


def expert_rollout(task: str, seed: int, max_decisions: int = 100, *, action_repeat: int = 4) -> Outcome:
    """The scripted expert from this start, without pictures: the ceiling of the success rate."""
    return _rollout(task, seed, max_decisions, action_repeat, MetaWorldTask.expert_action)


def noop_rollout(task: str, seed: int, max_decisions: int = 100, *, action_repeat: int = 4) -> Outcome:
    """A robot that never moves from this start, without pictures: the floor of the success rate."""
    still = np.zeros(ACTION_DIM, dtype=np.float32)
    return _rollout(task, seed, max_decisions, action_repeat, lambda _: still)


def _rollout(
    task: str,
    seed: int,
    max_decisions: int,
    action_repeat: int,
    policy: Callable[[MetaWorldTask], np.ndarray],
) -> Outcome:
    simulation = _physics(task, action_repeat)
    simulation.reset(seed)
    decisions = 0
    while not simulation.success and decisions < max_decisions and simulation.num_steps < STEP_LIMIT:
        simulation.step(policy(simulation))
        decisions += 1
    return Outcome(simulation.success, decisions)


@functools.lru_cache(maxsize=2)
def _physics(task: str, action_repeat: int) -> MetaWorldTask:
    """One simulation is 0.2 CPU s to build and 90 MB to keep, so few are kept."""
    return MetaWorldTask(task, action_repeat=action_repeat)
