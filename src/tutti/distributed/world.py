"""The processes of one training: who they are, what they agree on, and that only the first one writes."""

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

from tutti.distributed.ranks import ALONE, Ranks
from tutti.errors import UserError

log = logging.getLogger("tutti.training")

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long the other ranks wait for the first one's work (decoding pictures, saving). If it dies they
hear."""

LATE = "tutti/late/"
AFTER = 3.0
"""Seconds after a time-out in which the other waiting ranks come to theirs."""


@dataclass(frozen=True, slots=True)
class World:
    """All processes of a training, or this one alone.

    `ranks` is what `tutti.distributed.ranks` needs to know. `control` carries agreements about numbers on the
    CPU, whatever the device, so that no GPU synchronises; `waiting` is the same without a time-out worth the
    name, and `saving` another such one, for the thread that writes checkpoints.
    """

    ranks: Ranks = ALONE
    control: Any = None
    waiting: Any = None
    saving: Any = None

    @property
    def first(self) -> bool:
        """True for the one process that writes."""
        return self.ranks.first

    @property
    def patient(self) -> World:
        """The same processes, which wait for each other as long as it takes."""
        return replace(self, control=self.waiting)

    @property
    def aside(self) -> World:
        """The same processes with a line of their own, for another thread."""
        return replace(self, control=self.saving, waiting=self.saving)

    def largest(self, number: int) -> int:
        """The largest number that any rank has brought; all ranks must call it."""
        if self.ranks.count == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def together(self, value: T) -> list[T]:
        """What each rank has brought, in the order of the ranks; all ranks must call it."""
        if self.ranks.count == 1:
            return [value]
        found: list[Any] = [None] * self.ranks.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    def on_first(self, make: Callable[[], T]) -> T:
        """`make()` on the first rank; the others wait for it and get the same.

        Raises: what it raises, on the first rank; UserError with the same message on the others.
        """
        if self.ranks.count == 1:
            return make()
        if not self.first:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, 0, group=self.waiting)
            good, value = box[0]
            if not good:
                raise UserError(value)
            return value
        try:
            value = make()
        except Exception as error:
            dist.broadcast_object_list([(False, f"rank 0: {error}")], 0, group=self.waiting)
            raise
        dist.broadcast_object_list([(True, value)], 0, group=self.waiting)
        return value

    def first_then_all(self, make: Callable[[], T]) -> T:
        """`make()` on the first rank, and when it has written what is to be found on the disk, on the others.

        Raises: what it raises; on the others a UserError if it failed on the first.
        """
        made: list[T] = []
        self.on_first(lambda: made.append(make()))
        return made[0] if made else make()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block, a rank that does not come to where the others wait for it is named.

        Raises: UserError after the time-out of the process group.
        """
        try:
            yield
        except RuntimeError as error:
            if self.ranks.count == 1 or not _is_timeout(error):
                raise
            raise UserError(self._who_is_missing()) from error

    def _who_is_missing(self) -> str:
        """Each rank that has waited says so in the store that they have met through; who does not is
        missing."""
        store: Any = dist.distributed_c10d._get_default_store()
        store.set(f"{LATE}{self.ranks.rank}", "1")
        time.sleep(AFTER)
        missing = [rank for rank in range(self.ranks.count) if not store.check([f"{LATE}{rank}"])]
        named = (
            f"rank {', '.join(map(str, missing))}"
            if missing
            else "none is missing now: the network may be slow"
        )
        return (
            f"rank {self.ranks.rank} waited in vain for another one (training.parallel.timeout); hung or "
            f"dead: {named}. Look at that process (py-spy dump --pid PID) and its machine; raise "
            "training.parallel.timeout if a step can take that long. Started by torchrun with "
            "--max-restarts, the training goes on from its last checkpoint."
        )


ONE = World()
_joined = ONE


def world() -> World:
    """The processes of the training that this one takes part in."""
    return _joined


def launched() -> int:
    """How many processes torchrun (or a like launcher) has started for this training; 0 without a
    launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "0"))


@contextmanager
def joined(count: int, device: torch.device, timeout: float) -> Iterator[World]:
    """Meets the other processes that the launcher has started, `count` in all, and leaves them at the end.

    Gloo on a CPU, NCCL on CUDA with gloo for agreements. The device is cuda:LOCAL_RANK. A process group that
    is there already is used, and stays.

    Raises: UserError if there are more processes on this machine than devices, or they cannot meet.
    """
    global _joined  # noqa: PLW0603 (a process is in one training at a time)
    if count == 1 or _joined is not ONE:
        yield _joined
        return
    own = not dist.is_initialized()
    level = log.parent.level if log.parent is not None else logging.NOTSET
    patience = timedelta(seconds=timeout)
    try:
        _meet(own, device, patience)
        # A new group does not take over the time-out of the first one: torch's own 30 minutes would hold.
        _joined = World(
            ranks=Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=patience)),
            control=dist.new_group(backend="gloo", timeout=patience),
            waiting=dist.new_group(backend="gloo", timeout=PATIENCE),
            saving=dist.new_group(backend="gloo", timeout=PATIENCE),
        )
        if not _joined.first:  # what all would say the first one says
            logging.getLogger("tutti").setLevel(logging.ERROR)
        yield _joined
    finally:
        _joined = ONE
        logging.getLogger("tutti").setLevel(level)
        if own and dist.is_initialized():
            dist.destroy_process_group()
            # The threads of a gloo group end with the last reference to it, and FSDP's modules hold each
            # other in circles. One that lets go of a tensor while Python shuts down would abort the process.
            gc.collect()


def _meet(own: bool, device: torch.device, timeout: timedelta) -> None:
    if device.type == "cuda":
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise UserError(
                f"this is process {place} (from 0) of this machine, but torch sees {there} CUDA devices. "
                f"Start at most {there} processes: torchrun --nproc-per-node {there} ..., or use "
                "training.device=cpu."
            )
        torch.cuda.set_device(place)
    if not own:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set but not {', '.join(missing)}: start the processes with torchrun "
            "--nproc-per-node N -m -- tutti train CONFIG, which sets them all."
        )
    try:
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        # torchrun without --standalone or --rdzv-backend keeps one store over restarts (torch 2.13), and in
        # it the addresses of processes that are gone: each attempt has a corner of its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own_store = PrefixStore(f"tutti/attempt_{attempt}", store)
        dist.init_process_group(backend, store=own_store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {launched()} processes of this training could not meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {error}. Check the address and that all of them were started."
        ) from error


def _is_timeout(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text
