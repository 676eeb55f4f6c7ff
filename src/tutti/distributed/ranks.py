"""Means, embeddings and random draws over all ranks and micro-batches of an update.

A training on n ranks is one training: its batch is spread over the ranks by rows, rank r holding the rows
[r b, (r + 1) b), b = B / n. Each rank computes a loss L_r of which only the mean over the ranks counts, and
that is to be the loss of the whole batch on one process, term by term and gradient by gradient:

    1/n sum_r L_r = L,    1/n sum_r dL_r / d theta = dL / d theta

* Per-row losses: `shared_mean`, the global sum divided by the global count.
* Losses that compare rows (pairs of a contrastive term): `gathered`, the rows of all ranks on every rank.
* Random numbers for rows: `sample_whole_batch` draws those of the whole batch on every rank and keeps the
  rank's own, so that all ranks stay in the same random state.

On one rank, which is the default, every function is exactly the plain computation.

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
    """Rank of this process and number of ranks.

    `group` is a process group of its own for collectives inside a forward or backward pass, so that they
    cannot mix with those of DDP or FSDP.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """True for rank 0, the one that writes."""
        return self.rank == 0

    def rows(self, size: int) -> slice:
        """This rank's rows of a whole batch of `size`."""
        own = size // self.count
        return slice(self.rank * own, (self.rank + 1) * own)


ONE_RANK = Ranks()

# A plain global: torch.compile traces it with a guard, where a ContextVar would break the graph, and the
# threads of a backward pass on a GPU would not see one either.
_present = ONE_RANK
_micro_batch: tuple[MicroBatches, int] | None = None

Counted = Callable[[Any], Tensor]
"""Gives the mask or weights of a mean from a batch. A method or a named function, not a lambda: it is the key
under which the counts of an update are cached."""


class MicroBatches:
    """The micro-batches of one update, which count as one batch. `use(m)` wraps the forward pass of batch m.

    `unknown` is True once a mean with a gradient has not told what it counts.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.unknown = False
        self._counts: dict[Counted, Shaped[Tensor, " m"]] = {}

    @contextmanager
    def use(self, number: int) -> Iterator[None]:
        """Inside the block, the forward pass is that of micro-batch `number` (from 0)."""
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
            # Of all micro-batches at once: one collective for an update, and before its first forward pass.
            counts = torch.stack([counted(batch).sum() for batch in self.batches])
            if _present.count > 1:
                dist.all_reduce(counts, group=_present.group)
            self._counts[counted] = counts
        return self._counts[counted]


def current_ranks() -> Ranks:
    """The ranks that share the batch at present; `ONE_RANK` outside of `shared_batch`."""
    return _present


@contextmanager
def shared_batch(ranks: Ranks) -> Iterator[None]:
    """Inside the block, each batch holds this rank's rows of one batch that `ranks` share."""
    global _present  # noqa: PLW0603 (see above)
    before, _present = _present, ranks
    try:
        yield
    finally:
        _present = before


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over the ranks, without gradient; `x` itself on one rank."""
    ranks = _present
    if ranks.count == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=ranks.group)
    return total / ranks.count


def shared_mean(total: Tensor, count: Tensor, of: Counted | None = None, *, repeats: int = 1) -> Tensor:
    """Global sum / global count over all rows of the update, as this rank's and micro-batch's part of it:

    n A total_rm / sum_sk count_sk,    n ranks r, s and A micro-batches m, k.

    The mean of these parts over ranks and micro-batches is the mean over all rows, and its gradient likewise;
    0 if nothing counts. `count` is the sum of `of(batch)`, times `repeats`. Without `of` the counts of the
    other micro-batches are not known: the sum is then over the ranks alone, and A is 1.
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
    """Weights the loss of micro-batch m: value A count_m / sum_k count_k. Itself if an update is one batch.

    For a loss that compares the rows of a batch with one another: those of another micro-batch cannot be had,
    so its mean over the update is the mean of the micro-batches' losses, weighted by the rows that take part.
    """
    if _micro_batch is None:
        return value
    counts = _micro_batch[0].counts(of)
    return value * ((len(counts) * counts[_micro_batch[1]]).to(value.dtype) / counts.sum().clamp(min=1))


def gathered(x: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "m ..."]:
    """The rows of all ranks in the order of the ranks, m = n b, with gradient; `x` itself on one rank.

    The gradient of a row is the sum of what all ranks want of it: with every rank computing the same L of all
    rows, that is n dL/dx, and the mean over the ranks' gradients makes it dL/dx.
    """
    ranks = _present
    if ranks.count == 1:
        return x
    # Whether there is a gradient is the same on every rank, so that all of them meet in its collective.
    if x.is_floating_point() and torch.is_grad_enabled() and x.requires_grad:
        return _Gathered.apply(x, ranks)  # pyright: ignore[reportReturnType]
    return _all_rows(x, ranks)


def sample_whole_batch(sample: Callable[[int], Tensor], size: int, dim: int = 0) -> Tensor:
    """Random numbers for this rank's `size` rows, taken from those of the whole batch.

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
        total = gradient.contiguous().clone()  # the all-reduce writes into it; autograd still owns `gradient`
        dist.all_reduce(total, group=ctx.ranks.group)
        return total[ctx.ranks.rows(len(total))].contiguous(), None


def _all_rows(x: Tensor, ranks: Ranks) -> Tensor:
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.count)]
    dist.all_gather(parts, own, group=ranks.group)
    return torch.cat(parts)
