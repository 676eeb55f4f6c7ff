"""What the trainer needs of its data, and how the next batch reaches a GPU while the present one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tutti.data.stream import check_divides
from tutti.ranks import Ranks
from tutti.types import Batch


@runtime_checkable
class TrainLoader(Protocol):
    """An endless stream of batches that knows its place."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any], /) -> None: ...


@runtime_checkable
class TrainingData(Protocol):
    """What `Trainer.fit` needs of the data."""

    @property
    def train(self) -> TrainLoader: ...
    @property
    def validation(self) -> Iterable[Batch]: ...


Move = Callable[[Batch], Callable[[], Batch]]
"""Starts to move a batch; what it gives, called where the batch is used, waits until it is there."""


class Feed:
    """A loader whose next batch is on its way to the device while the present one computes.

    One batch of look-ahead: when a batch is handed out, a thread takes the next one from the loader and
    starts to move it. `state()` is the loader's at the batches that were handed out, so a checkpoint does
    not count the one ahead, and a resumed run sees every batch once.
    """

    def __init__(self, loader: TrainLoader, move: Move) -> None:
        self._loader, self._move = loader, move
        self._stream: Iterator[Batch] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: Future[Callable[[], Batch]] | None = None
        self._state: dict[str, Any] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        ahead = self._ahead or self._begin()
        self._ahead = None
        batch = ahead.result()()
        self._begin()
        return batch

    def state(self) -> dict[str, Any]:
        """The loader's position, without the batch that is ahead."""
        return self._loader.state() if self._state is None else self._state

    def load_state(self, state: dict[str, Any], /) -> None:
        """Goes to that position; the batch ahead is forgotten."""
        self.close()
        self._loader.load_state(state)

    def close(self) -> None:
        """Ends the thread and forgets the batch ahead: the loader goes back behind what was handed out."""
        if self._thread is None:
            return
        self._thread.shutdown(wait=True)
        if self._state is not None:
            self._loader.load_state(self._state)
        self._stream = self._thread = self._ahead = self._state = None

    def _begin(self) -> Future[Callable[[], Batch]]:
        """Take the next batch and start to move it, in the thread."""
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="tutti-feed")
        self._stream = stream = self._stream or iter(self._loader)
        self._state = self._loader.state()
        self._ahead = self._thread.submit(lambda: self._move(next(stream)))
        return self._ahead


@runtime_checkable
class Shareable(Protocol):
    """A loader that can make one rank's rows of each batch without the others'."""

    def share(self, ranks: Ranks, /) -> None: ...


class OwnRows:
    """This rank's rows of the batches of a loader that makes whole ones."""

    def __init__(self, loader: TrainLoader, ranks: Ranks) -> None:
        self._loader, self._ranks = loader, ranks

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            check_divides(self._ranks, len(batch.window))
            rows = self._ranks.rows(len(batch.window))
            yield batch.apply(lambda value, rows=rows: value[rows])

    def state(self) -> dict[str, Any]:
        """That of the loader: the position does not say how many ranks there are."""
        return self._loader.state()

    def load_state(self, state: dict[str, Any], /) -> None:
        """Goes to that position."""
        self._loader.load_state(state)


@dataclass(frozen=True, slots=True)
class SharedData:
    """Training data of which each rank is given its rows; held-out data stay whole."""

    train: TrainLoader
    validation: Iterable[Batch]


def shared(data: TrainingData, ranks: Ranks) -> TrainingData:
    """The data as this rank of `ranks` sees them; alone the same object.

    Raises: UserError unless the ranks divide the batch.
    """
    if isinstance(data.train, Shareable):
        data.train.share(ranks)
        return data
    return data if ranks.count == 1 else SharedData(OwnRows(data.train, ranks), data.validation)


def portion(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[int | None, Batch]]:
    """This rank's held-out batches with their numbers, i = rank, rank + n, rank + 2 n, ...

    Every rank is given equally many, since under FSDP a forward pass takes all of them: one that has none
    left in the last round is given the very last batch, without a number. Of a sequence the other batches are
    not made.
    """
    if ranks.count == 1:
        yield from enumerate(batches)
        return
    chosen = batches if isinstance(batches, Sequence) else list(batches)
    for start in range(0, len(chosen), ranks.count):
        number = start + ranks.rank
        yield (number, chosen[number]) if number < len(chosen) else (None, chosen[-1])


class FedData:
    """Training data whose batches arrive through a `Feed`. Use it as a context: its thread ends with it."""

    def __init__(self, data: TrainingData, move: Move) -> None:
        self.train = Feed(data.train, move)
        self.validation = data.validation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()


class PlainData:
    """Training data as they are, in the same context."""

    def __init__(self, data: TrainingData) -> None:
        self.train, self.validation = data.train, data.validation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is to be ended."""


def fed(data: TrainingData, device: torch.device) -> FedData | PlainData:
    """The data for a training on `device`: on CUDA with one batch of look-ahead, else as they are."""
    return FedData(data, CudaMove(device)) if device.type == "cuda" else PlainData(data)


class CudaMove:
    """Copies a batch through page-locked memory on a stream of its own, beside the computation.

    The stream that computes waits for the copy, not the host. Each tensor is made known to that stream, so
    that its memory is not given to another before the computation has read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Callable[[], Batch]:
        """Starts the copy and gives what waits for it."""
        # Every thread begins with the first device: a look back at it from rank 3 would make a context there.
        torch.cuda.set_device(self.stream.device)
        with torch.cuda.stream(self.stream):
            moved = batch.apply(Tensor.pin_memory).to(self.device, non_blocking=True)
            arrived = self.stream.record_event()

        def arrive() -> Batch:
            present = torch.cuda.current_stream(self.device)
            present.wait_event(arrived)

            def known(value: Tensor) -> Tensor:
                value.record_stream(present)
                return value

            return moved.apply(known)

        return arrive
