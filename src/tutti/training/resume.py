"""May this checkpoint be continued under this configuration?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutti.training.checkpoint import Checkpoint, check_resumable, versions
from tutti.training.config import TrainingConfig
from tutti.training.machine import Machine
from tutti.types import UserError

log = logging.getLogger("tutti.training")

FIXED = ("optimizer", "schedule", "gradients", "accumulation", "batch_ramp", "ema", "seed", "precision")
"""Keys of the training section that a resumed run may not change; the others only say how often and where."""


def check_settings(
    saved: Checkpoint, config: TrainingConfig, machine: Machine, run: Path, **sections: dict[str, Any]
) -> None:
    """Refuse changes that would make the rest another run; warn where only the schedule or last bits change.

    `sections` are whole sections of the config that must be as they were.

    Raises: UserError naming the key, the saved value and the present one.
    """
    old, new = present_keys(saved.state["training"]), config.model_dump(mode="json")
    check_resumable({"training": _fixed(old)}, {"training": _fixed(new)}, ("training",))
    check_resumable({name: saved.state.get(name, {}) for name in sections}, sections, tuple(sections))
    if saved.step > config.steps:
        raise UserError(
            f"training.steps is {config.steps}, but {run} is already at step {saved.step}. "
            "Raise training.steps, or give the new run another name."
        )
    if old["steps"] != new["steps"]:
        log.warning("training.steps was %d, now %d: the schedule changes", old["steps"], new["steps"])
    before = (saved.state["threads"], saved.state["versions"])
    if before != (machine.threads, versions()):
        log.warning("threads or versions differ from the checkpoint's: the last bits may differ too")


def present_keys(training: dict[str, Any]) -> dict[str, Any]:
    """A saved training section with the keys of today: those that it was saved without have their defaults.

    One that is not valid any more is given as it was.
    """
    try:
        return TrainingConfig.model_validate(training).model_dump(mode="json")
    except ValidationError:
        return training


def _fixed(training: dict[str, Any]) -> dict[str, Any]:
    return {name: training.get(name) for name in FIXED}
