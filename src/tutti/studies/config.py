"""StudyConfig: a base run, the arms that change it, and the budget that they share, in one YAML file."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tutti.config.files import read_yaml
from tutti.config.layers import base_file, read_config
from tutti.config.messages import explain
from tutti.config.overrides import apply_overrides, parse_overrides
from tutti.config.run_config import RunConfig
from tutti.frozen_config import FrozenConfig
from tutti.storage.files import LocalPath
from tutti.types import UserError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
COMPARISON = NAME[:-1] + " - " + NAME[1:]
ArmName = Annotated[str, Field(pattern=NAME)]
Demonstrations = Annotated[int, Field(ge=1)] | Literal["all"]
Seed = Annotated[int, Field(ge=0)]
Level = int | Literal["all", "base"]
"""How many demonstrations a task has; "base": as the base config says."""


class BudgetConfig(FrozenConfig):
    """The budget of every arm: what the baseline spends in `steps` steps.

    | kind | an arm's steps |
    |---|---|
    | steps | the same |
    | samples | so many that it sees as many windows (batch size and accumulation may differ) |
    | flops | times the baseline's mean FLOPs per step over its own |
    | time | times the baseline's mean seconds per step over its own, measured in turns on one thread |

    The means are over all steps of the run, so a stage in which parts are frozen or terms do not count is
    charged what it costs. Diagnostics, validation and checkpoints are not charged.
    """

    kind: Literal["steps", "samples", "flops", "time"] = "steps"
    steps: Annotated[int, Field(ge=1)] | Literal["base"] = Field(
        default="base", description="Optimiser steps of the baseline; base: its training.steps."
    )
    arms: dict[ArmName, Literal["steps", "samples", "flops"] | Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Arms of another budget: its kind, or their steps, as in {control: flops}."
    )

    @property
    def text(self) -> str:
        """As in "steps (control: FLOPs)"."""
        said = (self.kind, *self.arms.values())
        kind, *own = (f"{n} steps" if isinstance(n, int) else n.replace("flops", "FLOPs") for n in said)
        others = ", ".join(f"{arm}: {one}" for arm, one in zip(self.arms, own, strict=True))
        return f"{kind} ({others})" if others else kind


class StudyConfig(FrozenConfig):
    """Arms x demonstrations x seeds: each a run of its own, all on the same data and the same starts."""

    name: str = Field(pattern=NAME, description="The study's folder under runs/studies/.")
    base: dict[str, Any] = Field(
        description="The run config that the arms change: its keys, or the path of its file, looked for "
        "beside the study's file, then in the present folder."
    )
    overrides: tuple[str, ...] = Field(default=(), description="key.sub=value for every arm.")
    data_from: Literal["base"] | LocalPath = Field(
        default="base",
        description="Folder of a run whose recorded data set all arms share and only read; base: the base's "
        "data.sources, or what it records, once for the study.",
    )
    arms: dict[ArmName, tuple[str, ...]] = Field(
        min_length=1, description="Each arm's own key.sub=value list; an empty one is the base itself."
    )
    baseline: str = Field(description="The arm that the others are held against.")
    comparisons: tuple[Annotated[str, Field(pattern=COMPARISON)], ...] = Field(
        default=(),
        description='Comparisons fixed beforehand, as "joint - control": these are judged together (Holm), '
        "and those with the baseline are exploratory. Empty, with no factors: those with the baseline.",
    )
    factors: dict[ArmName, tuple[ArmName, ...]] = Field(
        default={},
        description="Of a full factorial design, each factor with the arms in which it is on. The main "
        "effects are judged together (Holm); interactions are exploratory.",
    )
    seeds: Annotated[int, Field(ge=1)] | Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        default=3, description="Training seeds: how many (from 0), or which."
    )
    episodes_per_task: tuple[Demonstrations, ...] = Field(
        default=(), description="Data levels: data.episodes_per_task of each; empty: as the base says."
    )
    budget: BudgetConfig = Field(default_factory=BudgetConfig, description="What the arms have in common.")
    evaluation: dict[str, Any] = Field(
        default={},
        description="Keys of the section evaluation, the same for every arm; no controls and no videos "
        "unless named here.",
    )
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Runs at a time, one thread each; auto: one for each core."
    )

    @property
    def contrasts(self) -> dict[str, dict[str, float]]:
        """The weights of the arms in each comparison fixed beforehand: those listed, and main effects."""
        found: dict[str, dict[str, float]] = {}
        for text in self.comparisons:
            first, second = text.split(" - ")
            found[text] = {first: 1.0, second: -1.0}
        return found | {factor: self._effect((factor,)) for factor in self.factors}

    @property
    def interactions(self) -> dict[str, dict[str, float]]:
        """The weights of the arms in every interaction of two and more factors, as in "align x recon"."""
        orders = (combinations(self.factors, size) for size in range(2, len(self.factors) + 1))
        return {" x ".join(several): self._effect(several) for order in orders for several in order}

    def _effect(self, factors: Sequence[str]) -> dict[str, float]:
        """2/K, times -1 for each of these factors that is off, of the K arms of the design."""
        on = {factor: {*self.factors[factor]} for factor in factors}
        signs = {arm: prod(1 if arm in on[f] else -1 for f in factors) for arm in self.arms}
        return {arm: 2 * sign / len(signs) for arm, sign in signs.items()}

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The training seeds."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def levels(self) -> tuple[Level, ...]:
        """The data levels, at least one."""
        return self.episodes_per_task or ("base",)

    @field_validator("seeds", "episodes_per_task")
    @classmethod
    def _differ(cls, value: Any) -> Any:
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError(f"names one twice: {', '.join(map(str, value))}")
        return value

    @model_validator(mode="after")
    def _baseline_is_an_arm(self) -> Self:
        if self.baseline not in self.arms:
            near = difflib.get_close_matches(self.baseline, self.arms, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"baseline is '{self.baseline}', but the arms are {', '.join(self.arms)}.{hint}")
        if isinstance(self.budget.arms.get(self.baseline), int):
            raise ValueError("budget.arms gives the baseline steps of its own. Set budget.steps")
        return self

    @model_validator(mode="after")
    def _comparisons_are_of_arms(self) -> Self:
        named = [arm for text in self.comparisons for arm in text.split(" - ")]
        named += [arm for arms in self.factors.values() for arm in arms] + [*self.budget.arms]
        if unknown := sorted({*named} - self.arms.keys()):
            raise ValueError(
                f"comparisons, factors and budget.arms name no arm: {', '.join(unknown)}. "
                f"The arms are {', '.join(self.arms)}"
            )
        if same := [text for text in self.comparisons if len({*text.split(" - ")}) == 1]:
            raise ValueError(f"comparisons: an arm is held against itself: {', '.join(same)}")
        cells = Counter(frozenset(f for f, on in self.factors.items() if arm in on) for arm in self.arms)
        if self.factors and (len(cells) < 2 ** len(self.factors) or max(cells.values()) > 1):
            raise ValueError(
                f"factors: {len(self.factors)} factors need {2 ** len(self.factors)} arms, one for each way "
                f"to switch them on and off; these {len(self.arms)} arms make {len(cells)} different ones"
            )
        return self

    @model_validator(mode="after")
    def _arms_differ(self) -> Self:
        seen: dict[frozenset[str], str] = {}
        for arm, overrides in self.arms.items():
            changes = frozenset((*overrides, str(self.budget.arms.get(arm, self.budget.kind))))
            if changes in seen:
                raise ValueError(
                    f"arms '{seen[changes]}' and '{arm}' have the same overrides and budget, so they would "
                    "give the same bits. Remove one of them."
                )
            seen[changes] = arm
        return self


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study of a YAML file, with `key.sub=value` overrides such as seeds=1 or base.training.steps=500.

    Raises: UserError, naming the file, the key, what was expected and found, and the nearest known key.
    """
    values = read_yaml(path, study=True)
    bases, others = (
        parse_overrides([text for text in overrides if (text.partition("=")[0].strip() == "base") is whole])
        for whole in (True, False)
    )
    apply_overrides(values, bases, {})
    base = values.get("base")
    if isinstance(base, str):
        values["base"] = read_config(base_file(base, path), RunConfig())
    apply_overrides(values, others, {"base": RunConfig(), "budget": BudgetConfig()})
    try:
        study = StudyConfig.model_validate(values)
    except ValidationError as error:
        schema = StudyConfig.model_json_schema()
        raise UserError(explain(error, values, str(path), schema, [*bases, *others])) from None
    for one in others:
        for other in parse_overrides(study.overrides) if one.path[0] == "base" else []:
            if one.path[1:] and other.touches(one.path[1:]):
                raise UserError(
                    f"'{one.text}' changes nothing: the study's own overrides say '{other.text}' for every "
                    "arm. Give other `overrides`, such as overrides=[...], instead."
                )
    return study


def study_yaml(study: StudyConfig) -> str:
    """The study as `load_study` reads it, the base spelled out."""
    text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, width=110)
    return f"# The study '{study.name}' as it was run.\n{text}"
