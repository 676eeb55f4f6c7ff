"""The cells of a study: one run for each arm, level and seed, with its config, its folder and its result."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from tutti.config.overrides import apply_overrides, combine_overrides, parse_overrides
from tutti.config.run_config import RunConfig, build_config
from tutti.data.sources import SourceConfig, open_parts, stores_of
from tutti.evaluation.config import NO_SUITE, ControlsConfig
from tutti.key_effects import with_effect
from tutti.nested_dicts import content_hash, merge
from tutti.runs.build import TRAIN_SECTIONS
from tutti.storage.reading import read_json, read_valid
from tutti.studies.config import Level, StudyConfig
from tutti.training.strategy import Strategy
from tutti.types import UserError

CELLS = "cells"
RESULT = "result.json"
HASH = 10
CHECKPOINT_EVERY = 200
SHARED = Path("data_from")
"""In `data.sources` of an arm, or of a study's overrides: the data set that all arms share."""
DECIDED_BY = {
    "name": "name",
    "seed": "seeds",
    "data.seed": "seeds",
    "training.seed": "seeds",
    "training.steps": "budget.steps",
    "data.episodes_per_task": "episodes_per_task",
}
"""Keys of a run that no arm may change, each with the key of the study that sets it."""
SAME_EVALUATION = ("suite", "tasks", "episodes", "first_seed", "split", "max_decisions")
"""Keys of `evaluation` in which all arms must agree: pairs need the same starts and limits."""
NO_CONTROLS = {name: 0 for name, field in ControlsConfig.model_fields.items() if field.annotation is int}
"""`evaluation.controls` with every count at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The result of a finished cell: `successes[task]` holds 0 or 1 for each of `starts[task]`.

    `seconds` are those of the training's steps, `samples` its windows. `held_out` has each term's value on
    held-out episodes when it last counted, `open_loop` the error of the executed actions there (normalised
    units; None without such episodes). `milliseconds` is a prediction's, batch 1, one thread. `blind`: it
    never saw a picture. `measures`: what was measured beside success (docs/how-to/studies.md).
    """

    arm: str
    level: int | str
    seed: int
    steps: int
    samples: int
    seconds: float
    parameters: int
    milliseconds: float
    held_out: dict[str, float]
    open_loop: float | None
    successes: dict[str, list[int]]
    starts: dict[str, list[int]]
    protocol: dict[str, Any]
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, Any]
    identity: str
    blind: bool = False
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def bits(self) -> list[list[int]]:
        """The successes, task by task."""
        return list(self.successes.values())

    @property
    def mean(self) -> float:
        """The mean of the tasks' rates."""
        return float(np.mean([np.mean(bits) for bits in self.bits]))


RESULTS = TypeAdapter(Trained)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of the study.

    `identity` is a hash of its evaluation config; the folder's name has a hash of its training config, so a
    changed evaluation runs again without a new training.
    """

    arm: str
    level: Level
    seed: int
    steps: int
    folder: Path
    identity: str

    @property
    def name(self) -> str:
        """As in "action_only, 10 demonstrations, seed 2"."""
        return f"{self.arm}{level_words(self.level, '')}, seed {self.seed}"

    def result(self) -> Trained | None:
        """The content of result.json; None if the cell is not finished, or its evaluation has changed.

        Raises: UserError if result.json is of another version of Tutti.
        """
        path, cure = self.folder / RESULT, "Delete it, and run the study again."
        try:
            if read_json(path).get("identity") != self.identity:
                return None
        except UserError:  # missing, torn, or none of ours
            return None
        result = read_valid(path, RESULTS.validate_python, cure)
        bits, starts = result.successes, result.starts
        if (
            bits.keys() != starts.keys()
            or not bits
            or any(not one or len(one) != len(starts[task]) or {*one} - {0, 1} for task, one in bits.items())
        ):
            raise UserError(f"{path}: expected a success of 0 or 1 for each start of each task. {cure}")
        return result


def level_words(level: Level, per: str = " a task") -> str:
    """As a title's end: ", 10 demonstrations a task"; nothing where a study has no levels."""
    if level == "base":
        return ""
    return ", all demonstrations" if level == "all" else f", {level} demonstrations{per}"


def cell_name(arm: str, level: Level, seed: int) -> str:
    """The beginning of the name of a cell's folder, and the name of its run."""
    words = {"all": "-all", "base": ""}
    return f"{arm}{words.get(str(level), f'-{level}demos')}-seed{seed}"


def plan_cells(
    study: StudyConfig,
    steps: Mapping[str, int],
    sources: tuple[SourceConfig, ...],
    fingerprint: str,
    folder: Path,
) -> dict[Cell, RunConfig]:
    """Every cell with its config, seed by seed: the first finished ones already compare every arm.

    Raises: UserError that names the arm and the key.
    """
    planned: dict[Cell, RunConfig] = {}
    for seed in study.seed_list:
        for level in study.levels:
            for arm in study.arms:
                config = cell_config(study, arm, level=level, seed=seed, steps=steps[arm], sources=sources)
                name = f"{cell_name(arm, level, seed)}-{training_hash(config, fingerprint)}"
                cell = Cell(
                    arm=arm,
                    level=level,
                    seed=seed,
                    steps=steps[arm],
                    folder=folder / CELLS / name,
                    identity=content_hash(with_effect(config.sections("evaluation")), HASH),
                )
                planned[cell] = config
    return planned


def data_fingerprint(sources: Sequence[SourceConfig]) -> str:
    """A hash of the contents of the data sets. Raises: UserError if one cannot be opened."""
    contents = json.dumps([store.fingerprint for store in stores_of(open_parts(sources))])
    return hashlib.sha256(contents.encode()).hexdigest()[:16]


def training_hash(config: RunConfig, fingerprint: str) -> str:
    """A hash of all that a training depends on; of the data by their content, not by their path."""
    sections = with_effect(config.sections("seed", "record", *TRAIN_SECTIONS))
    return content_hash(by_content(sections, config, fingerprint), HASH)


def by_content(sections: dict[str, Any], config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """The sections with the data's fingerprint for their path, and with what is used of them."""
    sources = config.data.sources
    parts = [
        source.model_dump(mode="json", exclude_defaults=True) | {"path": fingerprint} for source in sources
    ]
    plain = all(part.keys() == {"path"} for part in parts)
    sections["data"]["sources"] = fingerprint if plain else parts
    return sections


def tried(training: dict[str, Any], *, validate: int, save: int = CHECKPOINT_EVERY) -> dict[str, Any]:
    """The section `training` of what a search tries: on one thread, and judged by the search alone."""
    return training | {
        **{"threads": 1, "validation": {"every": validate}, "diagnostics": {"every": 0}, "evaluate_every": 0},
        "checkpoints": {"keep": 1, "every": save},
        # What diverges has lost.
        "gradients": training["gradients"] | {"non_finite": "stop", "rollback": "off"},
    }


@contextmanager
def _naming(study: StudyConfig, arm: str) -> Iterator[None]:
    """Puts the study and the arm before the message of a mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(f"study '{study.name}', arm '{arm}': {error}") from None


def arm_config(study: StudyConfig, arm: str) -> RunConfig:
    """The base with the overrides of the study and of the arm, before seeds, data and steps are set.

    Both count as one set of overrides, in which the arm's win over the study's.

    Raises: UserError that names the arm and the key.
    """
    values = copy.deepcopy(study.base)
    with _naming(study, arm):
        of_study, of_arm = parse_overrides(study.overrides), parse_overrides(study.arms[arm])
        for key, owner in DECIDED_BY.items():
            if any(one.touches(key.split(".")) for one in of_arm):
                raise UserError(f"{key} is not an arm's to change: the study decides it by {owner}.")
        overrides = combine_overrides(of_study, of_arm)
        apply_overrides(values, overrides, RunConfig())
        config = build_config(values, "the base", overrides)
        shares = SHARED in (places := _places(config)) or any(o.touches(["data", "sources"]) for o in of_arm)
        if shares and places != {SHARED}:
            raise UserError(
                "data.sources: an arm uses parts of the data that all arms share, so each path is "
                f"'{SHARED}': data.sources=[{{path: {SHARED}, episodes: [\"0-9\"]}}]. Other data are the "
                "study's data_from, or base.data.sources."
            )
        if config.evaluation.suite == NO_SUITE:
            raise UserError(
                f"evaluation.suite is '{NO_SUITE}', but arms are compared by their success in the simulator. "
                "Name a suite."
            )
    return config


def _places(config: RunConfig) -> set[Path]:
    return {source.path for source in config.data.sources}


def cell_config(
    study: StudyConfig,
    arm: str,
    *,
    level: Level,
    seed: int,
    steps: int,
    sources: tuple[SourceConfig, ...],
) -> RunConfig:
    """The config of one cell: one thread, one worker, no controls, no videos.

    Validation, last checkpoint and evaluation are as in any run. Raises: UserError that names the arm and
    the key, also where a phase of its strategy is shorter than its warm-up.
    """
    config = arm_config(study, arm)
    values = config.model_dump(mode="json")
    if _places(config) == {SHARED}:
        folders = sorted({source.path for source in sources})
        with _naming(study, arm):
            if len(folders) > 1:
                raise UserError(
                    f"data.sources: '{SHARED}' stands for one data set, but the study has {len(folders)}: "
                    f"{', '.join(map(str, folders))}. Let data_from, or base.data.sources, name one."
                )
        sources = tuple(source.model_copy(update={"path": folders[0]}) for source in config.data.sources)
    values |= {"name": cell_name(arm, level, seed), "seed": seed}
    values["data"] |= {"seed": seed, "sources": [source.model_dump(mode="json") for source in sources]}
    if level != "base":
        values["data"]["episodes_per_task"] = level
    every = values["training"]["checkpoints"]["every"] or CHECKPOINT_EVERY
    values["training"] |= {"seed": seed, "steps": steps, "threads": 1}
    values["training"]["checkpoints"] |= {"keep": 1, "every": min(every, CHECKPOINT_EVERY)}
    quiet = {"workers": 1, "videos_per_task": 0, "controls": NO_CONTROLS}
    values["evaluation"] = merge(values["evaluation"], merge(quiet, study.evaluation))
    with _naming(study, arm):
        config = build_config(values, "its config")
        warmup, terms = config.training.schedule.warmup, tuple(config.objective.terms())
        Strategy(config.strategy.phases(), steps=steps, warmup=warmup, terms=terms)
    return config


def check_same_starts(study: StudyConfig, configs: Mapping[str, RunConfig]) -> None:
    """Raises: UserError if arms would be evaluated on different starts, or with different limits."""
    base = configs[study.baseline].evaluation
    for arm, config in configs.items():
        for key in SAME_EVALUATION:
            expected, found = getattr(base, key), getattr(config.evaluation, key)
            if expected != found:
                raise UserError(
                    f"study '{study.name}', arm '{arm}': evaluation.{key} is {found}, but {expected} in "
                    f"'{study.baseline}': arms are compared on the same starts. Change it for the whole "
                    "study, under `evaluation`."
                )
