"""How model and objective run: compiled or not, on one process (Parallel), or replicated on several (Ddp)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tutti.distributed.world import World
from tutti.models.layers import Stem, blocks_of
from tutti.models.vla import VLA
from tutti.objectives.objective import Objective
from tutti.training.backward.interface import Backward, OneBackward
from tutti.training.backward.term_gradients import rank_means
from tutti.types import Batch, Features, LossTerms, UserError


def _mode(value: Any) -> Any:
    return ("blocks" if value else "off") if isinstance(value, bool) else value


CompileMode = Annotated[Literal["off", "model", "blocks"], BeforeValidator(_mode)]
"""`true` means blocks, `false` off."""

VARIANTS = 64
"""Versions of a block that may be compiled. They share one function, and each width, mask and mode (learning,
judging) is a version of its own: more than torch's default of 8, behind which it would stop to compile."""


def compiled(model: nn.Module, mode: CompileMode, **options: Any) -> Callable[..., Any]:
    """The forward pass of `model`, compiled whole or block by block; `options` are those of `torch.compile`.

    A block is compiled as one graph: what would break it is an error, not a slow training. Blocks of the same
    sizes share what was compiled, so a deep model takes no longer than a shallow one; between the blocks the
    model runs as ever, but for its `Stem` and the making of floats from pictures, one graph each. The whole
    model is one graph too, unless it holds what cannot be compiled: then it is several.

    The graph is walked more than once (K gradients, diagnostics), so the compiled backward must not give away
    its buffers at the first pass, as it would by default.
    """
    if mode == "off":
        return model
    import torch._dynamo.config  # submodules that `import torch` does not load, and that take a while
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    if mode == "model":
        return torch.compile(model, **options)
    # Sizes stay numbers: vision and fusion share a block's function, and with symbols for the sizes of the
    # second one its kernels are slower; inductor of torch 2.11 fails at the stem's second size.
    options = {"fullgraph": True, "dynamic": False, **options}
    for part in (*blocks_of(model), *(one for one in model.modules() if isinstance(one, Stem))):
        part.compile(**options)
    if isinstance(model, VLA):
        model.to_floats = torch.compile(model.to_floats, **options)
    return model


class Opaque:
    """Hides features and terms of a batch from DDP and FSDP, which search an output for tensors.

    DDP follows every tensor that a forward pass returns to the parameters behind it, and then waits for their
    gradients. Only the total may lead there: what it does not depend on gets no gradient.
    """

    def __init__(self, features: Features, terms: LossTerms) -> None:
        self.features, self.terms = features, terms


class LossModule(nn.Module):
    """Model and objective as one module that returns the total loss, and all else as `Opaque`.

    The model is compiled in this `mode`; `recompute`: a block's activations are computed again in the
    backward pass; `residual`: the dtype of the sum that runs through the blocks in mixed precision, if it is
    another. Weights keep their names.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        mode: CompileMode = "off",
        recompute: bool = False,
        residual: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        for block in blocks_of(model, objective):
            block.recompute, block.residual = recompute, residual
        # As a bound method: a compiled model is a module too, whose weights would count twice.
        self._run_model: Callable[..., Features] = compiled(model, mode).__call__

    def plain(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
        """Features and terms of a batch, on this process alone."""
        features = self._run_model(batch.observation)
        return features, self.objective(features, batch, self.model, progress, only)

    def forward(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Tensor, Opaque]:
        """The total of the batch; features and terms hidden."""
        features, terms = self.plain(batch, progress, only)
        return terms.total, Opaque(features, terms)


class Parallel:
    """How forward and backward passes are distributed over processes; this base class is one process alone.
    One object serves a whole run.

    `gives_term_gradients`: the gradient of a single term can be computed (`autograd.grad`), which
    diagnostics, K gradients, masks and the calibration of gradient shares need.
    """

    gives_term_gradients: ClassVar[bool] = True

    def __init__(self, joint: LossModule, world: World) -> None:
        self.joint, self.model, self.objective = joint, joint.model, joint.objective
        self.world = world

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
        return self.joint.plain(batch, progress, only)

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


class Ddp(Parallel):
    """DistributedDataParallel: whole model and own rows on each rank, averaged gradients.

    A backward that is one pass through the total goes through DDP, which averages while it computes. One that
    asks for gradients by itself (masks) has its sum averaged at the end; K gradients average each term's.
    """

    def __init__(self, joint: LossModule, world: World, *, bucket_mb: float) -> None:
        super().__init__(joint, world)
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
                self.joint,
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
    """Averages `.grad` over the ranks."""
    gradients = [p.grad for p in dict.fromkeys(parameters) if p.grad is not None]
    for gradient, mean in zip(gradients, rank_means(gradients), strict=True):
        gradient.copy_(mean)


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
    """Compares a checksum of each parameter and buffer over the ranks, to the last bit; also those that no
    checkpoint holds, as the weights and colours of a frozen tower.

    Raises: UserError naming the first one that differs between the ranks.
    """
    own = {root: {**dict(m.named_parameters()), **dict(m.named_buffers())} for root, m in modules.items()}
    states = {f"{root}.{name}": tensor for root, one in own.items() for name, tensor in one.items()}
    checksums = torch.stack([_checksum(value) for value in states.values()]).tolist()
    gathered = world.all_gather([int(number) for number in checksums])
    for rank, theirs in enumerate(gathered):
        different = [n for n, a, b in zip(states, theirs, gathered[0], strict=True) if a != b]
        if different:
            raise UserError(
                f"the ranks do not have the same weights: {len(different)} of {len(states)} tensors, such as "
                f"{different[0]}, differ between rank 0 and rank {rank}. All must be built from the same "
                "config, seed and towers, with the same versions, on the same kind of device; a module of "
                "your own must not draw from anything but torch's generator, nor change a buffer by its rows."
            )


def _checksum(tensor: Tensor, piece: int = 2**20) -> Tensor:
    """A sum of the bits as integers modulo 2^64, each times its place, so that a permutation differs too.

    So many numbers at a time, as each takes 24 bytes more.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start, numbers in zip(range(0, len(flat), piece), flat.split(piece), strict=False):
        places = torch.arange(start + 1, start + len(numbers) + 1, device=flat.device)
        total += (numbers.to(torch.int64) * places).sum()
    return total
