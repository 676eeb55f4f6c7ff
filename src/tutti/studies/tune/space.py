"""SpaceConfig: the keys that `tutti tune CONFIG --space SPACE` searches, and how the best are confirmed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from tutti.config.files import read_yaml
from tutti.config.messages import explain
from tutti.config.overrides import parse_overrides
from tutti.frozen_config import FrozenConfig
from tutti.studies.cells import DECIDED_BY
from tutti.studies.config import NAME
from tutti.types import UserError

DEFAULT = "default"
"""The control that is always tried: the config as it is."""
FIXED = (
    *(*DECIDED_BY, "evaluation", "logging", "record", "data.sources", "data.validation_fraction"),
    *("training.threads", "training.checkpoints", "training.validation", "training.diagnostics"),
    *("training.evaluate_every", "training.gradients.non_finite", "training.gradients.rollback"),
)
"""Keys that no trial may change: all have the same budget, and are judged on the same; the last two lines are
set by `tried`."""
EXECUTED = "executed"
"""The held-out error of the actions that are executed, in normalised units (`evaluation.open_loop`)."""


class ParameterConfig(FrozenConfig):
    """What one key may be: a range (`low`, `high`) or one of some values (`choices`)."""

    low: float | None = Field(default=None, description="The smallest value, included.")
    high: float | None = Field(default=None, description="The largest value, included.")
    log: bool = Field(default=False, description="Equal factors are equally likely, as for a rate.")
    integer: bool = Field(default=False, description="Whole numbers alone.")
    choices: tuple[Any, ...] = Field(default=(), description="The values, such as kinds.")
    when: dict[str, Any] = Field(
        default={},
        description="Searched only where keys above it have these values: {strategy.kind: two_stage}.",
    )

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        ranged = self.low is not None and self.high is not None
        if ranged == bool(self.choices) or (self.low is None) != (self.high is None):
            raise ValueError("expected low and high, or choices")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log needs a low above 0")
        if self.integer and any(
            end is None or end % 1 or (self.log and end < 1) for end in (self.low, self.high)
        ):
            raise ValueError("integer needs a low and a high that are whole numbers, with log from 1 on")
        return self

    @property
    def labels(self) -> list[str]:
        """The choices as texts, by which Optuna keeps them."""
        return [json.dumps(one) for one in self.choices]


class ConfirmConfig(FrozenConfig):
    """The best trials against the default, from fresh seeds at an equal budget: a study of its own."""

    best: int = Field(default=2, ge=1, description="Trials to confirm, the best first.")
    seeds: int = Field(default=3, ge=1, description="Training seeds of each, none of them the search's.")
    budget: Literal["steps", "samples", "flops", "time"] = Field(
        default="flops", description="What every arm gets as much of as the default (docs/how-to/studies.md)."
    )
    evaluation: dict[str, Any] = Field(
        default={}, description="Keys of evaluation; the starts must not be those of the search."
    )


class SpaceConfig(FrozenConfig):
    """A search: parameters, sampler, rungs, and the starts of the top rung."""

    name: str = Field(pattern=NAME, description="The search's folder in RUN/tune/.")
    parameters: dict[str, ParameterConfig] = Field(min_length=1, description="What each key may be.")
    sampler: Literal["tpe", "random"] = Field(default="tpe", description="tpe learns from the trials before.")
    seed: int = Field(default=0, ge=0, description="Seed of the sampler.")
    trials: int = Field(default=40, ge=1, description="Trials in all, controls included.")
    rungs: int = Field(default=3, ge=1, le=8, description="Lengths at which trials are judged.")
    reduction: int = Field(
        default=3,
        ge=2,
        le=10,
        description="A rung is so many times as long as the one below; 1 / it goes on.",
    )
    score: dict[str, float] = Field(
        default={EXECUTED: 1.0},
        min_length=1,
        description="The error on held-out episodes under the averaged weights, weighted sum: executed, or "
        "validation metrics such as valid/metric/state/key_l1.",
    )
    evaluation: dict[str, Any] = Field(
        default={"episodes": 4, "first_seed": 500_000},
        description="Keys of evaluation for the trials that reach the top rung.",
    )
    controls: dict[Annotated[str, Field(pattern=NAME)], tuple[str, ...]] = Field(
        default={}, description="Trials that are made first, as key=value lists; the default always is."
    )
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Trials at a time, one thread each; auto: one for each core."
    )
    confirm: ConfirmConfig | Literal["off"] = Field(
        default_factory=ConfirmConfig, description="How the best are confirmed; off: not."
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        known: set[str] = set()
        given = [(f"controls.{name}", texts) for name, texts in self.controls.items()]
        for key, one in self.parameters.items():
            given += [("parameters", (f"{key}={json.dumps(value)}",)) for value in one.choices or (0,)]
            if wrong := [other for other in one.when if other not in known]:
                raise ValueError(f"parameters.{key}.when names {', '.join(wrong)}, which is not above it")
            known.add(key)
        if DEFAULT in self.controls:
            raise ValueError(f"controls: '{DEFAULT}' is always there: the config as it is")
        for where, texts in given:
            for changed in parse_overrides(texts):
                if any(changed.touches(key.split(".")) for key in FIXED):
                    raise ValueError(f"{where}: {changed.key} is no key to search: no trial may change it")
        return self

    @property
    def all_controls(self) -> dict[str, tuple[str, ...]]:
        """The default first."""
        return {DEFAULT: (), **self.controls}

    def rung_steps(self, whole: int) -> list[int]:
        """The steps at which a trial is judged, the last one all of them.

        Raises: UserError where the shortest rung would have none.
        """
        lowest = whole // self.reduction ** (self.rungs - 1)
        if lowest < 1:
            raise UserError(
                f"rungs: {self.rungs} rungs, each {self.reduction} times as long, need more than "
                f"training.steps {whole}. Lower rungs or reduction."
            )
        return [lowest * self.reduction**number for number in range(self.rungs - 1)] + [whole]


def load_space(path: Path) -> SpaceConfig:
    """The space of a YAML file; a list stands for choices.

    Raises: UserError, naming the file, the key, what was expected and found.
    """
    values = read_yaml(path)
    given = values.get("parameters")
    if isinstance(given, dict):
        made = {key: {"choices": one} if isinstance(one, list) else one for key, one in given.items()}
        values["parameters"] = made
    try:
        return SpaceConfig.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        raise UserError(explain(error, values, str(path), SpaceConfig.model_json_schema())) from None
