"""Live and peak bytes of tensors during an update, and a dummy batch of the shapes that a data set gives."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tutti.types import Batch, DataNeeds, DataSpec, Future, LaterStates, Observation


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


def dummy_batch(spec: DataSpec, size: int, needs: DataNeeds = DataNeeds()) -> Batch:
    """`size` windows with every view, a text of its own each, noise for the rest, and what terms ask for.

    No two texts are the same, so that a language encoder that encodes each text once has them all to do.
    """
    random = torch.Generator().manual_seed(0)
    numbers = torch.arange(size)
    places = spec.vocab_size ** torch.arange(spec.text_length).clamp(max=3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=random)

    def observation() -> Observation:
        edge, views = spec.image_size, len(spec.views)
        return Observation(
            images=torch.randint(0, 256, (size, views, 3, edge, edge), dtype=torch.uint8, generator=random),
            image_mask=torch.ones(size, views, dtype=torch.bool),
            text=numbers[:, None] // places % spec.vocab_size,
            text_mask=torch.ones(size, spec.text_length, dtype=torch.bool),
            state=noise(spec.state_dim),
        )

    later = LaterStates(
        labels=needs.states,
        values=noise(len(needs.states), spec.state_dim),
        mask=torch.ones(size, len(needs.states), dtype=torch.bool),
    )
    return Batch(
        observation=observation(),
        actions=noise(spec.horizon, spec.action_dim),
        action_mask=torch.ones(size, spec.horizon, spec.action_dim, dtype=torch.bool),
        instruction_id=numbers,
        embodiment=torch.zeros(size, dtype=torch.int64),
        window=numbers,
        futures={
            k: Future(observation=observation(), mask=torch.ones(size, dtype=torch.bool))
            for k in needs.futures
        },
        later_states=later if needs.states else None,
        progress=torch.linspace(0, 1, size),
    )
