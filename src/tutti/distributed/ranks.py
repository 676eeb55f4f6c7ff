"""What the ranks and the micro-batches of one update share: counts, embeddings, random draws.

A training on n ranks is one training: its batch is spread over the ranks by rows, rank r holding the rows
[r b, (r + 1) b), b = B / n. Each rank computes a loss L_r of which only the mean over the ranks counts, and
that is to be the loss of the whole batch on one process, term by term and gradient by gradient:

    1/n sum_r L_r = L,    1/n sum_r dL_r / d theta = dL / d theta

Where rows stand alone a mean over all of them needs the count of all (`shared_mean`); where they meet (pairs
of a contrastive term) every rank takes the rows of all (`gathered`); where random numbers are drawn for rows,
every rank draws those of the whole batch and keeps its own (`drawn`), so that all have the same random state.
Alone, which is the default, every function is exactly the plain computation.

The A micro-batches of an update (gradient accumulation) come one after the other. Their mean is to be the
loss of one batch of all their rows too. So the counts of all of them must be known before the first forward
pass: a mean that is given its mask as a function of the batch takes them (`shared_mean`, `micro_part`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
_micro_batch: tuple[MicroBatches, int] | None = None

Counted = Callable[[Any], Tensor]
"""What a mean counts in a batch: its mask or its weights, from the batch alone. A method or a named function:
the counts of an update are kept by it."""


class MicroBatches:
    """The batches of one update, which count as one. Inside `use(m)` the forward pass is that of batch m."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.unknown = False  # whether a mean with a gradient has not said what it counts
        self._counts: dict[Counted, Shaped[Tensor, " m"]] = {}

    @contextmanager
    def use(self, number: int) -> Iterator[None]:
        """Inside the block, the rows are those of micro-batch `number` (from 0)."""
        global _micro_batch  # noqa: PLW0603 (as below)
        before, _micro_batch = _micro_batch, (self, number) if len(self.batches) > 1 else None
        try:
            yield
        finally:
            _micro_batch = before

    @torch.no_grad()
    def counts(self, counted: Counted) -> Shaped[Tensor, " m"]:
        """The sum of the mask or weights of each micro-batch over the rows of all ranks."""
        if counted not in self._counts:
            counts = torch.stack([counted(batch).sum() for batch in self.batches])
            if _present.count > 1:
                dist.all_reduce(counts, group=_present.group)
            self._counts[counted] = counts
        return self._counts[counted]


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


def shared_mean(total: Tensor, count: Tensor, of: Counted | None = None, *, repeats: int = 1) -> Tensor:
    """total / count of all rows of the update, 0 if nothing counts, as the part of this rank and micro-batch:

    n A total_rm / sum_sk count_sk,    n ranks r, s and A micro-batches m, k.

    The mean over ranks and micro-batches is the mean over all rows, and its gradient likewise. Alone it is
    that itself. `count` is the sum of `of(batch)`, times `repeats`. Without `of` the counts of the other
    micro-batches are not known: the sum is then over the ranks alone, and A is 1.
    """
    ranks, parts = _present, _present.count
    if _micro_batch is not None and of is not None:
        count, parts = repeats * _micro_batch[0].counts(of).sum(), parts * len(_micro_batch[0].batches)
    else:
        if _micro_batch is not None:
            _micro_batch[0].unknown |= total.requires_grad
        if ranks.count > 1:
            count = count.detach().clone()
            dist.all_reduce(count, group=ranks.group)
    least = torch.where(count > 0, count, 1) if count.is_floating_point() else count.clamp(min=1)
    return (total if parts == 1 else total * parts) / least


def micro_part(value: Tensor, of: Counted) -> Tensor:
    """value A count_m / sum_k count_k, for a value of micro-batch m alone; itself if an update is one batch.

    For a loss that compares the rows of a batch with one another: those of another micro-batch cannot be had,
    so its mean over the update is the mean of the micro-batches' losses, weighted by the rows that take part.
    """
    if _micro_batch is None:
        return value
    counts = _micro_batch[0].counts(of)
    return value * ((len(counts) * counts[_micro_batch[1]]).to(value.dtype) / counts.sum().clamp(min=1))


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
