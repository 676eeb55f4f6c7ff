"""May this checkpoint be continued under this configuration?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutti.storage.checkpoint import Checkpoint, versions
from tutti.storage.reading import shown
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


def differences(saved: Any, new: Any, key: str = "") -> list[str]:
    """The leaves in which two nested configs differ, as "model.vision.depth: saved 4, now 6"."""
    if isinstance(saved, Mapping) and isinstance(new, Mapping):
        names = [*saved, *(name for name in new if name not in saved)]
        lines: list[str] = []
        for name in names:
            path = f"{key}.{name}" if key else str(name)
            lines += differences(saved.get(name, "(absent)"), new.get(name, "(absent)"), path)
        return lines
    plain_saved = list(saved) if isinstance(saved, tuple) else saved
    plain_new = list(new) if isinstance(new, tuple) else new
    return [] if plain_saved == plain_new else [f"{key}: saved {_cut(plain_saved)}, now {_cut(plain_new)}"]


def _cut(value: Any) -> str:
    return shown(value if isinstance(value, dict) else repr(value)[:300], 300, quoted=False)


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
        lines += differences(saved_config.get(section, {}), new_config.get(section, {}), section)
    if lines:
        listed = "\n".join(f"  {line}" for line in lines[:10])
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise UserError(
            f"This run was started with another {' or '.join(sections)} section, so it cannot be resumed:\n"
            f"{listed}{more}\nRestore these values, or give the new run another name."
        )
