"""How a training is distributed over processes: the union of all kinds of `training.parallel`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tutti.distributed.world import launched_world_size
from tutti.frozen_config import FrozenConfig
from tutti.training.device import Machine
from tutti.training.parallel.ddp import Computation, Ddp, Parallel, SingleProcess
from tutti.training.parallel.fsdp import Fsdp
from tutti.types import UserError

HOW = "torchrun --nproc-per-node N -m -- tutti train CONFIG"


class _Parallel(FrozenConfig):
    @property
    @abstractmethod
    def count(self) -> int:
        """The number of processes. Raises UserError if it does not fit this kind."""

    @abstractmethod
    def reason(self, count: int) -> str:
        """The reason for this kind, for the log."""

    def build(self, computation: Computation, machine: Machine) -> Parallel:
        """The computation of this kind; the plain one on a single process.

        Raises: UserError where the process group has another number of processes than were started.
        """
        met = computation.world.ranks.count
        if met != self.count:
            raise UserError(
                f"{self.count} processes were started, but this one has met {met}: make the Trainer inside "
                "`with tutti.distributed.world.process_group(count, device, timeout):`, as "
                "tutti.pipeline.train does."
            )
        return SingleProcess(computation) if met == 1 else self._distribute(computation, machine)

    @abstractmethod
    def _distribute(self, computation: Computation, machine: Machine) -> Parallel: ...


class SingleConfig(_Parallel):
    """`kind: single`: one process, one device."""

    kind: Literal["single"] = "single"

    @property
    def timeout(self) -> float:
        """No timeout: one process."""
        return 0.0

    @property
    def count(self) -> int:
        if launched_world_size() > 1:
            raise UserError(
                f"training.parallel.kind is single, but {launched_world_size()} processes were started: each "
                "would train the same. Use training.parallel.kind=ddp, or start tutti without torchrun."
            )
        return 1

    def reason(self, count: int) -> str:
        return "one process (as configured)"

    def _distribute(self, computation: Computation, machine: Machine) -> Parallel:
        raise AssertionError("one process only")


class _Launched(_Parallel):
    """A kind for several processes, which a launcher such as torchrun starts."""

    name: ClassVar[str]

    timeout: float = Field(
        default=1800.0, gt=0, description="Seconds a rank waits for the others before the training stops."
    )

    @property
    def count(self) -> int:
        if launched_world_size() == 0:
            raise UserError(
                f"training.parallel.kind is {self.name}, but this process was started alone. Start it with "
                f"{HOW}, or use training.parallel.kind=auto."
            )
        return launched_world_size()

    def reason(self, count: int) -> str:
        return f"{self.name} over {count} processes (as configured)"


class DdpConfig(_Launched):
    """`kind: ddp`: every process has the whole model; gradients are averaged while they are computed."""

    name: ClassVar[str] = "ddp"
    kind: Literal["ddp"] = "ddp"
    bucket_mb: float = Field(
        default=25.0, gt=0, description="MiB of gradients that are averaged in one message."
    )

    def _distribute(self, computation: Computation, machine: Machine) -> Parallel:
        return Ddp(computation, bucket_mb=self.bucket_mb)


class AutoParallelConfig(_Launched):
    """`kind: auto`: ddp where torchrun has started several processes, else single."""

    name: ClassVar[str] = "auto"
    kind: Literal["auto"] = "auto"

    @property
    def count(self) -> int:
        return max(1, launched_world_size())

    def reason(self, count: int) -> str:
        if count == 1:
            return "one process (no other was started by torchrun)"
        return f"ddp over {count} processes (started by torchrun)"

    def _distribute(self, computation: Computation, machine: Machine) -> Parallel:
        return DdpConfig(timeout=self.timeout).build(computation, machine)


class FsdpConfig(_Launched):
    """`kind: fsdp`: every process holds a shard of each weight, its gradient and its optimiser state (FSDP2).

    A block's weights are gathered when it is needed and freed after it (2304.11277, ZeRO-3 of 1910.02054).
    """

    name: ClassVar[str] = "fsdp"
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

    def _distribute(self, computation: Computation, machine: Machine) -> Parallel:
        """Shards the weights in place. Raises UserError where bf16 is asked for and the training is not."""
        low = self.communication == "bf16"
        if low and machine.precision != "bf16":
            raise UserError(
                "training.parallel.communication is bf16, but the training computes in "
                f"{machine.precision}: weights would be rounded for nothing. Use training.precision=bf16, or "
                "communication=fp32."
            )
        return Fsdp(computation, machine.device, low=low, reshard=self.reshard)


ParallelConfig = Annotated[
    AutoParallelConfig | SingleConfig | DdpConfig | FsdpConfig, Field(discriminator="kind")
]
