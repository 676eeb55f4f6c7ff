"""How a training is spread over processes: `training.parallel` in a config, and what it builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from tutti.objectives.objective import Objective
from tutti.training.distributed import World, launched
from tutti.training.machine import Machine
from tutti.training.replicas import Alone, Parallel, Replicated
from tutti.training.sharded import Sharded
from tutti.types import Features, UserError

HOW = "torchrun --nproc-per-node N -m tutti train CONFIG"


class _Meeting(BaseModel):
    """The key that every kind on several processes has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout: float = Field(
        default=1800.0, gt=0, description="Seconds a rank waits for the others before the training stops."
    )

    @property
    def count(self) -> int:
        """The number of processes."""
        return max(1, launched())


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
        if launched() > 1:
            raise UserError(
                f"training.parallel.kind is single, but {launched()} processes were started: each would "
                "train the same. Use training.parallel.kind=ddp, or start tutti without torchrun."
            )
        return 1

    def reason(self, count: int) -> str:
        """Why it is so, for the log."""
        return "one process (as configured)"

    def build(
        self,
        model: nn.Module,
        objective: Objective,
        forward: Callable[..., Features],
        machine: Machine,
        world: World,
    ) -> Parallel:
        """The plain computation. Raises UserError where several processes were started."""
        _require_met(self.count, world)
        return Alone(model, objective, forward, world)


class DdpConfig(_Meeting):
    """`kind: ddp`: every process has the whole model; gradients are averaged while they are computed."""

    kind: Literal["ddp"] = "ddp"
    bucket_mb: float = Field(
        default=25.0, gt=0, description="MiB of gradients that are averaged in one message."
    )

    @property
    def count(self) -> int:
        """The number of processes. Raises UserError if none was started by a launcher."""
        return _several(self.kind)

    def reason(self, count: int) -> str:
        """Why it is so, for the log."""
        return f"ddp over {count} processes (as configured)"

    def build(
        self,
        model: nn.Module,
        objective: Objective,
        forward: Callable[..., Features],
        machine: Machine,
        world: World,
    ) -> Parallel:
        """The replicated computation; plain for one process."""
        _require_met(self.count, world)
        if world.ranks.count == 1:
            return Alone(model, objective, forward, world)
        return Replicated(model, objective, forward, world, bucket_mb=self.bucket_mb)


class AutoParallelConfig(_Meeting):
    """`kind: auto`: ddp where torchrun has started several processes, else single."""

    kind: Literal["auto"] = "auto"

    def reason(self, count: int) -> str:
        """Why it is so, for the log."""
        if count == 1:
            return "one process (no other was started by torchrun)"
        return f"ddp over {count} processes (started by torchrun)"

    def build(
        self,
        model: nn.Module,
        objective: Objective,
        forward: Callable[..., Features],
        machine: Machine,
        world: World,
    ) -> Parallel:
        """What the number of processes asks for."""
        _require_met(self.count, world)
        if world.ranks.count == 1:
            return Alone(model, objective, forward, world)
        return DdpConfig(timeout=self.timeout).build(model, objective, forward, machine, world)


class FsdpConfig(_Meeting):
    """`kind: fsdp`: every process holds a share of each weight, its gradient and its optimiser state (FSDP2).

    A block's weights are gathered when it is needed and given back after it (2304.11277, ZeRO-3 of
    1910.02054).
    """

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

    @property
    def count(self) -> int:
        """The number of processes. Raises UserError if none was started by a launcher."""
        return _several(self.kind)

    def reason(self, count: int) -> str:
        """Why it is so, for the log."""
        return f"fsdp over {count} processes (as configured)"

    def build(
        self,
        model: nn.Module,
        objective: Objective,
        forward: Callable[..., Features],
        machine: Machine,
        world: World,
    ) -> Parallel:
        """The sharded computation; plain for one process. The weights become shares in place.

        Raises: UserError where bf16 is asked for and the training is not.
        """
        _require_met(self.count, world)
        if world.ranks.count == 1:
            return Alone(model, objective, forward, world)
        low = self.communication == "bf16"
        if low and machine.precision != "bf16":
            raise UserError(
                "training.parallel.communication is bf16, but the training computes in "
                f"{machine.precision}: weights would be rounded for nothing. Use training.precision=bf16, or "
                "communication=fp32."
            )
        return Sharded(model, objective, forward, world, machine.device, low=low, reshard=self.reshard)


ParallelConfig = Annotated[
    AutoParallelConfig | SingleConfig | DdpConfig | FsdpConfig, Field(discriminator="kind")
]


def _require_met(count: int, world: World) -> None:
    if world.ranks.count != count:
        raise UserError(
            f"{count} processes were started, but this one has met {world.ranks.count}: make the Trainer "
            "inside `with tutti.training.distributed.joined(count, device, timeout):`, as "
            "tutti.pipeline.train does."
        )


def _several(kind: str) -> int:
    if launched() == 0:
        raise UserError(
            f"training.parallel.kind is {kind}, but this process was started alone. Start it with {HOW}, or "
            "use training.parallel.kind=auto."
        )
    return launched()
