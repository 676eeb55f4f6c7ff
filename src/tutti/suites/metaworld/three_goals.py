"""A scene with a red, a green and a blue goal at once: only the sentence says which of them to reach.

Meta-World's reach task with three spheres at random places. Its tasks share the scene to the last bit: start
`seed` shows the same picture whichever goal is told, so a policy that does not listen reaches the told one in
a third of its rollouts at most, if it goes to one goal.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
from jaxtyping import Float64

from tutti.suites.metaworld.rendering import load_metaworld, load_mujoco

COLOURS: dict[str, tuple[float, float, float, float]] = {
    "reach-red": (0.9, 0.0, 0.0, 1.0),
    "reach-green": (0.0, 0.75, 0.0, 1.0),
    "reach-blue": (0.0, 0.1, 1.0, 1.0),
}
"""The colour of each task's own goal."""
GOAL_SIZE = 0.035
"""Radius of a sphere, m: some 50 of the 4,096 pixels of a 64 px view."""
RADIUS = 0.05
"""A goal is reached where the hand's centre is at most so far from it, m: Meta-World's own limit."""
LOW, HIGH = (-0.25, 0.62, 0.06), (0.25, 0.88, 0.28)
"""The box of the goals, m: in both views of the suite, and within the hand's reach."""
APART, CLEAR = 0.16, 0.11
"""Least distance of two goals, and of a goal from the way to another one, m."""
HIDDEN = (0.0, 0.6, -1.0)
"""Where the puck of the reach scene is put, below the table."""


def draw_goals(random: np.random.Generator, start: Float64[np.ndarray, " 3"]) -> Float64[np.ndarray, "3 3"]:
    """The places of the three goals, uniform in their box among those that are `APART`, and `CLEAR` of the
    hand's `start` and of the straight way from it to each other goal: nobody passes a goal by chance."""
    while True:
        goals = random.uniform(LOW, HIGH, size=(len(COLOURS), 3))
        others = [(goals[i], np.delete(goals, i, axis=0)) for i in range(len(goals))]
        if all(np.linalg.norm(rest - goal, axis=1).min() >= APART for goal, rest in others) and all(
            _distances(rest, start, goal).min() >= CLEAR for goal, rest in others
        ):
            return goals


def _distances(
    points: Float64[np.ndarray, "n 3"], start: Float64[np.ndarray, " 3"], end: Float64[np.ndarray, " 3"]
) -> Float64[np.ndarray, " n"]:
    """How far each point is from the stretch between `start` and `end`."""
    way = end - start
    along = np.clip((points - start) @ way / (way @ way), 0.0, 1.0)
    return np.linalg.norm(points - start - along[:, None] * way, axis=1)


@functools.cache
def three_goals() -> tuple[type, type]:
    """The environment class of the scene, and the expert, which is that of reach."""
    environments, experts = load_metaworld()
    mujoco, reach = load_mujoco(), environments["reach-v3"]
    box = importlib.import_module("gymnasium.spaces").Box

    class ThreeGoals(reach):  # type: ignore[misc, valid-type]
        """`told` is the task whose goal counts; `places` the goals' places, by their tasks."""

        told = next(iter(COLOURS))

        def __init__(self) -> None:
            self.places = dict.fromkeys(COLOURS, np.zeros(3))
            super().__init__()
            self.goal_space = box(np.array(LOW), np.array(HIGH), dtype=np.float64)

        def _initialize_simulation(self) -> tuple[Any, Any]:
            spec = mujoco.MjSpec.from_file(self.fullpath)
            for site in [one for one in spec.sites if one.name == "goal"]:
                site.delete()
            for name, colour in COLOURS.items():
                # At another place than its body's own: a site compiled there would stay there for ever.
                spec.worldbody.add_site(name=name, pos=LOW, size=[GOAL_SIZE] * 3, rgba=colour)
            model = spec.compile()
            return model, mujoco.MjData(model)

        def reset_model(self) -> np.ndarray:
            self._reset_hand()
            self._set_obj_xyz(np.array(HIDDEN))
            goals = draw_goals(self.np_random, self.hand_init_pos)
            self.places = dict(zip(COLOURS, goals, strict=True))
            for name, place in self.places.items():
                self.model.site(name).pos = place
            self._target_pos = self.places[self.told]
            return self._get_obs()

        @property
        def _target_site_config(self) -> list[tuple[str, np.ndarray]]:
            return list(self.places.items())

        def _get_pos_objects(self) -> np.ndarray:
            """The two goals that are not told."""
            return np.concatenate([place for name, place in self.places.items() if name != self.told])

        def _get_quat_objects(self) -> np.ndarray:
            return np.tile((1.0, 0.0, 0.0, 0.0), len(COLOURS) - 1)

    return ThreeGoals, experts["reach-v3"]
