"""Where a run goes on: at its newest undamaged checkpoint, at the one it is forked off, or at step 0."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tutti.distributed.world import World
from tutti.storage.checkpoint import checkpoints, folder_of, load, step_of, verify
from tutti.storage.files import PARTIAL, explain_disk_errors, require_writable
from tutti.storage.reading import shown
from tutti.training.checkpointing.config import ForkConfig
from tutti.training.checkpointing.resume import RunSettings, check_fork, check_settings
from tutti.training.records import read_records
from tutti.training.state import TrainState
from tutti.types import UserError

log = logging.getLogger("tutti.training")

DAMAGED = "damaged-"
FORK_STEP = "optim/fork_step"


def restore(
    state: TrainState, settings: RunSettings, fork: ForkConfig | Literal["off"], world: World
) -> dict[str, float]:
    """Continues from the newest whole checkpoint of the run, if there is one, else from that of `fork`.

    Gives what is to be recorded of it: that the run is a fork, or that damaged checkpoints were passed over.

    Raises: UserError if none is whole, or it is of other settings, another model or another objective; or
    if the next one could not be written, which is better known now than after the first hours.
    """
    own, damaged = world.on_rank_zero(lambda: _newest(settings.run))
    # A fork that has a checkpoint of its own is a run like any other.
    source = source_of(fork, settings.run) if own is None and fork != "off" else own
    if source is None:
        return {}
    with _explain_other_form(source):
        saved = load(source, state.layouts(), verified=source is own)
        (check_fork if own is None else check_settings)(saved, settings)
        state.load(saved)
    log.info("resuming after step %d, from %s", saved.step, source)
    if own is None and not begun_at(settings.run):
        return {FORK_STEP: float(saved.step)}
    return {"fault/damaged_checkpoints": float(len(damaged))} if damaged else {}


def source_of(fork: ForkConfig, run: Path) -> Path:
    """The folder of the checkpoint that `run` is forked off. A fork that has begun before keeps to the step
    that it found.

    Raises: UserError if there is no such checkpoint; the other run is never changed.
    """
    source = Path(fork.run)
    steps = [step_of(folder) for folder in checkpoints(source)]
    if not steps:
        raise UserError(f"training.fork.run: there is no checkpoint of a run in {source}.")
    begun = begun_at(run)
    step = begun[0] if begun else max(steps) if fork.step == "latest" else fork.step
    if step not in steps:
        raise UserError(
            f"training.fork.step: {source} has no checkpoint of step {step}; it has those of "
            f"{', '.join(map(str, steps))}. Name one of them, or let a run keep more of them "
            "(training.checkpoints.keep, training.checkpoints.keep_every)."
        )
    return folder_of(source, step)


def begun_at(run: Path) -> list[int]:
    """The step of the other run that `run` has begun at, by its records; none if it has not begun."""
    return [int(record[FORK_STEP]) for record in read_records(run) if FORK_STEP in record]


@contextmanager
def _explain_other_form(folder: Path) -> Iterator[None]:
    """Names the folder in an error about a state that lacks a key, or has a value of another type."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = shown(str(error), 300, quoted=False)
        raise UserError(
            f"{folder}: its state cannot be taken over ({type(error).__name__}: {reason}). It is of another "
            "version of Tutti, or was changed: go on from another checkpoint, or train from the start."
        ) from error


def _newest(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest whole checkpoint, and the damaged ones; what a kill has left half-written goes."""
    require_writable(run / "checkpoints")
    # Only rank 0 comes here, and no other process writes into this run: what is half-written is a kill's.
    for torn in (run / "checkpoints").glob(f"{PARTIAL}step-*"):
        shutil.rmtree(torn, ignore_errors=True)
    return newest_whole(run)


def newest_whole(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The folder of a run's newest checkpoint that is whole, and the names of the damaged ones after it.

    Those are renamed to `damaged-step-N`, never deleted, once an older one has proved to be whole. (None, ())
    for a run without checkpoints.

    Raises: UserError if there are checkpoints and none is whole; then nothing is renamed, for a run that
    began anew by itself would hide the loss.
    """
    wrong: list[tuple[Path, UserError]] = []
    for folder in reversed(checkpoints(run)):
        try:
            verify(folder)
        except UserError as error:
            wrong.append((folder, error))
            continue
        # Renamed only now: while no older one is known to be whole, the damaged ones are all that there is.
        for bad, error in wrong:
            aside = _set_aside(bad)
            first = str(error).splitlines()[0].split(" Delete the folder", maxsplit=1)[0]
            log.warning(
                "checkpoint %s is damaged (%s): renamed to %s, going on from %s instead",
                bad.name,
                first,
                aside.name,
                folder.name,
            )
        return folder, tuple(bad.name for bad, _ in wrong)
    if wrong:
        listed = "\n".join(f"  {str(error).splitlines()[0]}" for _, error in wrong)
        raise UserError(
            f"{run}: none of the {len(wrong)} checkpoints is whole, so the run cannot go on:\n{listed}\n"
            "Restore one of them from a copy, or delete the folder checkpoints to train from the start."
        )
    return None, ()


def _set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint; a number is added where an older wreck has the name already."""
    aside = folder.with_name(DAMAGED + folder.name)
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}-{number}")
    with explain_disk_errors(folder):
        os.replace(folder, aside)
    return aside
