"""May this checkpoint be continued under this configuration?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutti.nested import changed_keys, indented
from tutti.storage.checkpoint import Checkpoint, versions
from tutti.training.config import TrainingConfig
from tutti.training.device import Machine
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
    if (there := saved.state.get("machine", machine.kind)) != machine.kind:
        log.warning(
            "the checkpoint was computed on %s, the run goes on on %s: other bits", there, machine.kind
        )
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


def check_resumable(
    saved_config: Mapping[str, Any],
    new_config: Mapping[str, Any],
    sections: tuple[str, ...] = ("model", "data"),
) -> None:
    """Refuse to continue a run whose model or data section has changed.

    Raises: UserError naming each key that differs, with both values.
    """
    lines: list[str] = []
    for section in sections:
        lines += changed_keys(saved_config.get(section, {}), new_config.get(section, {}), section)
    if lines:
        raise UserError(
            f"This run was started with another {' or '.join(sections)} section, so it cannot be resumed "
            f"(saved -> now):\n{indented(lines)}\nRestore these values, or give the new run another name."
        )
