"""Process groups of a training: collectives on the CPU, work of rank 0 alone, time-outs that name ranks."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from tutti.distributed.launcher import end_with_launcher
from tutti.distributed.ranks import ONE_RANK, Ranks
from tutti.errors import UserError

log = logging.getLogger("tutti.training")

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=12)
"""Timeout of collectives that wait for rank 0 (decoding images, saving). A dead rank raises at once."""
CONNECT_SECONDS = 60.0
"""Time-out for reaching a launcher's store, which is there before the processes are."""

WAITED = "tutti/waited/"
"""Prefix of the store's keys under which ranks report that they have waited in vain."""
GRACE_SECONDS = 3.0
"""Seconds after a time-out within which the other waiting ranks run into theirs."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a training, with their process groups; by default this process alone.

    `ranks` is what `tutti.distributed.ranks` needs. `control` is a gloo group, so that agreements about plain
    values never synchronise a GPU. `waiting` is another one with a time-out of hours, and `saving` a third,
    for the thread that writes checkpoints: collectives of two threads must not share a group.
    """

    ranks: Ranks = ONE_RANK
    control: Any = None
    waiting: Any = None
    saving: Any = None

    @property
    def first(self) -> bool:
        """True for rank 0, the one that writes."""
        return self.ranks.first

    @property
    def patient(self) -> World:
        """The same processes, whose collectives wait for hours."""
        return replace(self, control=self.waiting)

    @property
    def for_checkpoint_thread(self) -> World:
        """The same processes with a process group of their own, for the thread that writes checkpoints."""
        return replace(self, control=self.saving, waiting=self.saving)

    def max(self, number: int) -> int:
        """The largest `number` of all ranks. All ranks must call it."""
        if self.ranks.count == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks. All ranks must call it."""
        if self.ranks.count == 1:
            return [value]
        # Through gloo, also on GPUs: pickled objects sent by NCCL would make every rank wait for its stream.
        values: list[Any] = [None] * self.ranks.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_rank_zero(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0; the other ranks wait for its result and get the same.

        Raises: what it raises, on rank 0; UserError with the same message on the others.
        """
        if self.ranks.count == 1:
            return make()
        outcome: list[Any] = [None, ""]
        failure: Exception | None = None
        if self.first:
            try:
                outcome[0] = make()
            except Exception as error:  # told to the others first, which would wait for ever
                failure, outcome[1] = error, f"rank 0: {error}"
        with self.name_missing_ranks():
            dist.broadcast_object_list(outcome, 0, group=self.waiting)
        if failure is not None:
            raise failure
        if outcome[1]:
            raise UserError(outcome[1])
        return outcome[0]

    def rank_zero_first(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0, which may write a cache, and afterwards on the other ranks, which read it.

        Raises: what it raises; on the other ranks a UserError if it failed on rank 0.
        """
        made: list[T] = []
        self.on_rank_zero(lambda: made.append(make()))
        return made[0] if made else make()

    @contextmanager
    def name_missing_ranks(self) -> Iterator[None]:
        """Inside the block, a time-out of a collective becomes an error that names the missing ranks.

        Raises: UserError after the time-out of the process group.
        """
        try:
            yield
        except RuntimeError as error:
            said = str(error).lower()
            if self.ranks.count == 1 or not ("timed out" in said or "timeout" in said):
                raise
            raise UserError(self._who_is_missing()) from error

    def _who_is_missing(self) -> str:
        """The message of a time-out: ranks that have waited say so in the store; the others are missing."""
        store: Any = dist.distributed_c10d._get_default_store()
        store.set(f"{WAITED}{self.ranks.rank}", "1")
        time.sleep(GRACE_SECONDS)
        # A rank that hangs cannot say so; whoever has not said that it waits is therefore the one that hangs.
        missing = [str(rank) for rank in range(self.ranks.count) if not store.check([f"{WAITED}{rank}"])]
        named = f"rank {', '.join(missing)}" if missing else "none is missing now: the network may be slow"
        return (
            f"rank {self.ranks.rank} waited in vain for another one (training.parallel.timeout); hung or "
            f"dead: {named}. Look at that process (py-spy dump --pid PID) and its machine; raise "
            "training.parallel.timeout if a step can take that long. Rank 0 has "
            f"{LONGEST_WAIT.total_seconds() / 3600:.0f} hours for what it does alone, such as decoding all "
            "images once: let one process do it before if it takes longer. Started by torchrun with "
            "--max-restarts, the training goes on from its last checkpoint."
        )


ONE_PROCESS = World()
_world = ONE_PROCESS


def world() -> World:
    """The processes of the training that this process takes part in."""
    return _world


def launched_world_size() -> int:
    """Number of processes that torchrun (or a like launcher) has started; 0 without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "0"))


@contextmanager
def process_group(count: int, device: torch.device, timeout: float) -> Iterator[World]:
    """Initialises the process group of the `count` processes of a training, and destroys it at the end.

    Gloo on a CPU, NCCL on CUDA with gloo for agreements. The device is cuda:LOCAL_RANK. A process group that
    exists already is used, and stays.

    Raises: UserError if this machine has more processes than devices, or they cannot connect.
    """
    global _world  # noqa: PLW0603 (a process is in one training at a time)
    if count == 1 or _world is not ONE_PROCESS:
        yield _world
        return
    end_with_launcher()
    must_initialise = not dist.is_initialized()  # a caller may have made a group, as torchrun's users do
    level = log.parent.level if log.parent is not None else logging.NOTSET
    limit = timedelta(seconds=timeout)
    try:
        _connect(must_initialise, device, limit)
        # A new group does not take over the time-out of the first one: torch's own 30 minutes would hold.
        _world = World(
            ranks=Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=limit)),
            control=dist.new_group(backend="gloo", timeout=limit),
            waiting=dist.new_group(backend="gloo", timeout=LONGEST_WAIT),
            saving=dist.new_group(backend="gloo", timeout=LONGEST_WAIT),
        )
        if not _world.first:  # a message that all ranks would log is logged by rank 0 alone
            logging.getLogger("tutti").setLevel(logging.ERROR)
        yield _world
    finally:
        _world = ONE_PROCESS
        logging.getLogger("tutti").setLevel(level)
        if must_initialise and dist.is_initialized():
            dist.destroy_process_group()
            # The threads of a gloo group end with the last reference to it, and FSDP's modules hold each
            # other in circles. One that lets go of a tensor while Python shuts down would abort the process.
            gc.collect()


def _connect(must_initialise: bool, device: torch.device, timeout: timedelta) -> None:
    if device.type == "cuda":
        place, num_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= num_devices:
            raise UserError(
                f"this is process {place} (from 0) of this machine, but torch sees {num_devices} CUDA "
                f"devices. Start at most {num_devices} processes: torchrun --nproc-per-node {num_devices} "
                "..., or use training.device=cpu."
            )
        torch.cuda.set_device(place)
    if not must_initialise:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set but not {', '.join(missing)}: start the processes with torchrun "
            "--nproc-per-node N -m -- tutti train CONFIG, which sets them all."
        )
    try:
        there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        connecting = min(timeout, timedelta(seconds=CONNECT_SECONDS)) if there else timeout
        store, rank, count = next(rendezvous("env://", timeout=connecting))
        store.set_timeout(timeout)
        # torchrun without --standalone or --rdzv-backend keeps one store over restarts (torch 2.13), and in
        # it the addresses of processes that are gone: each attempt has a corner of its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own_store = PrefixStore(f"tutti/attempt_{attempt}", store)
        dist.init_process_group(backend, store=own_store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {launched_world_size()} processes of this training could not connect at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}. Check the address "
            "and that all of them were started."
        ) from error
