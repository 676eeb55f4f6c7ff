"""A data format of your own, one .npz file an episode; as a script it converts: own_format.py FROM TO."""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from tutti import UserError
from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.formats import EpisodeRecord, write_lerobot
from tutti.data.formats.lerobot.metadata import ALL, Chosen

VIEW = "observation.images.front"


@lru_cache(maxsize=4)
def read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an episode of t frames: images (t, h, w, 3), states (t, s), actions (t, a), text ()."""
    with np.load(file) as arrays:  # nothing is unpickled
        return dict(arrays)


class NpzStore(EpisodeStore):
    """Numbers in memory, pictures on request. The arguments are those that `open_parts` gives a reader."""

    def __init__(
        self,
        folder: Path,
        views: tuple[str, ...] | None = None,
        *,
        state: tuple[str, ...] = (),
        action: tuple[str, ...] = (),
        chosen: Sequence[Chosen] = (ALL,),
    ) -> None:
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise UserError(f"{folder}: expected one .npz file an episode, found none.")
        masks = [one.mask(len(files), folder) for one in chosen]
        self.parts = tuple(frozenset(np.flatnonzero(mask).tolist()) for mask in masks)
        used = np.flatnonzero(np.any(masks, axis=0)).tolist()
        self.name, self.files = str(folder), [files[index] for index in used]
        lengths = [len(read(file)["states"]) for file in self.files]
        self.starts = np.cumsum([0, *lengths])
        texts = [str(read(file)["text"]) for file in self.files]
        self.instructions = tuple(dict.fromkeys(texts))
        self.instruction_of = np.repeat([self.instructions.index(text) for text in texts], lengths)
        self.states, self.actions = (
            np.concatenate([read(file)[key] for file in self.files]).astype(np.float32)
            for key in ("states", "actions")
        )
        self.episodes = tuple(map(Episode, used, self.starts[:-1].tolist(), lengths, texts))
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
            states=episode["states"],
            actions=episode["actions"],
            instruction=str(episode["text"]),
        )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_lerobot(target, records(source), fps=10, views=(VIEW,), robot_type="dot")
