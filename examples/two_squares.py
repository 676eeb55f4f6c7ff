"""A data set of your own in 50 lines: a hand goes to the square that the sentence names, red or blue.

python examples/two_squares.py FOLDER writes 60 episodes of 16 frames as a LeRobotDataset v3.0.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tutti.data.formats import EpisodeRecord, write_lerobot
from tutti.types import Dimensions

SENTENCES = (
    ("go to the red square", "move to the red square", "reach the red one"),
    ("go to the blue square", "move to the blue square", "reach the blue one"),
)
COLOURS, HAND, TABLE = ((230, 60, 50), (60, 90, 230)), (245, 245, 245), (70, 72, 78)
SIZE, FRAMES, FPS = 48, 16, 10
VIEW = "observation.images.top"


def draw(hand: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The table from above; places are in -1 to 1."""
    picture = np.full((SIZE, SIZE, 3), TABLE, np.uint8)
    for place, colour, half in zip([*squares, hand], [*COLOURS, HAND], (5, 5, 2), strict=True):
        column, row = ((np.clip(place, -1, 1) + 1) / 2 * (SIZE - 13) + 6).astype(int)
        picture[row - half : row + half + 1, column - half : column + half + 1] = colour
    return picture


def episodes(count: int = 60, seed: int = 0) -> Iterator[EpisodeRecord]:
    """Red and blue in turn. The state is where the hand is, the action how it moves; grip 1 closes."""
    random = np.random.default_rng(seed)
    for number in range(count):
        goal, left = number % 2, random.uniform(-0.9, -0.4, 2)
        squares = np.stack([left, random.uniform(0.4, 0.9, 2)])  # red is on the left
        hand, images, states, actions = random.uniform(-0.9, 0.9, 2), [], [], []
        for _ in range(FRAMES):
            way = squares[goal] - hand
            images.append(draw(hand, squares))
            states.append(hand)
            actions.append([*np.clip(2 * way, -1, 1), float(np.abs(way).max() < 0.1)])
            hand = hand + 0.2 * np.clip(2 * way, -1, 1) + 0.02 * random.normal(size=2)
        yield EpisodeRecord(
            images={VIEW: np.stack(images)},
            states=np.array(states, np.float32),
            actions=np.array(actions, np.float32),
            instruction=SENTENCES[goal][number // 2 % 3],
        )


def write(folder: Path, count: int = 60) -> Path:
    """The data set in `folder`, which must not exist."""
    names = Dimensions(
        state_names=("x", "y"),
        state_units=("", ""),
        action_names=("dx", "dy", "grip"),
        action_units=("", "", ""),
    )
    return write_lerobot(folder, episodes(count), fps=FPS, views=(VIEW,), robot_type="hand", dimensions=names)


if __name__ == "__main__":
    print(f"Written: {write(Path(sys.argv[1]))}")
