"""A data format of your own, one .npz file an episode; as a script it converts: own_format.py FROM TO."""

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from tutti import UserError
from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.formats import EpisodeRecord, write_lerobot

VIEW = "observation.images.front"


@lru_cache(maxsize=4)
def read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an episode of t frames: images (t, h, w, 3), states (t, s), actions (t, a), text ()."""
    with np.load(file) as arrays:  # nothing is unpickled
        return dict(arrays)


class NpzStore(EpisodeStore):
    """A folder of such files: numbers in memory, pictures on request."""

    def __init__(self, folder: Path) -> None:
        self.name, self.files = str(folder), sorted(folder.glob("*.npz"))
        if not self.files:
            raise UserError(f"{folder}: expected one .npz file an episode, found none.")
        kept = [(one["states"], one["actions"], str(one["text"])) for one in map(read, self.files)]
        states, actions, texts = zip(*kept, strict=True)
        lengths = list(map(len, states))
        self.starts = np.cumsum([0, *lengths])
        self.instructions = tuple(dict.fromkeys(texts))
        self.instruction_of = np.repeat([self.instructions.index(text) for text in texts], lengths)
        self.states, self.actions = (np.concatenate(one).astype(np.float32) for one in (states, actions))
        self.episodes = tuple(map(Episode, range(len(texts)), self.starts.tolist(), lengths, texts))
        self.spec = StoreSpec(
            views=(VIEW,),
            image_shapes=(read(self.files[0])["images"].shape[1:3],),
            state_dim=self.states.shape[1],
            action_dim=self.actions.shape[1],
            fps=10.0,
            num_frames=len(self.states),
            embodiment="dot",
        )

    def frames(self, view: str, rows: np.ndarray) -> np.ndarray:
        """The pictures at these frame rows, in the order asked."""
        episode_of = np.searchsorted(self.starts, rows, side="right") - 1
        return np.stack(
            [
                read(self.files[e])["images"][row - self.starts[e]]
                for e, row in zip(episode_of, rows, strict=True)
            ]
        )


def records(folder: Path) -> Iterator[EpisodeRecord]:
    """The same episodes, one at a time, for a data set that every command reads as it is."""
    for episode in map(read, sorted(folder.glob("*.npz"))):
        yield EpisodeRecord(
            images={VIEW: episode["images"]},
            states=episode["states"].astype(np.float32),
            actions=episode["actions"].astype(np.float32),
            instruction=str(episode["text"]),
        )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_lerobot(target, records(source), fps=10, views=(VIEW,), robot_type="dot")
