"""A small robot world with real structure: a hand goes to the square that the text names, red or blue.

Both squares are in every picture, so neither the scene nor the state tells which one is meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tutti.config.run_config import RunConfig, build_config
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot

VIEWS = ("observation.images.front", "observation.images.mirror")
SIZE, LENGTH, EPISODES = 32, 12, 60
TEXTS = ("go to the red square", "move to the blue square")
COLOURS = ((230, 30, 30), (30, 30, 230))
HAND = (240, 240, 240)


def picture(hand: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The table from above: squares of 7 pixels, the hand a dot of 3. Positions lie in [-1, 1]."""
    image = np.full((SIZE, SIZE, 3), 90, np.uint8)
    for place, colour, half in (*zip(squares, COLOURS, (3, 3), strict=True),):
        _stamp(image, place, colour, half)
    _stamp(image, hand, HAND, 1)
    return image


def _stamp(image: np.ndarray, place: np.ndarray, colour: tuple[int, ...], half: int) -> None:
    column, row = ((np.clip(place, -1, 1) + 1) / 2 * (SIZE - 9) + 4).round().astype(int)
    image[row - half : row + half + 1, column - half : column + half + 1] = colour


def episode(number: int, task: int, random: np.random.Generator) -> EpisodeRecord:
    """States (x, y), actions (dx, dy, grip); the hand moves by a fifth of its clipped action."""
    squares = random.uniform(-0.9, 0.9, (2, 2))
    while np.abs(squares[0] - squares[1]).max() < 0.7:
        squares = random.uniform(-0.9, 0.9, (2, 2))
    hand = random.uniform(-0.9, 0.9, 2)
    images, states, actions = [], [], []
    for _ in range(LENGTH):
        wanted = np.clip(2.5 * (squares[task] - hand), -1, 1) + 0.05 * random.normal(size=2)
        near = float(np.abs(squares[task] - hand).max() < 0.15)
        images.append(picture(hand, squares))
        states.append(hand.copy())
        actions.append([*wanted, 2 * near - 1])
        hand = hand + 0.2 * wanted
    frames = np.stack(images)
    return EpisodeRecord(
        images={VIEWS[0]: frames, VIEWS[1]: np.ascontiguousarray(frames[:, :, ::-1])},
        states=np.array(states, np.float32),
        actions=np.array(actions, np.float32),
        instruction=TEXTS[task],
    )


def episodes(count: int = EPISODES, seed: int = 0) -> list[EpisodeRecord]:
    """As many of each task, in turn."""
    random = np.random.default_rng(seed)
    return [episode(number, number % 2, random) for number in range(count)]


def write(folder: Path, records: list[EpisodeRecord] | None = None) -> Path:
    """A LeRobot data set of `records`."""
    made = episodes() if records is None else records
    return write_lerobot(folder, made, fps=10, views=VIEWS, robot_type="dot")


def config(dataset: Path, **sections: Any) -> RunConfig:
    """A tiny model and the four terms; every section can be replaced key by key."""
    values: dict[str, Any] = {
        "name": "checkup",
        "data": {
            "sources": [{"path": str(dataset)}],
            "horizon": 4,
            "batch_size": 16,
            "image_size": SIZE,
            "validation_fraction": 0.25,
            "prefetch": 0,
        },
        "model": {
            "vision": {"stem": {"channels": [16, 32, 32], "strides": [1, 1, 2]}, "width": 32, "heads": 2},
            "language": {"width": 16, "depth": 1, "heads": 2},
            "fusion": {"width": 32, "depth": 1, "heads": 2},
            "action": {"hidden": 32},
        },
        "objective": {
            "align": {"weight": {"start": 0.1, "end": 0.0}},
            "recon": {"weight": 0.1, "width": 16, "heads": 2, "depth": 1},
            "state": {"weight": 0.3, "offsets": [2, 4], "hidden": 32},
        },
        "training": {
            "steps": 300,
            "threads": 1,
            "schedule": {"kind": "wsd", "warmup": 10},
            "checkpoint_every": 0,
            "validate_every": 0,
        },
        "evaluation": {"suite": "none", "actions_per_query": 2},
    }
    for section, changes in sections.items():
        values[section] = _merged(values.get(section), changes)
    return build_config(values, "the test")


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}
    return above
