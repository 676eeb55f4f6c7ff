"""The interface of parallel training; one process (SingleProcess) and DistributedDataParallel (Ddp)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tutti.distributed.ranks import mean_over_ranks
from tutti.distributed.world import World, world
from tutti.models.layers import blocks_of
from tutti.objectives.objective import Objective
from tutti.training.backward.interface import Backward, OneBackward
from tutti.training.parallel.compilation import compiled
from tutti.types import Batch, Features, LossTerms, UserError

log = logging.getLogger("tutti.training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """What is to be distributed: model, objective, the model's forward pass (compiled or not), processes."""

    model: nn.Module
    objective: Objective
    forward: Callable[..., Features]
    world: World

    @classmethod
    def of(
        cls,
        model: nn.Module,
        objective: Objective,
        *,
        mode: Literal["off", "model", "blocks"],
        recompute: bool,
    ) -> Self:
        """That of all processes of this training, compiled in this `mode`; `recompute`: a block's activations
        are computed again in the backward pass. Weights keep their names."""
        for block in blocks_of(model, objective):
            block.recompute = recompute
        return cls(model=model, objective=objective, forward=compiled(model, mode), world=world())

    def plain(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
        """Features and terms of a batch, on this process alone."""
        features = self.forward(batch.observation)
        return features, self.objective(features, batch, self.model, progress, only)


class Opaque:
    """Hides features and terms of a batch from DDP and FSDP, which search an output for tensors.

    DDP follows every tensor that a forward pass returns to the parameters behind it, and then waits for their
    gradients. Only the total may lead there: what it does not depend on gets no gradient.
    """

    def __init__(self, features: Features, terms: LossTerms) -> None:
        self.features, self.terms = features, terms


class LossModule(nn.Module):
    """Model and objective as one module that returns the total loss, and all else as `Opaque`."""

    def __init__(self, computation: Computation) -> None:
        super().__init__()
        self.model, self.objective = computation.model, computation.objective
        self._computation = computation

    def forward(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Tensor, Opaque]:
        """The total of the batch; features and terms hidden."""
        features, terms = self._computation.plain(batch, progress, only)
        return terms.total, Opaque(features, terms)


class Parallel:
    """How forward and backward passes are distributed over processes. One object serves a whole run.

    `gives_term_gradients`: the gradient of a single term can be computed (`autograd.grad`), which
    diagnostics, K gradients, masks and the calibration of gradient shares need.
    """

    gives_term_gradients: ClassVar[bool] = True

    def __init__(self, computation: Computation) -> None:
        self.computation = computation
        self.model, self.objective = computation.model, computation.objective
        self.world = computation.world

    def start(self, backward: Backward) -> None:
        """Called once, when all parameters and the backward are known.

        Raises: UserError if model or backward cannot be distributed in this way.
        """

    def require_term_gradients(self, asked: str) -> None:
        """Called before `asked` (words for a message) computes the gradient of a single term.

        Raises: UserError where it cannot be computed.
        """

    def evaluate(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
        """Features and terms of a batch, or of this rank's rows of it."""
        return self.plain(batch, progress, only)

    def plain(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
        """The same, without averaging gradients over the ranks in the backward pass."""
        return self.computation.plain(batch, progress, only)

    def evaluate_held_out(
        self, batch: Batch, progress: float, only: Collection[str] | None
    ) -> tuple[Features, LossTerms]:
        """Features and terms of a held-out batch, by the plain modules."""
        features = self.model(batch.observation)
        return features, self.objective(features, batch, self.model, progress, only)

    def drop(self) -> None:
        """Called where an update is skipped, perhaps between a forward and its backward pass."""

    def micro_batch(self, *, last: bool) -> None:
        """Called before the forward pass of each micro-batch of an update."""

    def finish(self) -> None:
        """Called after the backward passes: from here on `.grad` must be the mean over the ranks."""

    def check(self) -> None:
        """Raises: UserError if what must be equal on all ranks is not."""


class SingleProcess(Parallel):
    """One process: the plain computation."""


class Ddp(Parallel):
    """DistributedDataParallel: whole model and own rows on each rank, averaged gradients.

    A backward that is one pass through the total goes through DDP, which averages while it computes. One that
    asks for gradients by itself (masks) has its sum averaged at the end; K gradients average each term's.
    """

    def __init__(self, computation: Computation, *, bucket_mb: float) -> None:
        super().__init__(computation)
        require_no_batch_norm(self.model, self.objective)
        self._bucket_mb = bucket_mb
        self._reducer: DistributedDataParallel | None = None
        self._half_done = False
        self._averages_sum = False

    def start(self, backward: Backward) -> None:
        self.check()
        if isinstance(backward, OneBackward):
            self._reducer = self._new_reducer()
        elif backward.is_sum:
            self._averages_sum = True
        elif not backward.averages_ranks:
            raise UserError(
                f"training.parallel.kind ddp with the backward {type(backward).__name__}: it makes something "
                "else of the terms than their sum, so each term's gradient must be averaged over the ranks "
                "before. Do so (tutti.training.backward.term_gradients.averaged_gradients) and set "
                "averages_ranks = True in the class, or use backward.kind=one."
            )

    def _new_reducer(self) -> DistributedDataParallel:
        # find_unused_parameters: phases freeze parts and terms come and go. It also keeps the layout of the
        # buckets as it is at the start; else DDP rebuilds it after the first update, and a resumed run of
        # three or more ranks would add its gradients in another order.
        # broadcast_buffers: they are functions of what all ranks share, so they are equal already.
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers, 2.9 lacks the new name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                LossModule(self.computation),
                bucket_cap_mb=self._bucket_mb,
                find_unused_parameters=True,
                broadcast_buffers=False,
                init_sync=False,
            )

    def evaluate(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
        if self._reducer is None or not torch.is_grad_enabled():
            return self.plain(batch, progress, only)
        self._half_done = self._reducer.require_backward_grad_sync
        total, box = self._reducer(batch, progress, only)
        return box.features, replace(box.terms, total=total)

    def micro_batch(self, *, last: bool) -> None:
        if self._reducer is not None:
            self._reducer.require_backward_grad_sync = last  # what no_sync() sets, over forward and backward

    def drop(self) -> None:
        if self._half_done:  # it waits for a backward pass that will not come
            self._reducer, self._half_done = self._new_reducer(), False

    def finish(self) -> None:
        self._half_done = False
        if self._averages_sum:
            average_gradients([*self.model.parameters(), *self.objective.parameters()])

    def check(self) -> None:
        require_equal(self.world, {"model": self.model, "objective": self.objective})


@torch.no_grad()
def average_gradients(parameters: Collection[Tensor]) -> None:
    """Averages `.grad` over the ranks, in one message for each dtype."""
    trained = [p for p in dict.fromkeys(parameters) if p.grad is not None]
    for dtype in dict.fromkeys(p.dtype for p in trained):
        gradients = [p.grad for p in trained if p.dtype == dtype and p.grad is not None]
        mean = mean_over_ranks(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def require_no_batch_norm(*modules: nn.Module) -> None:
    """Refuses a batch norm, whose statistics would be those of each rank's own rows.

    Raises: UserError that names the module.
    """
    for root in modules:
        for name, module in root.named_modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if norm and not isinstance(module, nn.SyncBatchNorm):
                raise UserError(
                    f"module '{name}' is a {type(module).__name__}: on several ranks its statistics would be "
                    "those of each rank's rows. Use torch.nn.SyncBatchNorm (CUDA), a LayerNorm or a "
                    "GroupNorm, or training.parallel.kind=single."
                )


def require_equal(world: World, modules: dict[str, nn.Module]) -> None:
    """Compares a checksum of each parameter and buffer over the ranks, to the last bit.

    Raises: UserError naming the first one that differs between the ranks.
    """
    states = {f"{root}.{name}": t for root, m in modules.items() for name, t in m.state_dict().items()}
    checksums = torch.stack([_checksum(value) for value in states.values()]).tolist()
    gathered = world.all_gather([int(number) for number in checksums])
    for rank, theirs in enumerate(gathered):
        different = [n for n, a, b in zip(states, theirs, gathered[0], strict=True) if a != b]
        if different:
            raise UserError(
                f"the ranks do not have the same weights: {len(different)} of {len(states)} tensors, such as "
                f"{different[0]}, differ between rank 0 and rank {rank}. All must be built from the same "
                "config and seed, with the same versions, on the same kind of device; a module of your own "
                "must not draw from anything but torch's generator, nor change a buffer by its own rows."
            )


def _checksum(tensor: Tensor) -> Tensor:
    """A sum of the bits as integers, each times its place, so that a permutation differs too."""
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    if flat.is_floating_point():
        flat = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[flat.element_size()])
    places = torch.arange(1, len(flat) + 1, device=flat.device)
    return (flat.to(torch.int64) * places).sum()
