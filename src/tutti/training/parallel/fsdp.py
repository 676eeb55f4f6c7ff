"""FSDP2: one training whose weights, gradients and optimiser state are sharded over the processes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import ClassVar

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parameter import Parameter

from tutti.distributed.world import World
from tutti.models.layers import blocks_of
from tutti.training.backward.interface import Backward, OneBackward
from tutti.training.parallel.ddp import (
    LossModule,
    Parallel,
    average_gradients,
    require_equal,
    require_no_batch_norm,
)
from tutti.types import Batch, Features, LossTerms, UserError


class Fsdp(Parallel):
    """`fully_shard` on each transformer block, then on model and objective together.

    A parameter without a dimension (a temperature) cannot be shared out: each rank has it, and its gradient
    is averaged at the end of the update. Every forward pass, also one without gradient, goes through the
    root, which gathers what belongs to no block.
    """

    gives_term_gradients: ClassVar[bool] = False

    def __init__(
        self, joint: LossModule, world: World, device: torch.device, *, low: bool, reshard: bool
    ) -> None:
        super().__init__(joint, world)
        require_no_batch_norm(self.model, self.objective)
        require_equal(self.world, {"model": self.model, "objective": self.objective})
        mesh = init_device_mesh(device.type, (self.world.ranks.count,))
        # Inputs stay as they are: a rounded batch would be another target, and autocast rounds what enters a
        # product anyway.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,
        )
        self._scalars = [parameter for parameter in joint.parameters() if parameter.ndim == 0]
        for parameter in joint.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP shares out rows; kernels are channels-last
        self._units: list[FSDPModule] = [
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
            for block in blocks_of(self.model, self.objective)
        ]
        ignored: set[Parameter] = set(self._scalars)
        self._root: FSDPModule = fully_shard(joint, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        self._units.append(self._root)

    def start(self, backward: Backward) -> None:
        if not isinstance(backward, OneBackward):
            self.require_term_gradients(f"the backward {type(backward).__name__}")

    def require_term_gradients(self, asked: str) -> None:
        raise UserError(
            f"training.parallel.kind fsdp with {asked}: FSDP averages gradients as they reach .grad in one "
            "backward pass of the total, so the gradient of a single term cannot be had. Use "
            "training.parallel.kind=ddp, or backward.kind=one with a balancing that asks for none."
        )

    def evaluate(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
        total, box = self.joint(batch, progress, only)
        if not torch.is_grad_enabled():
            self.drop()
        return box.features, replace(box.terms, total=total)

    def plain(self, batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
        return self.evaluate(batch, progress, only)

    def evaluate_held_out(
        self, batch: Batch, progress: float, only: Collection[str] | None
    ) -> tuple[Features, LossTerms]:
        return self.evaluate(batch, progress, only if only is not None else self.objective.names)

    def drop(self) -> None:
        # What a forward pass has gathered and no backward pass gives back would be used by the next forward
        # pass as it is, whatever weights the shares hold by then (an average, say).
        for unit in self._units:
            unit.reshard()

    def micro_batch(self, *, last: bool) -> None:
        self._root.set_requires_gradient_sync(last)
        self._root.set_is_last_backward(last)

    def finish(self) -> None:
        average_gradients(self._scalars)
