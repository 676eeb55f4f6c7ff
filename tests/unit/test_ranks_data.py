"""What each rank is given: its rows of the global batch, its cores, a signal that arrives twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_loading import build, write_set

from fixtures.vla_training import make_batch
from tutti.distributed.cores import usable_cores
from tutti.distributed.ranks import Ranks
from tutti.training.data_feed import feed
from tutti.training.device import resolve_machine
from tutti.training.signals import Interruptible
from tutti.types import Batch, UserError

JITTER = {"augmentation": {"kind": "colour"}, "prefetch": 0}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set")


def joined(parts: list[Batch]) -> Batch:
    """The rows of all ranks, one behind the other."""
    first, *others = parts
    stacks = [iter(tensors(part)) for part in others]
    return first.apply(lambda value: torch.cat([value, *(next(stack) for stack in stacks)]))


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.apply(lambda value: (found.append(value), value)[1])
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_the_rows_of_all_ranks_are_the_batch_of_one_jittered_alike(
    count: int, data_set: Path, tmp_path: Path
) -> None:
    data = build(data_set, tmp_path, **JITTER)
    whole = [data.train.batch_at(number) for number in (0, 5)]
    loaders = []
    for rank in range(count):
        loader = build(data_set, tmp_path, **JITTER).train
        loader.share(Ranks(rank, count))
        loaders.append(loader)
    for number, expected in zip((0, 5), whole, strict=True):
        found = joined([loader.batch_at(number) for loader in loaders])
        assert all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(found), strict=True))
    assert [len(next(loader).window) for loader in loaders] == [6 // count] * count


def test_the_position_does_not_say_how_many_ranks_there_were(data_set: Path, tmp_path: Path) -> None:
    one, two = (build(data_set, tmp_path, prefetch=2).train for _ in range(2))
    two.share(Ranks(1, 2))
    for _ in range(3):
        next(one), next(two)
    assert one.state_dict() == two.state_dict()
    one.load_state_dict(two.state_dict())
    assert torch.equal(next(one).window[3:], next(two).window)
    for loader in (one, two):
        loader.close()


def test_ranks_that_do_not_divide_the_batch_are_refused(data_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size is 6.* all 4 ranks.* to 4 or 8"):
        build(data_set, tmp_path).train.share(Ranks(0, 4))


class Whole:
    """A loader of the user's own, which knows nothing of ranks."""

    def __init__(self) -> None:
        self.train: Any = self
        self.validation: list[Batch] = []
        self.position = 0

    def __iter__(self) -> Any:
        while True:
            self.position += 1
            yield make_batch(self.position, 4)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_a_loader_that_knows_no_ranks_is_cut() -> None:
    data = Whole()
    with feed(data, Ranks(1, 2), torch.device("cpu")) as own:
        batch = next(iter(own.train))
        assert torch.equal(batch.window, make_batch(1, 4).window[2:])
        assert own.train.state_dict() == {"position": 1}


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = resolve_machine("cpu", "auto", "fp32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    both = resolve_machine("cpu", "auto", "fp32")
    assert alone.threads == usable_cores() and both.threads == max(1, usable_cores() // 2)
    assert "each of 2 processes" in both.reasons[1] and resolve_machine("cpu", 7, "fp32").threads == 7


def test_a_signal_that_a_launcher_passes_on_does_not_count_twice() -> None:
    with Interruptible(relayed=True) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        with pytest.raises(SystemExit) as left:
            interrupt.leave(1, Path("saved"), int(signal.SIGTERM))
        assert left.value.code == 143
    with Interruptible() as interrupt, pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
