"""A fork: a new run that starts from a checkpoint of another one and goes on with settings of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tutti.nested_dicts import changed_keys, indented
from tutti.storage.checkpoint import Checkpoint, checkpoints, folder_of, step_of
from tutti.storage.manifest import CONFIG, DATA_FILES
from tutti.storage.reading import parse_json, parse_yaml
from tutti.training.checkpointing.config import ForkConfig
from tutti.training.checkpointing.resume import RunSettings
from tutti.training.optim.schedules import ScheduleConfig
from tutti.training.records import read_records
from tutti.types import UserError

log = logging.getLogger("tutti.training")

FIXED = ("seed", "precision")
"""Keys of the training section that a fork may not change. Besides, the optimiser's kind and whether there is
a moving average must stay, since their state goes on."""
ELSEWHERE = ("sources", "workers", "prefetch")
"""Keys of the data section that may differ: where the data lie and how they are read. That they are the same
data is told by DATA_FILES and by the loader's own check."""
STEP = "optim/fork_step"


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
    return [int(record[STEP]) for record in read_records(run) if STEP in record]


def check_fork(saved: Checkpoint, settings: RunSettings) -> None:
    """Refuses to go on where weights, optimiser or data would not be the same; warns where the rate jumps.

    Raises: UserError naming each key that differs, with both values.
    """
    now = settings.to_dict()
    old, new = settings.with_present_keys(saved.state["training"]), now["training"]
    lines = _sections(saved.extra, settings.texts)
    lines += changed_keys({key: old[key] for key in FIXED}, {key: new[key] for key in FIXED}, "training")
    lines += changed_keys(old["optimizer"]["kind"], new["optimizer"]["kind"], "training.optimizer.kind")
    lines += changed_keys(saved.state["backward"], now["backward"], "backward")
    if (old["ema"] == "off") != (new["ema"] == "off"):
        lines += changed_keys(old["ema"], new["ema"], "training.ema")
    if lines:
        raise UserError(
            "training.fork: the checkpoint's state cannot go on under this configuration (saved -> now):\n"
            f"{indented(lines)}\n"
            "A fork may change schedule, steps, learning rates, lambdas, clipping and batch ramp. Restore "
            "these values, or start a new run without training.fork."
        )
    if saved.step >= new["steps"]:
        raise UserError(
            f"training.steps is {new['steps']}, but the fork begins at step {saved.step} of the other run, "
            "which count. Raise training.steps."
        )
    # Legal, but mostly an oversight: a cool-down is to begin at the rate that the other run had.
    before, after = (_factor(values, saved.step) for values in (old, new))
    if abs(before - after) > 0.05:
        log.warning(
            "fork: the schedule's factor jumps from %.3g to %.3g at step %d; to cool down from there, set "
            "training.schedule.kind=wsd training.schedule.decay_from=%d",
            before,
            after,
            saved.step,
            saved.step,
        )


def _factor(training: Mapping[str, Any], step: int) -> float:
    schedule: ScheduleConfig = TypeAdapter(ScheduleConfig).validate_python(training["schedule"])
    return schedule.factor(step, training["steps"])


def _sections(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Differences of model, data section and data specification, as far as both name them."""
    lines: list[str] = []
    for name in DATA_FILES:
        if name in saved and name in now:
            old, new = (parse_json(one[name], name) for one in (saved, now))
            lines += changed_keys(old, new, name.removesuffix(".json"))
    if CONFIG in saved and CONFIG in now:
        old, new = (_keys(parse_yaml(one[CONFIG], CONFIG)) for one in (saved, now))
        lines += changed_keys(old.get("model", {}), new.get("model", {}), "model")
        data = [{k: v for k, v in _keys(one.get("data")).items() if k not in ELSEWHERE} for one in (old, new)]
        lines += changed_keys(data[0], data[1], "data")
    return lines


def _keys(value: Any) -> dict[str, Any]:
    """A mapping; anything else has no keys."""
    return value if isinstance(value, dict) else {}
