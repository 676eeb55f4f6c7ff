"""The feed: one batch ahead, counted only when it is handed out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import toy_training
from fixtures.vla_training import Data, make_batch
from tutti.data.augmentation import PictureJitter, RawBatch, raw_batch
from tutti.data.mixture import Stream
from tutti.distributed.ranks import ONE_RANK, Ranks, current_ranks
from tutti.storage.checkpoint import load
from tutti.training import data_feed, trainer
from tutti.training.data_feed import DevicePrefetcher, feed
from tutti.types import Batch


class Counting:
    """Batches 0, 1, 2, ... whose position survives the iterator, as the real loader's does."""

    def __init__(self, fails_at: int = -1) -> None:
        self.position, self.fails_at = 0, fails_at

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.position == self.fails_at:
            raise OSError("the disk is gone")
        self.position += 1
        return make_batch(self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def number(batch: Batch) -> int:
    return int(batch.window[0]) // 100


def raw(number: int) -> RawBatch:
    batch = make_batch(number)
    return raw_batch(batch, PictureJitter(), 0, number, [Stream((), slice(None), 0, len(batch.window))])


def at_once(batch: Batch) -> Callable[[], Batch]:
    return lambda: batch


@pytest.mark.parametrize("depth", [1, 3])
def test_as_many_move_ahead_as_an_update_takes_at_once(depth: int) -> None:
    started = [threading.Event() for _ in range(2 * depth + 1)]

    def move(batch: Batch) -> Callable[[], Batch]:
        started[number(batch)].set()
        return lambda: batch

    prefetcher = DevicePrefetcher(Counting(), move, depth=depth)
    assert [number(next(prefetcher)) for _ in range(depth)] == [*range(depth)]
    assert all(started[ahead].wait(timeout=10) for ahead in range(2 * depth))  # without another call
    assert not started[2 * depth].wait(timeout=0.05)
    assert prefetcher.state_dict() == {"position": depth}
    prefetcher.close()


def test_what_waits_for_the_arrival_is_called_when_the_batch_is_handed_out() -> None:
    arrived: list[int] = []

    def move(batch: Batch) -> Callable[[], Batch]:
        return lambda: arrived.append(number(batch)) or batch

    prefetcher = DevicePrefetcher(Counting(), move)
    next(prefetcher)
    assert arrived == [0]
    prefetcher.close()


def test_every_batch_comes_once_and_the_one_ahead_does_not_count_in_the_state() -> None:
    loader = Counting()
    prefetcher = DevicePrefetcher(loader, at_once)
    for handed_out in range(3):
        assert prefetcher.state_dict() == {"position": handed_out}
        assert number(next(prefetcher)) == handed_out
    saved = prefetcher.state_dict()
    prefetcher.close()
    assert saved == loader.state_dict() == {"position": 3}  # behind what was handed out
    resumed = DevicePrefetcher(Counting(), at_once)
    resumed.load_state_dict(saved)
    for again in (prefetcher, resumed):
        assert number(next(again)) == 3
        again.close()


def test_a_loader_that_fails_is_heard_when_its_batch_is_due() -> None:
    prefetcher = DevicePrefetcher(Counting(fails_at=1), at_once)
    assert number(next(prefetcher)) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetcher)
    prefetcher.close()


def test_on_a_cpu_the_data_are_as_they_are() -> None:
    given = Data()
    with feed(given, ONE_RANK, torch.device("cpu")) as data:
        assert data.train is given.train and data.validation is given.validation


def test_on_a_gpu_batches_are_ahead_and_the_thread_ends_with_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_feed, "CudaMove", lambda device: at_once)
    given = Data()
    given.train = loader = Counting()
    with feed(given, Ranks(1, 2), torch.device("cuda"), 2) as data:
        assert current_ranks() == Ranks(1, 2)
        first = next(iter(data.train))
        assert len(first.window) == len(make_batch(0).window) // 2
        assert data.train.state_dict() == {"position": 1}
    assert loader.position == 1 and current_ranks() == ONE_RANK


def test_pictures_are_left_to_the_device_where_the_loader_can() -> None:
    made = [raw(number) for number in range(2)]

    class Leaving(Counting):
        def raw_batches(self) -> Iterator[RawBatch]:
            while True:
                yield raw(number(next(self)))

    prefetcher = DevicePrefetcher(Leaving(), lambda batch: batch.augmented)
    for expected in made:
        found = next(prefetcher).observation.images
        assert torch.equal(found, expected.augmented().observation.images)
        assert not torch.equal(found, expected.batch.observation.images)
    assert prefetcher.state_dict() == {"position": 2}
    prefetcher.close()


def test_the_last_checkpoint_counts_no_batch_that_is_still_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU batches are ahead when the training ends; with more steps it must go on at the next one."""
    monkeypatch.setattr(data_feed, "CudaMove", lambda device: at_once)
    cuda = torch.device("cuda")
    monkeypatch.setattr(trainer, "feed", lambda data, ranks, device, depth: feed(data, ranks, cuda, depth))
    for steps in (4, 6):
        saved = load(
            toy_training.make_trainer(tmp_path, steps=steps, accumulation=2).fit(toy_training.Data())
        )
        assert saved.state["loader"] == {"position": 2 * steps}
