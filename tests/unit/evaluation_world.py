"""A toy world for the tests of evaluation: a point on a line must reach the goal that the text names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutti.evaluation.closed_loop.rollouts import RolloutPolicy
from tutti.types import UserError

GOALS = {"left": -1.0, "right": 1.0, "here": 0.0}


class LineWorld:
    """State (x,), action (dx,) in [-1, 1] times 0.25. "here" is solved at the start: physics alone solves
    it.
    """

    def __init__(self, task: str) -> None:
        self.goal = GOALS[task]
        self.x = 0.0
        self.solved = False
        self.pictures = 0

    def reset(self, seed: int) -> None:
        self.x = float(np.random.default_rng(seed).uniform(-0.3, 0.3))
        self.solved = self.goal == 0.0

    def step(self, action: np.ndarray) -> None:
        self.x += 0.25 * float(np.clip(action[0], -1, 1))
        self.solved |= abs(self.x - self.goal) < 0.2

    def render(self) -> np.ndarray:
        self.pictures += 1
        return np.full((1, 4, 4, 3), 128 + int(20 * self.x), np.uint8)

    @property
    def state(self) -> np.ndarray:
        return np.array([self.x], np.float32)

    @property
    def privileged(self) -> np.ndarray:
        return np.array([self.x, self.goal])

    @property
    def success(self) -> bool:
        return self.solved

    def expert_action(self) -> np.ndarray:
        return np.array([np.sign(self.goal - self.x)], np.float32)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class LineWorlds:
    """The factory. `log` receives a line per environment built, from whichever process."""

    log: Path | None = None
    tasks: tuple[str, ...] = ("left", "right", "here")
    fingerprint: str = "line world 1"
    action_dim: int = 1
    longest: int = 50

    def __call__(self, task: str) -> LineWorld:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {task}\n")
        return LineWorld(task)

    def instructions(self, task: str, split: str) -> tuple[str, ...]:
        return (
            (f"go {task}", f"please go {task}")
            if split == "train"
            else (f"move {task}", f"{task} now", f"to {task}")
        )


class ListeningPolicy:
    """Goes where the text says, a chunk of 3 at a time; without pictures it stays."""

    def predict(
        self, images: np.ndarray | None, state: np.ndarray, instruction: str, use_images: bool = True
    ) -> np.ndarray:
        assert (images is None) == (not use_images)
        direction = -1.0 if "left" in instruction else 1.0
        return np.full((3, 1), direction if use_images else 0.0, np.float32)


class DeafPolicy(ListeningPolicy):
    """Cheats: always goes right, whatever it is told."""

    def predict(
        self, images: np.ndarray | None, state: np.ndarray, instruction: str, use_images: bool = True
    ) -> np.ndarray:
        return np.full((3, 1), 1.0, np.float32)


class BrokenPolicy(ListeningPolicy):
    """Gives NaN."""

    def predict(
        self, images: np.ndarray | None, state: np.ndarray, instruction: str, use_images: bool = True
    ) -> np.ndarray:
        return np.full((3, 1), np.nan, np.float32)


class FragilePolicy(ListeningPolicy):
    """Fails at one start, as an interruption would."""

    def predict(
        self, images: np.ndarray | None, state: np.ndarray, instruction: str, use_images: bool = True
    ) -> np.ndarray:
        if "right" in instruction:
            raise UserError("the power went out")
        return super().predict(images, state, instruction, use_images)


@dataclass(frozen=True)
class Policies:
    """The factory of one of the policies above."""

    kind: type[ListeningPolicy] = ListeningPolicy
    fingerprint: str = "weights 1"

    def __call__(self) -> RolloutPolicy:
        return self.kind()
