"""Reads and writes recorded episodes: one .npz each, complete or absent, and the list of those that count."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from tutti.errors import UserError
from tutti.storage.files import PARTIAL, write_atomically
from tutti.storage.reading import read_json

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"
_IMAGE_PREFIX = "image."
_ARRAYS = ("states", "actions", "executed", "privileged")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEpisode:
    """A successful episode of the expert, one row for each decision, pictures and state from just before it.

    `actions` are the labels: what the expert would do. `executed` are the actions that the robot did,
    with noise of standard deviation `noise`; replaying needs these. `privileged` is all that the simulator
    knows.
    """

    task: str
    seed: int
    images: dict[str, UInt8[np.ndarray, "t h w 3"]]
    states: Float32[np.ndarray, "t s"]
    actions: Float32[np.ndarray, "t a"]
    executed: Float32[np.ndarray, "t a"]
    privileged: Float32[np.ndarray, "t p"]
    instruction: str
    noise: float


def episode_path(folder: Path, task: str, seed: int) -> Path:
    """The file of a successful try."""
    return folder / task / f"{seed}.npz"


def failure_path(folder: Path, task: str, seed: int) -> Path:
    """The marker of a failed try, which is not tried again."""
    return folder / task / f"{seed}.failed"


def save_episode(folder: Path, episode: RecordedEpisode) -> None:
    """Writes the episode's .npz (uncompressed; the same episode gives the same bytes)."""
    buffer = io.BytesIO()
    arrays = {name: getattr(episode, name) for name in _ARRAYS}
    arrays |= {name: np.array(getattr(episode, name)) for name in ("instruction", "noise")}
    arrays |= {_IMAGE_PREFIX + view: images for view, images in episode.images.items()}
    np.savez(buffer, **arrays)
    write_atomically(episode_path(folder, episode.task, episode.seed), buffer.getvalue())


def load_episode(folder: Path, task: str, seed: int) -> RecordedEpisode:
    """Reads one episode.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = episode_path(folder, task, seed)
    try:
        with np.load(path) as file:
            views = [key for key in file if key.startswith(_IMAGE_PREFIX)]
            return RecordedEpisode(
                task=task,
                seed=seed,
                images={key.removeprefix(_IMAGE_PREFIX): file[key] for key in views},
                **{name: file[name] for name in _ARRAYS},
                instruction=str(file["instruction"]),
                noise=float(file["noise"]),
            )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a readable episode ({error}). Delete this file and record again: only it is redone."
        ) from error


def load_recorded(work_folder: Path | str) -> Iterator[RecordedEpisode]:
    """The episodes of a finished recording: the first of every task, then the second of every task, ...

    Raises:
        UserError: the recording is not finished, or a file is missing or damaged.
    """
    folder = Path(work_folder)
    done = read_work(folder / DONE_FILE)
    if done is None:
        raise UserError(
            f"{folder}: no finished recording here ({DONE_FILE} is missing). Record again to finish it."
        )
    seeds: dict[str, list[int]] = done["seeds"]
    for turn in range(max(map(len, seeds.values()), default=0)):
        for task, chosen in seeds.items():
            if turn < len(chosen):
                yield load_episode(folder, task, chosen[turn])


def find_tries(folder: Path, task: str) -> dict[int, bool]:
    """What is on disk already: seed -> did it succeed. Removes leftovers of a killed process."""
    tries: dict[int, bool] = {}
    for path in sorted((folder / task).glob("*")):
        if path.name.startswith(PARTIAL):
            path.unlink(missing_ok=True)
        elif path.suffix == ".failed" and path.stem.isdigit():
            tries[int(path.stem)] = False
        elif path.suffix == ".npz" and path.stem.isdigit() and zipfile.is_zipfile(path):
            tries[int(path.stem)] = True
    return tries


def read_work(path: Path) -> Any:
    """The value in a JSON file, None if there is no such file.

    Raises:
        UserError: it is not JSON.
    """
    return read_json(path, cure="Delete it and record again.") if path.exists() else None
