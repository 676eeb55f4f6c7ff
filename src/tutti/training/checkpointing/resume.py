"""What may change where a run is resumed, and where a fork goes on from another run's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from tutti.distributed.world import World, launched_world_size
from tutti.key_effects import ANOTHER_RESULT, EFFECTS, of_effect
from tutti.nested_dicts import changed_keys, indented
from tutti.storage.checkpoint import Checkpoint, versions
from tutti.storage.manifest import CONFIG
from tutti.storage.reading import parse_yaml
from tutti.trackers import LoggerConfig
from tutti.training.checkpointing.data_files import data_differences
from tutti.training.device import Machine
from tutti.training.optim.schedules import ScheduleConfig
from tutti.training.records import MetricsWriter
from tutti.types import UserError

log = logging.getLogger("tutti.training")

SECTIONS = ("training", "strategy", "backward")
"""Sections of the config that a checkpoint keeps."""
FORK_FIXED = ("seed", "precision")
MORE = ("steps", "fork", "validation")
"""Another number of steps, or of looks at held-out data: the training up to here stays what it was."""
TRAINING = "training."
RESUME_FIXED = tuple(
    key.removeprefix(TRAINING)
    for key in ANOTHER_RESULT
    if key.startswith(TRAINING) and key.removeprefix(TRAINING) not in MORE
)
"""Keys of the training section that a resumed run may not change; the others only say how often and where. A
fork may change all but FORK_FIXED; besides, the optimiser's kind and whether there is
a moving average must stay, since their state goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Where and with what a run trains. `texts` are files for its checkpoints, by name; `loggers` are told
    its records."""

    run: Path
    training: BaseModel
    strategy: BaseModel
    backward: BaseModel
    machine: Machine
    texts: Mapping[str, str]
    loggers: Sequence[LoggerConfig] = ()

    def records(self, step: int, rollbacks: Sequence[object], world: World) -> MetricsWriter:
        """The records of the run, opened behind those of `step`; rank 0 writes them."""
        return MetricsWriter(
            self.run,
            step,
            rollbacks=len(rollbacks),
            silent=not world.first,
            loggers=self.loggers,
            texts=self.texts,
        )

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint's state.json keeps it, plain values."""
        return {
            **{name: getattr(self, name).model_dump(mode="json") for name in SECTIONS},
            **self.circumstances(),
        }

    def circumstances(self) -> dict[str, Any]:
        """What decides the last bits beside the config."""
        return {
            "threads": self.machine.threads,
            "machine": self.machine.kind,
            "processor": self.machine.processor,
            "processes": max(1, launched_world_size()),
        }

    def with_present_keys(self, saved: Any, section: str = "training") -> Any:
        """A saved section with the keys of today: those that it was saved without have their defaults. One
        that is not valid any more, or of another kind, is given as it was."""
        try:
            return type(getattr(self, section)).model_validate(saved).model_dump(mode="json")
        except ValidationError:
            return saved


def check_settings(saved: Checkpoint, settings: RunSettings) -> None:
    """Refuses changes that would make the rest another run; warns of those of the schedule or the last bits.

    Raises: UserError naming what differs, the saved value and the present one.
    """
    new = settings.to_dict()
    old = {**saved.state}
    old |= {name: settings.with_present_keys(old[name], name) for name in ("training", "strategy")}
    check_resumable({"training": _fixed(old["training"])}, {"training": _fixed(new["training"])}, "training")
    check_resumable(old, new, "strategy", "backward")
    if lines := data_differences(saved.extra, settings.texts):
        raise UserError(
            "The data give other sizes, statistics or texts than this run was trained with (saved -> now):\n"
            f"{indented(lines)}\nPut the former data back, and the version of Tutti that read them; or train "
            "anew (--redo, or another name=...)."
        )
    if lines := _other_towers(saved.extra, settings.texts):
        raise UserError(
            "A pre-trained tower is not the one that this run was trained with (saved -> now):\n"
            f"{indented(lines)}\nPut the former files back, or give the new run another name."
        )
    # `steps` may change: a run that is made longer is the usual reason to resume one that has ended.
    steps_before, steps = old["training"]["steps"], new["training"]["steps"]
    if saved.step > steps:
        raise UserError(
            f"training.steps is {steps}, but {settings.run} is already at step {saved.step}. "
            "Raise training.steps, or give the new run another name."
        )
    if steps_before != steps:
        log.warning("training.steps was %d, now %d: the schedule changes", steps_before, steps)
    now = {**settings.circumstances(), **versions()}
    was = {**now, **saved.state["versions"], **{key: old[key] for key in now if key in old}}
    lines = changed_keys(was, now)
    keys = changed_keys(old["training"], new["training"], "training")
    lines += [line for line in of_effect(keys, "last bits") if not line.startswith("training.threads:")]
    if lines:
        log.warning("the last bits may differ from a training without a break: %s", "; ".join(lines))


def _fixed(training: Any) -> dict[str, Any]:
    return {name: training.get(name) for name in RESUME_FIXED}


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


def check_fork(saved: Checkpoint, settings: RunSettings) -> None:
    """Refuses to go on where weights, optimiser or data would not be the same; warns where the rate jumps.

    Raises: UserError naming each key that differs, with both values.
    """
    now = settings.to_dict()
    old, new = settings.with_present_keys(saved.state["training"]), now["training"]
    lines = _sections(saved.extra, settings.texts)
    lines += changed_keys(*({key: one[key] for key in FORK_FIXED} for one in (old, new)), key="training")
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
    """Differences of model, data section and data files, as far as both name them."""
    lines = data_differences(saved, now)
    if CONFIG in saved and CONFIG in now:
        old, new = (_keys(parse_yaml(one[CONFIG], CONFIG)) for one in (saved, now))
        model = changed_keys(old.get("model", {}), new.get("model", {}), "model")
        lines += of_effect(model, "another result")
        # That the sources are the same data is told by the data files and by the loader's own check.
        data = [
            {key: value for key, value in _keys(one.get("data")).items() if not _only_where(key)}
            for one in (old, new)
        ]
        lines += changed_keys(data[0], data[1], "data")
    return lines


def _other_towers(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Differences of weights, architectures and colours of pre-trained towers, wherever their folders lie."""
    if CONFIG not in saved or CONFIG not in now:
        return []
    old, new = (_keys(_keys(parse_yaml(one[CONFIG], CONFIG)).get("model")) for one in (saved, now))
    named = ("sha256", "architecture", "mean", "std")
    keys = [(socket, key) for socket in ("vlm", "vision", "language") for key in named]
    lines: list[str] = []
    for socket, key in keys:
        before, after = (_keys(one.get(socket)).get(key, "") for one in (old, new))
        lines += changed_keys(before, after, f"model.{socket}.{key}")
    return lines


def _only_where(key: str) -> bool:
    """Whether a key of the data section only says where the data lie or how they are read."""
    return key == "sources" or EFFECTS.get(f"data.{key}") == "none"


def _keys(value: Any) -> dict[str, Any]:
    """A mapping; anything else has no keys."""
    return value if isinstance(value, dict) else {}
