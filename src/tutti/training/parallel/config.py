"""How a training is distributed over processes: the union of all kinds of `training.parallel`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tutti.distributed.world import World, launched_world_size, world
from tutti.frozen_config import FrozenConfig
from tutti.training.device import Machine
from tutti.training.parallel.ddp import Ddp, LossModule, Parallel
from tutti.training.parallel.fsdp import Fsdp
from tutti.types import UserError

BUCKET_MB = 25.0


class _Parallel(FrozenConfig):
    kind: Any

    @property
    def count(self) -> int:
        """The number of processes. Raises UserError if it does not fit this kind."""
        launched = launched_world_size()
        if self.kind == "single" and launched > 1:
            raise UserError(
                f"training.parallel.kind is single, but {launched} processes were started: each would train "
                "the same. Use training.parallel.kind=ddp, or start tutti without torchrun."
            )
        if self.kind in ("ddp", "fsdp") and launched == 0:
            raise UserError(
                f"training.parallel.kind is {self.kind}, but this process was started alone. Start it with "
                "torchrun --nproc-per-node N -m -- tutti train CONFIG, or use training.parallel.kind=auto."
            )
        return max(1, launched)

    @property
    def reason(self) -> str:
        """How many processes and why, for the log."""
        count, automatic = self.count, self.kind == "auto"
        if count == 1:
            return f"one process ({'no other was started by torchrun' if automatic else 'as configured'})"
        if automatic:
            return f"ddp over {count} processes (started by torchrun)"
        return f"{self.kind} over {count} processes (as configured)"

    def build(self, joint: LossModule, machine: Machine) -> Parallel:
        """The passes of this kind; the plain ones on a single process.

        Raises: UserError where the process group has another number of processes than were started.
        """
        processes = world()
        met = processes.ranks.count
        if met != self.count:
            raise UserError(
                f"{self.count} processes were started, but this one has met {met}: make the Trainer inside "
                "`with tutti.distributed.world.process_group(count, device, timeout):`, as "
                "tutti.pipeline.train does."
            )
        return Parallel(joint, processes) if met == 1 else self._distribute(joint, processes, machine)

    def _distribute(self, joint: LossModule, world: World, machine: Machine) -> Parallel:
        return Ddp(joint, world, bucket_mb=BUCKET_MB)


class SingleConfig(_Parallel):
    """`kind: single`: one process, one device."""

    kind: Literal["single"] = "single"
    timeout: ClassVar[float] = 0.0
    """No timeout: one process."""


class _Launched(_Parallel):
    """A kind for several processes, which a launcher such as torchrun starts."""

    timeout: float = Field(
        default=1800.0,
        gt=0,
        description="Seconds that a rank waits for the others before the training stops.",
    )


class AutoParallelConfig(_Launched):
    """`kind: auto`: ddp where torchrun has started several processes, else single."""

    kind: Literal["auto"] = "auto"


class DdpConfig(_Launched):
    """`kind: ddp`: every process has the whole model; gradients are averaged while they are computed."""

    kind: Literal["ddp"] = "ddp"
    bucket_mb: float = Field(default=BUCKET_MB, gt=0, description="MiB of gradients in one message.")

    def _distribute(self, joint: LossModule, world: World, machine: Machine) -> Parallel:
        return Ddp(joint, world, bucket_mb=self.bucket_mb)


class FsdpConfig(_Launched):
    """`kind: fsdp`: every process holds a shard of each weight, its gradient and its optimiser state (FSDP2).

    A block's weights are gathered when it is needed and freed after it (2304.11277, ZeRO-3 of 1910.02054).
    """

    kind: Literal["fsdp"] = "fsdp"
    communication: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Precision in which weights are gathered; bf16 halves that traffic and needs "
        "training.precision bf16. Gradients are averaged and weights kept in fp32.",
    )
    reshard: bool = Field(
        default=True,
        description="Free a block's weights after its forward pass and gather them again for the backward "
        "(least memory); false keeps them until then (less traffic).",
    )

    def _distribute(self, joint: LossModule, world: World, machine: Machine) -> Parallel:
        """Shards the weights in place. Raises UserError where bf16 is asked for and the training is not."""
        low = self.communication == "bf16"
        if low and machine.precision != "bf16":
            raise UserError(
                "training.parallel.communication is bf16, but the training computes in "
                f"{machine.precision}: weights would be rounded for nothing. Use training.precision=bf16, or "
                "communication=fp32."
            )
        return Fsdp(joint, world, machine.device, low=low, reshard=self.reshard)


ParallelConfig = Annotated[
    AutoParallelConfig | SingleConfig | DdpConfig | FsdpConfig, Field(discriminator="kind")
]
