"""Live and peak bytes of tensors, counted as operations make storages and Python lets them go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that an operation gives inside the block, until it is freed.

    A view shares its storage, so it counts once. What an operation uses inside and frees before it returns (a
    convolution's workspace) is not seen. Works on real tensors and, without any memory, on fake ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made outside of the block."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known.add(key)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def restart(self) -> None:
        """Forget the peak: it is now what lives."""
        self.peak = self.live

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def own_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, shared ones once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def state_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """Every tensor in the state of some optimisers."""
    return [
        value
        for one in optimizers
        for state in one.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
