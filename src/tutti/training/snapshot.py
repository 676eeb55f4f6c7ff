"""The whole state of a training as a checkpoint, and back: a resumed run goes on to the same bits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutti.training.checkpoint import Checkpoint, load_latest
from tutti.training.feed import TrainingData
from tutti.training.randomness import load_rng_state, rng_state
from tutti.training.resume import check_settings
from tutti.types import UserError

if TYPE_CHECKING:
    from tutti.training.trainer import Trainer

log = logging.getLogger("tutti.training")


def snapshot(trainer: Trainer, data: TrainingData) -> Checkpoint:
    """Everything that the rest of the run depends on."""
    tensors: dict[str, dict[str, Tensor]] = {
        "model": trainer.model.state_dict(),
        "objective": trainer.objective.state_dict(),
        **{name: average.shadow for name, average in trainer.averages.items()},
    }
    state = {
        "loader": data.train.state(),
        "samples": trainer.samples,
        "seconds": trainer.clock.seconds,
        "ema_updates": {name: average.updates for name, average in trainer.averages.items()},
        "meter": trainer.meter.state(),
        "diagnostics": trainer.diagnostics.state(),
        "metrics": trainer.latest,
        "training": trainer.config.model_dump(mode="json"),
        "strategy": trainer.strategy_config.model_dump(mode="json"),
        "backward": trainer.backward_config.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
    }
    return Checkpoint(
        step=trainer.step,
        tensors=tensors,
        optimizer={**trainer.optimizer.state_dict(), BACKWARD: trainer.backward.state_dict()},
        rng=rng_state(),
        state=state,
        extra=trainer.extra,
    )


def restore(trainer: Trainer, data: TrainingData) -> None:
    """Continues from the newest checkpoint of the trainer's run, if there is one.

    Raises: UserError if it is damaged, or of other settings, another model or another objective.
    """
    saved = load_latest(trainer.run)
    if saved is None:
        return
    check_settings(
        saved,
        trainer.config,
        trainer.machine,
        trainer.run,
        strategy=trainer.strategy_config.model_dump(mode="json"),
        backward=trainer.backward_config.model_dump(mode="json"),
    )
    modules = {"model": trainer.model, "objective": trainer.objective}
    try:
        for name, module in modules.items():
            module.load_state_dict(saved.tensors.get(name, {}))
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
    log.info("resuming after step %d of %d", trainer.step, trainer.config.steps)


BACKWARD = "backward"
"""Where the backward's state lies in a checkpoint's optimizer.pt."""
