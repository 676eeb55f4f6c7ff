"""The exponential moving average of the weights, which is what is evaluated and served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tutti.distributed.sharded_tensors import shard_like, split_by_sharding


def ema_decay(decay: float, updates: int) -> float:
    """min(decay, (1 + s) / (10 + s)) with s = `updates` made before: short runs forget their start."""
    return min(decay, (1.0 + updates) / (10.0 + updates))


class Ema:
    """shadow <- d shadow + (1 - d) theta after each step, d = `ema_decay`; buffers are copied.

    `shadow` has the names and shapes of the module's state dict.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in module.state_dict().items()
        }

    @property
    def last_decay(self) -> float:
        """d of the last update."""
        return ema_decay(self.decay, self.updates - 1)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the module after an optimiser step."""
        d = ema_decay(self.decay, self.updates)
        present = self.module.state_dict()
        parameters = self.module.named_parameters(remove_duplicate=False)
        moving = [name for name, value in parameters if value.is_floating_point()]
        for places in split_by_sharding([present[n] for n in moving]):
            names = [moving[place] for place in places]
            shadows, values = [self.shadow[n] for n in names], [present[n] for n in names]
            torch._foreach_lerp_(shadows, values, 1.0 - d)  # pyright: ignore[reportPrivateImportUsage]
        for name in present.keys() - set(moving):
            self.shadow[name].copy_(present[name])
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module has the averaged weights; afterwards its own, to the last bit."""
        own = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.shadow)
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def load(self, shadow: dict[str, Tensor], updates: int) -> None:
        """Take over a saved average."""
        for name, value in self.shadow.items():
            value.copy_(shard_like(shadow[name], value))
        self.updates = updates
