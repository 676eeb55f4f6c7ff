"""Builds the config of one cell: the base, the overrides, the arm, and what the study decides itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from tutti.config.overrides import apply_overrides, combine_overrides
from tutti.config.run_config import RunConfig, build_config
from tutti.config.yaml_reader import parse_overrides
from tutti.data.config import SourceConfig
from tutti.evaluation.config import NO_SUITE, ControlsConfig
from tutti.nested_dicts import merge
from tutti.studies.config import Level, StudyConfig
from tutti.training.strategy import Strategy
from tutti.types import UserError

DECIDED_BY = {
    "name": "name",
    "seed": "seeds",
    "data.seed": "seeds",
    "training.seed": "seeds",
    "training.steps": "budget.steps",
    "data.episodes_per_task": "episodes_per_task",
    "data.sources": "data_from, or base.data.sources",
}
"""Keys of a run that no arm may change, each with the key of the study that sets it."""

SAME_EVALUATION = ("suite", "tasks", "episodes", "first_seed", "split", "max_decisions")
"""Keys of `evaluation` in which all arms must agree: pairs need the same starts and limits."""

CHECKPOINT_EVERY = 200


def arm_config(study: StudyConfig, arm: str) -> RunConfig:
    """The base with the overrides of the study and of the arm, before seeds, data and steps are set.

    Both count as one set of overrides, in which the arm's win over the study's.

    Raises: UserError that names the arm and the key.
    """
    values = copy.deepcopy(study.base)
    source = f"study '{study.name}', arm '{arm}'"
    try:
        of_study, of_arm = parse_overrides(study.overrides), parse_overrides(study.arms[arm])
        for key, owner in DECIDED_BY.items():
            if any(one.touches(key.split(".")) for one in of_arm):
                raise UserError(f"{key} is not an arm's to change: the study decides it by {owner}.")
        overrides = combine_overrides(of_study, of_arm)
        apply_overrides(values, overrides, RunConfig())
        config = build_config(values, "the base", overrides)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if config.evaluation.suite == NO_SUITE:
        raise UserError(
            f"{source}: evaluation.suite is '{NO_SUITE}', but arms are compared by their success in the "
            "simulator. Name a suite."
        )
    return config


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
    values = arm_config(study, arm).model_dump(mode="json")
    values |= {"name": cell_name(arm, level, seed), "seed": seed}
    values["data"] |= {"seed": seed, "sources": [source.model_dump(mode="json") for source in sources]}
    if level != "base":
        values["data"]["episodes_per_task"] = level
    every = values["training"]["checkpoints"]["every"] or CHECKPOINT_EVERY
    values["training"] |= {"seed": seed, "steps": steps, "threads": 1}
    values["training"]["checkpoints"] |= {"keep": 1, "every": min(every, CHECKPOINT_EVERY)}
    quiet = {"workers": 1, "videos_per_task": 0, "controls": no_controls()}
    values["evaluation"] = merge(values["evaluation"], merge(quiet, study.evaluation))
    config = build_config(values, f"study '{study.name}', arm '{arm}'")
    _check_strategy(study, arm, config)
    return config


def no_controls() -> dict[str, int]:
    """`evaluation.controls` with every count at 0."""
    return {name: 0 for name, field in ControlsConfig.model_fields.items() if field.annotation is int}


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


def cell_name(arm: str, level: Level, seed: int) -> str:
    """The name of a cell, also of its folder."""
    words = {"all": "-all", "base": ""}
    return f"{arm}{words.get(str(level), f'-{level}demos')}-seed{seed}"


def _check_strategy(study: StudyConfig, arm: str, config: RunConfig) -> None:
    training = config.training
    try:
        Strategy(
            config.strategy.phases(),
            steps=training.steps,
            warmup=training.schedule.warmup,
            terms=tuple(config.objective.terms()),
        )
    except UserError as error:
        raise UserError(f"study '{study.name}', arm '{arm}': {error}") from None
