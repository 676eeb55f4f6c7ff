"""Deletes old checkpoints, except the newest, every so many steps, and the best by a validation metric."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from tutti.storage.checkpoint import checkpoints, folder_of, step_of
from tutti.storage.files import remove_folder, write_atomically
from tutti.storage.manifest import BEST_MARK
from tutti.training.checkpointing.config import CheckpointsConfig, KeepBestConfig
from tutti.training.records import read_records

log = logging.getLogger("tutti.training")


def retain(run: Path, config: CheckpointsConfig) -> None:
    """Marks the best checkpoint in best.json, then deletes all but the newest `keep`, those whose step is a
    multiple of `keep_every` (0: none) and the best.

    A checkpoint is judged by what a validation recorded at its own step, so one that was not validated is no
    candidate; of equals the earliest is the best. Killed at any moment it leaves whole checkpoints, and the
    next call ends what this one began.

    Raises: UserError if best.json cannot be written, or a checkpoint not be deleted.
    """
    folders = checkpoints(run)
    retained = set(folders[-config.keep :])
    if config.keep_every:
        retained |= {folder for folder in folders if step_of(folder) % config.keep_every == 0}
    if config.keep_best != "off" and (step := _mark_best(run, folders, config.keep_best)) is not None:
        retained.add(folder_of(run, step))
    # The best is marked before anything goes: a kill in between leaves a checkpoint too many, never too few.
    for folder in folders:
        if folder not in retained:
            remove_folder(folder)


def _mark_best(run: Path, folders: list[Path], best: KeepBestConfig) -> int | None:
    """Writes best.json if it changes. Gives the step of the best; None while no checkpoint has a value."""
    validations = {record["step"]: record for record in read_records(run) if record["kind"] == "validation"}
    sign = 1 if best.mode == "min" else -1
    values = {
        step: sign * validations[step].get(best.metric, math.nan)
        for step in map(step_of, folders)
        if step in validations
    }
    if folders and best.metric not in validations.get(step_of(folders[-1]), {best.metric: 0}):
        log.warning("keep_best: the validation after step %d has no '%s'", step_of(folders[-1]), best.metric)
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
