"""A suite of your own, without a simulator: a dot goes to the red or the green end, as the sentence says."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

import tutti
from tutti.suites.environment import Split, Suite
from tutti.suites.registry import SUITES

ENDS = {"red": -0.8, "green": 0.8}
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 40)}


class Dot:
    """One task, an `Environment`: the state is (x,) in [-1, 1], an action (dx,) moves it by a tenth."""

    reached = None  # no goals of several tasks to tell apart

    def __init__(self, task: str, size: int) -> None:
        self.end, self.size = ENDS[task], size
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.x, self.success = np.random.default_rng(seed).uniform(-0.5, 0.5), False

    def step(self, action: np.ndarray) -> None:
        self.x = float(np.clip(self.x + 0.1 * np.clip(action[0], -1, 1), -1, 1))
        self.success |= abs(self.x - self.end) < 0.1  # latches

    @property
    def state(self) -> np.ndarray:
        return np.array([self.x], np.float32)

    @property
    def privileged(self) -> np.ndarray:
        return np.array([self.x, self.end], np.float32)

    def render(self) -> np.ndarray:
        return self.render_physics(self.state)

    def expert_action(self) -> np.ndarray:
        return np.clip([10 * (self.end - self.x)], -1, 1).astype(np.float32)

    def random_start_action(self, random: np.random.Generator) -> np.ndarray:
        return random.uniform(-1, 1, 1).astype(np.float32)

    def perturb(self, action: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
        return (action + sigma * random.normal(size=1)).astype(np.float32)

    def save_physics(self) -> np.ndarray:
        return self.state

    def render_physics(self, saved: np.ndarray) -> np.ndarray:
        picture = np.full((self.size, self.size, 3), 90, np.uint8)
        for place, colour in ((-1, COLOURS["red"]), (1, COLOURS["green"]), (saved[0], (240, 240, 240))):
            column = round((place + 1) / 2 * (self.size - 4))
            picture[self.size // 2 - 3 : self.size // 2 + 3, column : column + 4] = colour
        return picture[None]  # one view

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class Dots(Suite):
    """The tasks, and what recording and evaluation must know of them."""

    robot: ClassVar[str] = "dot"
    state_dim: ClassVar[int] = 1
    action_dim: ClassVar[int] = 1
    noise: ClassVar[tuple[float, ...]] = (0.0, 0.5)
    packages: ClassVar[tuple[str, ...]] = ()
    partners: ClassVar[dict[str, str]] = {"red": "green", "green": "red"}
    same_scene: ClassVar[tuple[str, ...]] = ("red", "green")

    name: str = "dots"
    tasks: tuple[str, ...] = ("red", "green")
    views: tuple[str, ...] = ("front",)
    image_size: int = 32
    action_repeat: int = 1
    max_decisions: int = 40
    fps: float = 10.0
    longest: int = 100
    fingerprint: str = "dots 1"  # change it with all that changes what happens

    def with_changes(self, **values: Any) -> Self:
        return replace(self, **values)

    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> Dot:
        return Dot(task, image_size or self.image_size)

    def instructions(self, task: str, split: Split = "train") -> tuple[str, ...]:
        seen = (f"go to the {task} end", f"move to {task}")
        return seen if split == "train" else (f"move to the {task} end",)

    def check_rendering(self) -> None:
        """Needs nothing."""


SUITES["dots"] = Dots()  # at the top of the file: worker processes import it too

if __name__ == "__main__":
    tutti.demo(
        tutti.load_config(
            overrides=[
                "name=dots",
                "record={suite: dots, episodes_per_task: 40, random_start_decisions: 5}",
                "data={image_size: 32, batch_size: 16, horizon: 4}",
                "objective.state.offsets=[2, 5]",
                "training={steps: 200, threads: 1, optimizer: {kind: muon, lr: 0.005}, ema: 0.98}",
                "evaluation={suite: dots, episodes: 10, actions_per_query: 2}",
            ]
        )
    )
