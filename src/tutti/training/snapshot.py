"""The whole state of a training as a checkpoint, and back: a resumed run goes on to the same bits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutti.training.checkpoint import Checkpoint, folder_of, load, require_writable
from tutti.training.feed import TrainingData
from tutti.training.fork import check_fork, read_source
from tutti.training.randomness import load_rng_state, rng_state
from tutti.training.recovery import newest_whole
from tutti.training.resume import check_settings
from tutti.training.whole import like_all, whole
from tutti.types import UserError

if TYPE_CHECKING:
    from tutti.training.trainer import Trainer

log = logging.getLogger("tutti.training")


def snapshot(trainer: Trainer, data: TrainingData) -> Checkpoint:
    """Everything that the rest of the run depends on, however many ranks hold it.

    All ranks must call it. Where they share the weights the first one gets the whole of them, the others
    None.
    """
    first = trainer.parallel.world.first
    modules = {"model": trainer.model, "objective": trainer.objective}
    with trainer.optimizer.averaged():  # schedule-free: the weights that are served
        tensors: dict[str, dict[str, Tensor]] = {
            name: _kept(module.state_dict(), copied=trainer.optimizer.averages)
            for name, module in modules.items()
        }
    tensors |= {name: average.shadow for name, average in trainer.averages.items()}
    state = {
        "loader": data.train.state(),
        "samples": trainer.samples,
        "seconds": trainer.clock.seconds,
        "ema_updates": {name: average.updates for name, average in trainer.averages.items()},
        "meter": trainer.meter.state(),
        "diagnostics": trainer.diagnostics.state(),
        "policy": trainer.policy.state(),
        "metrics": trainer.latest,
        "training": trainer.config.model_dump(mode="json"),
        "strategy": trainer.strategy_config.model_dump(mode="json"),
        "backward": trainer.backward_config.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
    }
    return Checkpoint(
        step=trainer.step,
        tensors=whole(tensors, keep=first),
        optimizer=whole(
            {**trainer.optimizer.state_dict(), BACKWARD: trainer.backward.state_dict()}, keep=first
        ),
        rng=rng_state(),
        state=state,
        extra=trainer.extra,
    )


def restore(trainer: Trainer, data: TrainingData) -> tuple[str, ...]:
    """Continues from the newest whole checkpoint of the trainer's run, if there is one. Gives the names of
    the damaged ones that were passed over.

    Raises: UserError if none is whole, or it is of other settings, another model or another objective; or
    if the next one could not be written, which is better known now than after the first hours.
    """
    saved, damaged = _newest(trainer)
    if saved is not None:
        put_back(trainer, data, saved)
    elif trainer.config.fork != "off":
        source = read_source(trainer.config.fork, trainer.run)
        check_fork(source, trainer)
        load_into(trainer, data, source)
    return damaged


def _newest(trainer: Trainer) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest whole checkpoint and the names of the damaged ones. The first rank looks for it and sets
    those aside, the others read what it has found."""
    found: list[Checkpoint | None] = []

    def look() -> tuple[int | None, tuple[str, ...]]:
        require_writable(trainer.run / "checkpoints")
        saved, damaged = newest_whole(trainer.run)
        found.append(saved)
        return (None if saved is None else saved.step), damaged

    step, damaged = trainer.parallel.world.on_first(look)
    if not found:
        found.append(None if step is None else load(folder_of(trainer.run, step)))
    return found[0], damaged


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
    data.train.load_state(saved.state["loader"])
    trainer.step = saved.step
    trainer.samples = trainer.recorded = saved.state["samples"]
    trainer.clock.seconds, trainer.latest = saved.state["seconds"], saved.state["metrics"]
    trainer.meter.load_state(saved.state["meter"])
    trainer.diagnostics.load_state(saved.state.get("diagnostics", {}))
    trainer.policy.load_state(saved.state.get("policy", {}))
    log.info("resuming after step %d of %d", trainer.step, trainer.config.steps)


def _kept(tensors: dict[str, Tensor], *, copied: bool) -> dict[str, Tensor]:
    """The tensors, or copies of them where they are about to change again."""
    return {name: value.detach().clone() for name, value in tensors.items()} if copied else tensors


BACKWARD = "backward"
"""Where the backward's state lies in a checkpoint's optimizer.pt."""
