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


def at_once(batch: Batch) -> Callable[[], Batch]:
    return lambda: batch


def test_every_batch_comes_once_and_in_order() -> None:
    prefetcher = DevicePrefetcher(Counting(), at_once)
    assert [number(next(prefetcher)) for _ in range(5)] == [0, 1, 2, 3, 4]
    prefetcher.close()


def test_the_next_batch_moves_while_the_present_one_is_used() -> None:
    started = [threading.Event() for _ in range(4)]

    def move(batch: Batch) -> Callable[[], Batch]:
        started[number(batch)].set()
        return lambda: batch

    prefetcher = DevicePrefetcher(Counting(), move)
    assert number(next(prefetcher)) == 0
    assert started[1].wait(timeout=10)  # without another call
    assert not started[2].wait(timeout=0.05)  # one batch ahead, not two
    prefetcher.close()


def test_as_many_move_ahead_as_an_update_takes_at_once() -> None:
    started = [threading.Event() for _ in range(7)]

    def move(batch: Batch) -> Callable[[], Batch]:
        started[number(batch)].set()
        return lambda: batch

    prefetcher = DevicePrefetcher(Counting(), move, depth=3)
    assert [number(next(prefetcher)) for _ in range(3)] == [0, 1, 2]
    assert all(started[ahead].wait(timeout=10) for ahead in (3, 4, 5))
    assert not started[6].wait(timeout=0.05)
    assert prefetcher.state_dict() == {"position": 3}
    prefetcher.close()
    assert [number(next(prefetcher)) for _ in range(2)] == [3, 4]
    prefetcher.close()


def test_what_waits_for_the_arrival_is_called_when_the_batch_is_handed_out() -> None:
    arrived: list[int] = []

    def move(batch: Batch) -> Callable[[], Batch]:
        return lambda: arrived.append(number(batch)) or batch

    prefetcher = DevicePrefetcher(Counting(), move)
    next(prefetcher)
    assert arrived == [0]
    prefetcher.close()


def test_the_batch_ahead_does_not_count_in_the_state() -> None:
    prefetcher = DevicePrefetcher(Counting(), at_once)
    assert prefetcher.state_dict() == {"position": 0}
    for handed_out in (1, 2, 3):
        next(prefetcher)
        assert prefetcher.state_dict() == {"position": handed_out}
    saved = prefetcher.state_dict()
    prefetcher.close()
    resumed = DevicePrefetcher(Counting(), at_once)
    resumed.load_state_dict(saved)
    assert number(next(resumed)) == 3
    resumed.close()


def test_closing_puts_the_loader_behind_what_was_handed_out() -> None:
    loader = Counting()
    prefetcher = DevicePrefetcher(loader, at_once)
    next(prefetcher)
    next(prefetcher)
    prefetcher.close()
    assert loader.position == 2
    assert number(next(prefetcher)) == 2  # it goes on
    prefetcher.close()


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
