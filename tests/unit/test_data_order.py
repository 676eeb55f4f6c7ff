"""Windows, mixture and split against plain loops, on stores in memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tutti.data.config import DataConfig
from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.mixture import Mixture
from tutti.data.normalize import ActionStats, EmbodimentStats, Normalizer
from tutti.data.split import split_episodes
from tutti.data.tokenize import Tokenizer
from tutti.data.windows import Source, WindowIndex
from tutti.types import DataNeeds, StateLabel

TEXTS = ("open it", "close it", "push it")
HORIZON, FUTURE = 3, 2
STATES: tuple[StateLabel, ...] = (1, 3, "last", "next_key")


class Store(EpisodeStore):
    """Episodes of these lengths; the action is (row, gripper), the state (10 row,), each plus `shift`."""

    def __init__(self, name: str, lengths: tuple[int, ...], shift: int) -> None:
        rows = np.arange(sum(lengths))
        starts = np.cumsum((0, *lengths[:-1])).tolist()
        self.name = self.fingerprint = name
        self.instructions = TEXTS[: len(lengths)]
        self.episodes = tuple(
            Episode(number, start, length, TEXTS[number])
            for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
        )
        self.instruction_of = np.repeat(np.arange(len(lengths)), lengths)
        # The gripper closes in the third frame of each episode that has more.
        t = np.concatenate([np.arange(length) for length in lengths])
        self.actions = np.stack([rows + shift, (t >= 2) * 1.0], axis=1).astype(np.float32)
        self.states = (10.0 * rows + shift)[:, None].astype(np.float32)
        self.spec = StoreSpec(
            views=("top",),
            image_shapes=((2, 2),),
            state_dim=1,
            action_dim=2,
            fps=20.0,
            num_frames=len(rows),
            embodiment=name,
        )

    def frames(self, view: str, rows: np.ndarray) -> np.ndarray:
        raise AssertionError("windows take pictures from the source's frames, not from the store")


def unit(dims: int) -> ActionStats:
    """Statistics under which `standard` changes nothing."""
    zero, one = np.zeros(dims), np.ones(dims)
    return ActionStats(q01=-one, q99=one, mean=zero, std=one, min=-one, max=one)


STORES = (Store("arm", (5, 1, 4), 0), Store("hand", (2, 6), 1000))


@pytest.fixture(scope="module")
def index() -> WindowIndex:
    sources = []
    for number, store in enumerate(STORES):
        frames = np.zeros((store.spec.num_frames, 1, 3, 2, 2), np.uint8)
        frames += (np.arange(len(frames), dtype=np.uint8) + 100 * number)[:, None, None, None, None]
        sources.append(Source(store, frames))
    stats = {store.name: EmbodimentStats(state=unit(1), action=unit(2)) for store in STORES}
    return WindowIndex(
        sources,
        horizon=HORIZON,
        normalizer=Normalizer("standard", stats),
        tokenizer=Tokenizer.fit(TEXTS),
        needs=DataNeeds(futures=(1, FUTURE), states=STATES, grippers=(1,)),
    )


def key_frame(store: Store, episode: Episode, row: int) -> int:
    """The next row at which the gripper's command has changed, or the episode's last."""
    for later in range(row + 1, episode.end):
        if store.actions[later, 1] != store.actions[later - 1, 1]:
            return later
    return episode.end - 1


def test_every_window_holds_what_a_loop_over_its_episode_finds(index: WindowIndex) -> None:
    batch = index.gather(np.arange(len(index)))
    assert batch.later_states is not None and batch.progress is not None
    assert batch.later_states.labels == STATES and set(batch.futures) == {1, FUTURE}
    window = 0
    for number, store in enumerate(STORES):
        for episode in store.episodes:
            for row in range(episode.start, episode.end):
                inside = [row + step < episode.end for step in range(HORIZON)]
                assert batch.action_mask[window, :, 0].tolist() == inside
                for step, there in enumerate(inside):
                    expected = store.actions[row + step].tolist() if there else [0, 0]
                    assert batch.actions[window, step].tolist() == expected
                last = episode.end - 1
                for offset, future in batch.futures.items():
                    assert bool(future.mask[window]) == (row + offset <= last)
                    shown = min(row + offset, last)
                    assert int(future.observation.images[window, 0, 0, 0, 0]) == shown + 100 * number
                    assert future.observation.state[window].tolist() == store.states[shown].tolist()
                assert int(batch.observation.images[window, 0, 0, 0, 0]) == row + 100 * number
                assert batch.observation.state[window].tolist() == store.states[row].tolist()
                places = [row + 1, row + 3, last, key_frame(store, episode, row)]
                assert batch.later_states.mask[window].tolist() == [place <= last for place in places]
                states = [float(store.states[min(place, last), 0]) for place in places]
                assert batch.later_states.values[window, :, 0].tolist() == states
                part = (row - episode.start) / max(1, episode.length - 1)
                assert float(batch.progress[window]) == pytest.approx(part)
                assert index.instructions[int(batch.instruction_id[window])] == episode.instruction
                assert index.embodiments[int(batch.embodiment[window])] == store.name
                window += 1
    assert window == len(index)


def ranges(*sizes: int) -> tuple[np.ndarray, ...]:
    ends = np.cumsum((0, *sizes))
    return tuple(np.arange(a, b) for a, b in pairwise(ends.tolist()))


def counts(windows: tuple[np.ndarray, ...], drawn: np.ndarray) -> list[int]:
    return [int(np.isin(drawn, one).sum()) for one in windows]


def test_the_missing_entries_go_where_rounding_down_took_most_and_are_made_up_for() -> None:
    """Of 10 entries 2.6, 3.7 and 3.7 are wanted: 2, 3, 3, and the two that are missing to the .7."""
    windows = ranges(4, 3, 3)
    mixture = Mixture(windows, (26.0, 37.0, 37.0), seed=0)
    assert counts(windows, mixture.take(0, 10)) == [2, 4, 4]
    for epochs in range(1, 11):
        drawn = counts(windows, mixture.take(0, 10 * epochs))
        assert all(abs(got - wanted * epochs) < 1 for got, wanted in zip(drawn, (2.6, 3.7, 3.7), strict=True))
    assert drawn == [26, 37, 37]


def test_a_source_goes_on_from_epoch_to_epoch_and_each_pass_has_its_own_order() -> None:
    windows = ranges(6, 18)
    mixture = Mixture(windows, (1.0, 1.0), seed=3)
    stream = mixture.take(0, 24 * 6)
    small = stream[np.isin(stream, windows[0])]
    passes = [small[first : first + 6].tolist() for first in range(0, len(small), 6)]
    assert len(passes) == 12 and all(sorted(one) == list(range(6)) for one in passes)
    assert len({tuple(one) for one in passes}) > 6
    large = stream[np.isin(stream, windows[1])]
    # 12 of an epoch of 24: the first pass over the 18 ends in the middle of the second epoch.
    assert sorted(large[:18].tolist()) == list(range(6, 24)) != large[:18].tolist()
    assert sorted(large[18:36].tolist()) == list(range(6, 24))
    orders = [tuple(np.isin(stream[24 * e : 24 * e + 24], windows[0]).tolist()) for e in range(6)]
    assert len(set(orders)) == 6, "every epoch mixes its sources anew"


def episodes(*sizes: int) -> list[Episode]:
    texts = [f"task {number}" for number, size in enumerate(sizes) for _ in range(size)]
    return [Episode(i, 10 * i, 10, text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("fraction", "sizes", "held"),
    [
        (0.25, (10, 6, 5), [3, 2, 1]),  # 2.5 and 1.5 are rounded up, 1.25 down
        (0.24, (10, 6, 5), [2, 1, 1]),
        (0.01, (10, 2), [1, 1]),
        (0.9, (10, 2), [9, 1]),
        (0.99, (10, 3), [9, 2]),  # never the last one
    ],
)
def test_each_group_gives_its_rounded_share(fraction: float, sizes: tuple[int, ...], held: list[int]) -> None:
    training, validation = split_episodes(episodes(*sizes), fraction, seed=0)
    assert [sum(e.instruction == f"task {n}" for e in validation) for n in range(len(sizes))] == held
    assert len(training) + len(validation) == sum(sizes)


def test_every_source_is_split_by_a_seed_of_its_own() -> None:
    """Source i with seed + i, for what is held out and for which demonstrations are taken."""

    def split(sources: int, seed: int, held_out: float = 0.2) -> tuple[list, list]:
        config = DataConfig(validation_fraction=held_out, episodes_per_task=5, seed=seed)
        return config.split([episodes(20, 20)] * sources)

    training, validation = split(3, seed=7)
    for number in range(3):
        assert ([training[number]], [validation[number]]) == split(1, seed=7 + number)
    assert len(set(validation)) == 3 and len(set(training)) == 3
    by_text = [[e.index for e in one if e.instruction == "task 0"] for one in training]
    assert len({tuple(one) for one in by_text}) == 3
    # Nothing held out: which demonstrations are taken depends on the seed alone.
    (kept,), (other,) = split(1, 1, 0.0)[0], split(1, 2, 0.0)[0]
    assert kept != other and len(kept) == len(other) == 10
