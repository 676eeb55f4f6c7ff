"""Writes checkpoints in a background thread while the training goes on, and deletes the older ones."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from tutti.distributed.sharded_tensors import gather
from tutti.distributed.world import World
from tutti.storage.checkpoint import Checkpoint, checkpoints, folder_of, save, save_sharded, step_of
from tutti.storage.files import explain_disk_errors, remove_folder, sync, write_atomically
from tutti.storage.manifest import BEST_MARK
from tutti.training.checkpointing.config import SUCCESS, CheckpointsConfig, KeepBestConfig
from tutti.training.checkpointing.mirror import Mirror
from tutti.training.records import read_records
from tutti.types import UserError

log = logging.getLogger("tutti.training")

FAILED = 1000
"""The number by which a rank that could not write ends the step; larger than any signal's."""
GRACE = 60.0
"""Seconds that a failing training waits for the checkpoint that is being written."""


class Saver:
    """Writes the checkpoints of a run, and deletes those that need not stay.

    With `background` the training waits only until its state is copied to the CPU's memory; a thread writes
    the copy. At most one checkpoint is being written at a time: the next one waits for it. With `format:
    sharded` each rank writes the tensors that it holds. Either way a folder has its name when it is complete
    and on the disk, and not before.

    As a context manager around the training: what is still being written when it fails gets some seconds.
    """

    def __init__(self, run: Path, config: CheckpointsConfig, world: World, evaluate_every: int = 0) -> None:
        self.run = run
        self.world = world
        self.config, self.evaluate_every = config, evaluate_every
        self.sharded = config.format == "sharded"
        self.background = config.background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._stager: DefaultStager | None = None
        self._mirror = Mirror(config.mirror, run) if config.mirror != "off" and world.first else None

    @property
    def failed(self) -> int:
        """FAILED if the last checkpoint could not be written, 0 as far as is known."""
        return FAILED if self._error is not None else 0

    def collect(self, value: Any, *, copy: bool = False) -> Any:
        """Nested tensors in the form that a checkpoint writes: whole on rank 0 and None on the others, or
        this rank's shards. Copies in the CPU's memory where a thread writes them later, or `copy` asks."""
        copy = copy or self.background
        if not self.sharded:
            return gather(value, keep=self.world.first, copy=copy)
        return self._copy_to_cpu(value) if copy else value

    def save(self, checkpoint: Checkpoint, *, wait: bool = False) -> Path:
        """Writes the checkpoint, or begins to unless it is to `wait`. All ranks must call it, behind `wait`,
        which must come before the checkpoint is taken. Gives the folder that it will have.

        Raises: UserError on all ranks if it cannot be written.
        """
        self.world.max(0)  # all are here: from now on they wait for each other without a time-out
        if self.background:
            if self.sharded or self.world.first:
                device = torch.cuda.current_device() if torch.cuda.is_available() else None
                self._thread = threading.Thread(
                    target=self._try, args=(checkpoint, device), name="tutti-checkpoint", daemon=True
                )
                self._thread.start()
        elif self.sharded:
            self._write(checkpoint)
        else:
            self.world.on_rank_zero(lambda: self._write(checkpoint))
        if wait:
            self.wait()
        return folder_of(self.run, checkpoint.step)

    def wait(self) -> None:
        """Until nothing is being written. All ranks must call it.

        Raises: UserError on all ranks if what was being written could not be.
        """
        self.world.max(0)  # as above: who hangs is named
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if self.background:
            messages = [text for text in self.world.patient.all_gather(str(error) if error else "") if text]
            if messages and error is None:
                raise UserError(messages[0])
        if error is not None:
            raise error

    def _try(self, checkpoint: Checkpoint, device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread begins with the first one
            self._write(checkpoint)
        except Exception as error:
            self._error = error
            log.error("the checkpoint after step %d could not be written", checkpoint.step)  # why comes later

    def _write(self, checkpoint: Checkpoint) -> None:
        if self.sharded:
            # A process group of its own: in a thread these calls must not mix with those of the training.
            # Where rank 0 fails, the others get its error.
            world = self.world.for_checkpoint_thread
            world.on_rank_zero(self._sync_records)
            save_sharded(self.run, checkpoint, world)
            world.on_rank_zero(self.retain)
        else:
            self._sync_records()
            save(self.run, checkpoint)
            self.retain()
        if self._mirror is not None:
            self._mirror.send(folder_of(self.run, checkpoint.step))

    def retain(self) -> None:
        """`retain` of this run, as after each checkpoint. What is being copied stays until the next one."""
        retain(self.run, self.config, self.evaluate_every, self._mirror.held if self._mirror else ())

    def _sync_records(self) -> None:
        """Before a checkpoint counts, the records up to it are on the disk: the run goes on behind them."""
        path = self.run / "records.jsonl"
        with explain_disk_errors(path):
            if path.exists():
                sync(path)

    def _copy_to_cpu(self, value: Any) -> Any:
        """Shards and tensors of a GPU go into page-locked memory, which is kept for the next checkpoint; on a
        CPU the copy lives only until it is written."""
        cuda = torch.cuda.is_available()
        if self._stager is None:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=cuda,
                )
            )
        staged = self._stager.stage(value)
        if not cuda:
            self._stager.close()  # it holds the copies otherwise
            self._stager = None
        return staged

    def __enter__(self) -> Self:
        # The copy of what is there may have been cut short, by a kill or by the store.
        if self._mirror is not None and (there := checkpoints(self.run)):
            self._mirror.send(there[-1])
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # Ctrl-C and SIGTERM (no Exception) have saved already, or are to end the process at once.
        if self._thread is not None and isinstance(error, Exception):
            self._thread.join(GRACE)
        self._thread, self._error = None, None
        if self._mirror is not None:
            self._mirror.close()


def retain(run: Path, config: CheckpointsConfig, evaluate_every: int = 0, held: Iterable[Path] = ()) -> None:
    """Marks the best checkpoint in best.json, then deletes all but the newest `keep`, those whose step is a
    multiple of `keep_every` (0: none), the best and those that are `held`.

    A checkpoint is judged by what a validation or an evaluation recorded at its own step, so one without is
    no candidate; of equals the earliest is the best. Killed at any moment it leaves whole checkpoints, and
    the next call ends what this one began.

    Raises: UserError if best.json cannot be written, or a checkpoint not be deleted.
    """
    folders = checkpoints(run)
    retained = {*folders[-config.keep :], *held}
    if config.keep_every:
        retained |= {folder for folder in folders if step_of(folder) % config.keep_every == 0}
    best = config.best(evaluate_every)
    if best is not None and (step := _mark_best(run, folders, best)) is not None:
        retained.add(folder_of(run, step))
    # The best is marked before anything goes: a kill in between leaves a checkpoint too many, never too few.
    for folder in folders:
        if folder not in retained:
            remove_folder(folder)


def _mark_best(run: Path, folders: list[Path], best: KeepBestConfig) -> int | None:
    """Writes best.json if it changes. Gives the step of the best; None while no checkpoint has a value."""
    kind = "evaluation" if best.metric.startswith(SUCCESS) else "validation"
    validations = {record["step"]: record for record in read_records(run) if record["kind"] == kind}
    sign = 1 if best.mode == "min" else -1
    values = {
        step: sign * validations[step].get(best.metric, math.nan)
        for step in map(step_of, folders)
        if step in validations
    }
    if folders and best.metric not in validations.get(step_of(folders[-1]), {best.metric: 0}):
        log.warning("keep_best: the %s after step %d has no '%s'", kind, step_of(folders[-1]), best.metric)
    # min() of (value, step): of equal values the earliest step, so that a resumed run marks the same one.
    finite = [(value, step) for step, value in values.items() if math.isfinite(value)]
    if not finite:
        return None
    value, step = min(finite)
    marked = {"step": step, "metric": best.metric, "mode": best.mode, "value": sign * value}
    path, text = run / "checkpoints" / BEST_MARK, json.dumps(marked, indent=1) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return step
