"""How a training is spread over processes: `training.parallel` in a config, and what it builds."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tutti.distributed.world import World, launched_world_size
from tutti.training.device import Machine
from tutti.training.parallel.ddp import Alone, Computation, Parallel, Replicated
from tutti.training.parallel.fsdp import Sharded
from tutti.types import UserError

HOW = "torchrun --nproc-per-node N -m -- tutti train CONFIG"


class _Meeting(BaseModel):
    """The key that every kind on several processes has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout: float = Field(
        default=1800.0, gt=0, description="Seconds a rank waits for the others before the training stops."
    )

    @property
    def count(self) -> int:
        """The number of processes."""
        return max(1, launched_world_size())


class SingleConfig(BaseModel):
    """`kind: single`: one process, one device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["single"] = "single"

    @property
    def timeout(self) -> float:
        """Nobody is waited for."""
        return 0.0

    @property
    def count(self) -> int:
        """One process. Raises UserError if a launcher has started several."""
        if launched_world_size() > 1:
            raise UserError(
                f"training.parallel.kind is single, but {launched_world_size()} processes were started: each "
                "would train the same. Use training.parallel.kind=ddp, or start tutti without torchrun."
            )
        return 1

    def reason(self, count: int) -> str:
        """Why it is so, for the log."""
        return "one process (as configured)"

    def build(self, computation: Computation, machine: Machine) -> Parallel:
        """The plain computation. Raises UserError where several processes were started."""
        _require_met(self.count, computation.world)
        return Alone(computation)


class _Several(_Meeting):
    """What the kinds have in common that need a launcher."""

    name: ClassVar[str]

    @property
    def count(self) -> int:
        """The number of processes. Raises UserError if none was started by a launcher."""
        if launched_world_size() == 0:
            raise UserError(
                f"training.parallel.kind is {self.name}, but this process was started alone. Start it with "
                f"{HOW}, or use training.parallel.kind=auto."
            )
        return launched_world_size()

    def reason(self, count: int) -> str:
        """Why it is so, for the log."""
        return f"{self.name} over {count} processes (as configured)"


class DdpConfig(_Several):
    """`kind: ddp`: every process has the whole model; gradients are averaged while they are computed."""

    name: ClassVar[str] = "ddp"
    kind: Literal["ddp"] = "ddp"
    bucket_mb: float = Field(
        default=25.0, gt=0, description="MiB of gradients that are averaged in one message."
    )

    def build(self, computation: Computation, machine: Machine) -> Parallel:
        """The replicated computation; plain for one process."""
        _require_met(self.count, computation.world)
        if computation.world.ranks.count == 1:
            return Alone(computation)
        return Replicated(computation, bucket_mb=self.bucket_mb)


class AutoParallelConfig(_Meeting):
    """`kind: auto`: ddp where torchrun has started several processes, else single."""

    kind: Literal["auto"] = "auto"

    def reason(self, count: int) -> str:
        """Why it is so, for the log."""
        if count == 1:
            return "one process (no other was started by torchrun)"
        return f"ddp over {count} processes (started by torchrun)"

    def build(self, computation: Computation, machine: Machine) -> Parallel:
        """What the number of processes asks for."""
        _require_met(self.count, computation.world)
        if computation.world.ranks.count == 1:
            return Alone(computation)
        return DdpConfig(timeout=self.timeout).build(computation, machine)


class FsdpConfig(_Several):
    """`kind: fsdp`: every process holds a share of each weight, its gradient and its optimiser state (FSDP2).

    A block's weights are gathered when it is needed and given back after it (2304.11277, ZeRO-3 of
    1910.02054).
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
        description="Give a block's weights back after its forward pass and gather them again for the "
        "backward (least memory); false keeps them until then (less traffic).",
    )

    def build(self, computation: Computation, machine: Machine) -> Parallel:
        """The sharded computation; plain for one process. The weights become shares in place.

        Raises: UserError where bf16 is asked for and the training is not.
        """
        _require_met(self.count, computation.world)
        if computation.world.ranks.count == 1:
            return Alone(computation)
        low = self.communication == "bf16"
        if low and machine.precision != "bf16":
            raise UserError(
                "training.parallel.communication is bf16, but the training computes in "
                f"{machine.precision}: weights would be rounded for nothing. Use training.precision=bf16, or "
                "communication=fp32."
            )
        return Sharded(computation, machine.device, low=low, reshard=self.reshard)


ParallelConfig = Annotated[
    AutoParallelConfig | SingleConfig | DdpConfig | FsdpConfig, Field(discriminator="kind")
]


def _require_met(count: int, world: World) -> None:
    if world.ranks.count != count:
        raise UserError(
            f"{count} processes were started, but this one has met {world.ranks.count}: make the Trainer "
            "inside `with tutti.distributed.world.process_group(count, device, timeout):`, as "
            "tutti.pipeline.train does."
        )
