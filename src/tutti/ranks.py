"""What the ranks of one training share within a batch: counts, embeddings, random draws.

A training on n ranks is one training: its batch is spread over the ranks by rows, rank r holding the rows
[r b, (r + 1) b), b = B / n. Each rank computes a loss L_r of which only the mean over the ranks counts, and
that is to be the loss of the whole batch on one process, term by term and gradient by gradient:

    1/n sum_r L_r = L,    1/n sum_r dL_r / d theta = dL / d theta

Where rows stand alone a mean over all of them needs the count of all (`shared_mean`); where they meet (pairs
of a contrastive term) every rank takes the rows of all (`gathered`); where random numbers are drawn for rows,
every rank draws those of the whole batch and keeps its own (`drawn`), so that all have the same random state.
Alone, which is the default, every function is exactly the plain computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many this process is. `group` carries what is said inside a forward or backward pass: one
    of its own, so that it cannot mix with what DDP or FSDP say at the same time."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """True for the rank that writes: 0."""
        return self.rank == 0

    def rows(self, size: int) -> slice:
        """This rank's rows of a whole batch of `size`."""
        own = size // self.count
        return slice(self.rank * own, (self.rank + 1) * own)


ALONE = Ranks()

# A plain global: torch.compile traces it with a guard, where a ContextVar would break the graph, and the
# threads of a backward pass on a GPU would not see one either.
_present = ALONE


def present() -> Ranks:
    """The ranks that share a batch here and now; `ALONE` outside of `sharing`."""
    return _present


@contextmanager
def sharing(ranks: Ranks) -> Iterator[None]:
    """Inside the block, batches are this rank's rows of a batch that these ranks share."""
    global _present  # noqa: PLW0603 (see above)
    before, _present = _present, ranks
    try:
        yield
    finally:
        _present = before


@torch.no_grad()
def averaged(x: Tensor) -> Tensor:
    """The mean of `x` over the ranks, without a gradient; alone `x` itself."""
    ranks = _present
    if ranks.count == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=ranks.group)
    return total / ranks.count


def shared_mean(total: Tensor, count: Tensor) -> Tensor:
    """total / max(1, count) of all ranks' rows, as the part of this rank: n total_r / max(1, sum_s count_s).

    The mean over the ranks is the mean over all rows, and its gradient likewise. Alone it is that itself.
    """
    ranks = _present
    if ranks.count == 1:
        return total / count.clamp(min=1)
    counts = count.detach().clone()
    dist.all_reduce(counts, group=ranks.group)
    return total * ranks.count / counts.clamp(min=1)


def gathered(x: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "m ..."]:
    """The rows of all ranks in the order of the ranks, m = n b, with gradient; alone `x` itself.

    The gradient of a row is the sum of what all ranks want of it: with every rank computing the same L of all
    rows, that is n dL/dx, and the mean over the ranks' gradients makes it dL/dx.
    """
    ranks = _present
    if ranks.count == 1:
        return x
    if x.is_floating_point() and torch.is_grad_enabled() and x.requires_grad:
        return _Gathered.apply(x, ranks)  # pyright: ignore[reportReturnType]
    return _all_rows(x, ranks)


def drawn(sample: Callable[[int], Tensor], size: int, dim: int = 0) -> Tensor:
    """Random numbers for this rank's `size` rows: its own among those of the whole batch.

    `sample(m)` draws for m rows, which lie along `dim`. All ranks draw the same, so n ranks use up the same
    random numbers as one process with the whole batch, and go on from the same state.
    """
    ranks = _present
    if ranks.count == 1:
        return sample(size)
    return sample(ranks.count * size).narrow(dim, ranks.rank * size, size)


class _Gathered(torch.autograd.Function):
    """Forward: concatenate over the ranks. Backward: sum the gradient over the ranks, keep the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks  # kept: on a GPU the backward pass runs in another thread
        return _all_rows(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.ranks.group)
        return total[ctx.ranks.rows(len(total))].contiguous(), None


def _all_rows(x: Tensor, ranks: Ranks) -> Tensor:
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.count)]
    dist.all_gather(parts, own, group=ranks.group)
    return torch.cat(parts)
