"""The whole state of a training as a checkpoint, and back: a resumed run goes on to the same bits."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutti.distributed.sharded_tensors import like_all
from tutti.storage.checkpoint import OPTIMIZER, Checkpoint, load
from tutti.storage.files import PARTIAL, require_writable
from tutti.storage.reading import shown
from tutti.training.checkpointing.fork import check_fork, source_of
from tutti.training.checkpointing.recovery import newest_whole
from tutti.training.checkpointing.resume import check_settings
from tutti.training.data_feed import TrainingData
from tutti.training.rng import load_rng_state, rng_state
from tutti.types import UserError

if TYPE_CHECKING:
    from tutti.training.trainer import Trainer

log = logging.getLogger("tutti.training")


def snapshot(trainer: Trainer, data: TrainingData) -> Checkpoint:
    """Everything that the rest of the run depends on, however many ranks hold it.

    All ranks must call it. Tensors are as `Saver.taken` gives them: of a whole checkpoint the first rank gets
    all and the others none, of a sharded one each gets its share.
    """
    modules = {"model": trainer.model, "objective": trainer.objective}
    moving = trainer.optimizer.averages  # they change again right after
    with trainer.optimizer.averaged():  # schedule-free: the weights that are served
        states = {name: module.state_dict() for name, module in modules.items()}
        tensors = trainer.saver.taken(states, copy=moving)
    averages = {name: average.shadow for name, average in trainer.averages.items()}
    optimizer = {**trainer.optimizer.state_dict(), BACKWARD: trainer.backward.state_dict()}
    state = {
        "loader": data.train.state_dict(),
        "samples": trainer.samples,
        "seconds": trainer.clock.seconds,
        "ema_updates": {name: average.updates for name, average in trainer.averages.items()},
        "meter": trainer.meter.state_dict(),
        "diagnostics": trainer.diagnostics.state_dict(),
        "policy": trainer.policy.state_dict(),
        "metrics": trainer.latest,
        "training": trainer.config.model_dump(mode="json"),
        "strategy": trainer.strategy_config.model_dump(mode="json"),
        "backward": trainer.backward_config.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        "machine": trainer.machine.kind,
    }
    return Checkpoint(
        step=trainer.step,
        tensors=tensors | trainer.saver.taken(averages),
        optimizer=trainer.saver.taken(optimizer),
        rng=rng_state(),
        state=deepcopy(state),
        extra=trainer.extra,
    )


def restore(trainer: Trainer, data: TrainingData) -> tuple[str, ...]:
    """Continues from the newest whole checkpoint of the trainer's run, if there is one. Gives the names of
    the damaged ones that were passed over.

    Raises: UserError if none is whole, or it is of other settings, another model or another objective; or
    if the next one could not be written, which is better known now than after the first hours.
    """
    folder, damaged = trainer.parallel.world.on_first(lambda: _newest(trainer.run))
    if folder is not None:
        with _of_another_form(folder):
            put_back(trainer, data, read(trainer, folder, verified=True))
    elif trainer.config.fork != "off":
        folder = source_of(trainer.config.fork, trainer.run)
        with _of_another_form(folder):
            source = read(trainer, folder)
            check_fork(source, trainer)
            load_into(trainer, data, source)
    return damaged


@contextmanager
def _of_another_form(folder: Path) -> Iterator[None]:
    """A state that lacks a key, or has a value of another type, leads anywhere: the error then says whose."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        said = shown(str(error), 300, quoted=False)
        raise UserError(
            f"{folder}: its state cannot be taken over ({type(error).__name__}: {said}). It is of another "
            "version of Tutti, or was changed: go on from another checkpoint, or train from the start."
        ) from error


def _newest(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest whole checkpoint, and the damaged ones; what a kill has left half-written goes."""
    require_writable(run / "checkpoints")
    for torn in (run / "checkpoints").glob(f"{PARTIAL}step-*"):
        shutil.rmtree(torn, ignore_errors=True)
    return newest_whole(run)


def read(trainer: Trainer, folder: Path, *, verified: bool = False) -> Checkpoint:
    """A checkpoint for this trainer: where the ranks share the weights, of a sharded one only this rank's.

    Raises: UserError if it is damaged.
    """
    forms = {
        f"{name}/{key}": value
        for name, module in (("model", trainer.model), ("objective", trainer.objective))
        for key, value in module.state_dict().items()
    }
    forms |= {
        f"{name}/{key}": value
        for name, average in trainer.averages.items()
        for key, value in average.shadow.items()
    }
    for name, optimizer in trainer.optimizer.optimizers.items():
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        forms |= {f"{OPTIMIZER}/{name}/state/{place}": one for place, one in enumerate(members)}
    return load(folder, forms, verified=verified)


def put_back(trainer: Trainer, data: TrainingData, saved: Checkpoint) -> None:
    """Continues from `saved`, to the same bits.

    Raises: UserError if it is of other settings, another model or another objective.
    """
    check_settings(
        saved,
        trainer.config,
        trainer.machine,
        trainer.run,
        strategy=trainer.strategy_config.model_dump(mode="json"),
        backward=trainer.backward_config.model_dump(mode="json"),
    )
    load_into(trainer, data, saved)


def load_into(trainer: Trainer, data: TrainingData, saved: Checkpoint) -> None:
    """Takes over the whole state, whatever the settings.

    Raises: UserError if it is of another model or another objective.
    """
    modules = {"model": trainer.model, "objective": trainer.objective}
    try:
        for name, module in modules.items():
            module.load_state_dict(like_all(saved.tensors.get(name, {}), module.state_dict()))
        for name, average in trainer.averages.items():
            average.load(saved.tensors.get(name, {}), saved.state["ema_updates"][name])
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"The checkpoint in {trainer.run} does not fit this model or objective: {str(error)[:600]}\n"
            "Resume with the same model and objective, or give the new run another name."
        ) from error
    optimizers = dict(saved.optimizer)
    trainer.backward.load_state_dict(optimizers.pop(BACKWARD, {}))
    trainer.optimizer.load_state_dict(optimizers)
    load_rng_state(saved.rng)
    data.train.load_state_dict(saved.state["loader"])
    trainer.step = saved.step
    trainer.samples = trainer.recorded = int(saved.state["samples"])
    trainer.clock.seconds, trainer.latest = float(saved.state["seconds"]), dict(saved.state["metrics"])
    trainer.meter.load_state_dict(saved.state["meter"])
    trainer.diagnostics.load_state_dict(saved.state.get("diagnostics", {}))
    trainer.policy.load_state_dict(saved.state.get("policy", {}))
    log.info("resuming after step %d of %d", trainer.step, trainer.config.steps)


BACKWARD = "backward"
"""Where the backward's state lies in a checkpoint's optimizer.pt."""
