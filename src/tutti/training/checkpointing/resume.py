"""Checks that a run may be resumed: the configuration must be that of its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tutti.nested_dicts import changed_keys, indented
from tutti.storage.checkpoint import Checkpoint, versions
from tutti.training.device import Machine
from tutti.types import UserError

log = logging.getLogger("tutti.training")

SECTIONS = ("training", "strategy", "backward")
"""Sections of the config that a checkpoint keeps."""
FIXED = ("optimizer", "schedule", "gradients", "accumulation", "batch_ramp", "ema", "seed", "precision")
"""Keys of the training section that a resumed run may not change; the others only say how often and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Where and with what a run trains. `texts` are files for its checkpoints, by name."""

    run: Path
    training: BaseModel
    strategy: BaseModel
    backward: BaseModel
    machine: Machine
    texts: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint's state.json keeps it, plain values."""
        return {
            **{name: getattr(self, name).model_dump(mode="json") for name in SECTIONS},
            "threads": self.machine.threads,
            "machine": self.machine.kind,
        }

    def with_present_keys(self, training: dict[str, Any]) -> dict[str, Any]:
        """A saved training section with the keys of today: those that it was saved without have their
        defaults. One that is not valid any more is given as it was."""
        try:
            return type(self.training).model_validate(training).model_dump(mode="json")
        except ValidationError:
            return training


def check_settings(saved: Checkpoint, settings: RunSettings) -> None:
    """Refuses changes that would make the rest another run; warns of those of the schedule or the last bits.

    Raises: UserError naming the key, the saved value and the present one.
    """
    new = settings.to_dict()
    old = {**saved.state, "training": settings.with_present_keys(saved.state["training"])}
    check_resumable({"training": _fixed(old["training"])}, {"training": _fixed(new["training"])}, "training")
    check_resumable(old, new, "strategy", "backward")
    # `steps` may change: a run that is made longer is the usual reason to resume one that has ended.
    steps_before, steps = old["training"]["steps"], new["training"]["steps"]
    if saved.step > steps:
        raise UserError(
            f"training.steps is {steps}, but {settings.run} is already at step {saved.step}. "
            "Raise training.steps, or give the new run another name."
        )
    if steps_before != steps:
        log.warning("training.steps was %d, now %d: the schedule changes", steps_before, steps)
    if (before := old.get("machine", new["machine"])) != new["machine"]:
        log.warning(
            "the checkpoint was computed on %s, the run goes on on %s: other bits", before, new["machine"]
        )
    if (old["threads"], old["versions"]) != (new["threads"], versions()):
        log.warning("threads or versions differ from the checkpoint's: the last bits may differ too")


def _fixed(training: dict[str, Any]) -> dict[str, Any]:
    return {name: training.get(name) for name in FIXED}


def check_resumable(saved: Mapping[str, Any], new: Mapping[str, Any], *sections: str) -> None:
    """Refuses to continue a run of which one of these sections of the config has changed.

    Raises: UserError naming each key that differs, with both values.
    """
    lines = [
        line
        for section in sections
        for line in changed_keys(saved.get(section, {}), new.get(section, {}), section)
    ]
    if lines:
        raise UserError(
            f"This run was started with another {' or '.join(sections)} section, so it cannot be resumed "
            f"(saved -> now):\n{indented(lines)}\nRestore these values, or give the new run another name."
        )
