"""The cells of a study: one run for each arm, level and seed, in a folder named by a hash of its config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.config.run_config import RunConfig
from tutti.data.config import SourceConfig
from tutti.nested_dicts import content_hash
from tutti.runs.build import TRAIN_SECTIONS
from tutti.runs.folder import with_effect
from tutti.studies.arms import cell_config, cell_name
from tutti.studies.config import Level, StudyConfig

CELLS = "cells"
RESULT = "result.json"
HASH = 10


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
        level = {"base": "", "all": ", all demonstrations"}.get(
            str(self.level), f", {self.level} demonstrations"
        )
        return f"{self.arm}{level}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None if the cell is not finished, or its evaluation has changed."""
        try:
            result = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return result if isinstance(result, dict) and result.get("identity") == self.identity else None


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


def training_hash(config: RunConfig, fingerprint: str) -> str:
    """A hash of all that a training depends on; of the data by their content, not by their path."""
    sections = with_effect(config.sections("seed", "record", *TRAIN_SECTIONS))
    sections["data"]["sources"] = fingerprint
    return content_hash(sections, HASH)


def unfinished(cells: Sequence[Cell]) -> list[Cell]:
    """Those without a result, in order."""
    return [cell for cell in cells if cell.result() is None]
