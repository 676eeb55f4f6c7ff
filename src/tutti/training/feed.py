"""What the trainer needs of its data: an endless stream that knows its place, and a held-out set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

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
