"""RunConfig: the config of a run, composed of the config classes that lie beside their components.

Order of precedence: defaults < the preset of `model.size` < the files that `base` names < YAML file <
`key.sub=value` on the command line.
Mappings merge key by key, but another `kind` drops the keys of the old one, and a mapping given on the
command line replaces the file's. The order of overrides does not matter: a `kind` among them drops keys of
the file, never those of another override. A section's `seed` is the run's unless the section has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from tutti.config.combinations import check_combination, check_model, check_playing, sets_lambdas
from tutti.config.files import read_yaml
from tutti.config.layers import BASE, BASE_SCHEMA, composed, read_layers
from tutti.config.messages import explain
from tutti.config.overrides import Override, apply_overrides, parse_overrides
from tutti.data.config import DataConfig
from tutti.evaluation.closed_loop.evaluate import EvaluationConfig
from tutti.frozen_config import FrozenConfig
from tutti.models.config import ModelConfig
from tutti.models.pretrained.vision import PretrainedVisionConfig
from tutti.nested_dicts import merge
from tutti.objectives.balancing.shares import SharesBalancingConfig
from tutti.objectives.config import DEFAULT_KINDS, BalancingConfig, ObjectiveConfig, plain_weights
from tutti.objectives.weight_schedule import AMOUNTS
from tutti.plugin import Origin, Trust, classes_in
from tutti.recording.recorder import RecordConfig
from tutti.trackers import LoggerConfig, TensorBoardConfig
from tutti.training.backward.config import BackwardConfig
from tutti.training.backward.interface import OneBackwardConfig
from tutti.training.config import TrainingConfig
from tutti.training.strategy import EndToEndConfig, StrategyConfig
from tutti.types import UserError

SEEDED = {"data": "", "training": "", "balancing": "rlw", "backward": "k_gradients"}
"""The sections with a seed; of some the one kind that has it."""


class RunConfig(FrozenConfig):
    """One run: what is recorded, read, built, minimised, trained and judged."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder under runs/."
    )
    seed: int = Field(default=0, ge=0, description="The seed of every section that does not name its own.")
    record: RecordConfig = Field(default_factory=RecordConfig, description="Demonstrations to record.")
    data: DataConfig = Field(
        default_factory=DataConfig, description="Data sets, how they are split, sampled and batched."
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="Encoders, fusion, action decoder.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="The terms of the loss.")  # pyright: ignore
    balancing: BalancingConfig = Field(
        default_factory=SharesBalancingConfig, description="How the lambdas are chosen."
    )
    backward: BackwardConfig = Field(
        default_factory=OneBackwardConfig, description="How the terms become one gradient."
    )
    strategy: StrategyConfig = Field(
        default_factory=EndToEndConfig, description="Which parts learn from which terms, and when."
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Optimizer and schedule.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="How it is judged.")
    logging: tuple[LoggerConfig, ...] = Field(
        default=(TensorBoardConfig(),), description="Trackers that records go to beside records.jsonl."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_amounts(cls, given: Any) -> Any:
        """Beside what sets lambdas by itself, terms with neither weight nor share weigh 1."""
        if isinstance(given, dict) and sets_lambdas(given.get("balancing"), given.get("backward")):
            return {**given, "objective": plain_weights(given.get("objective", {}))}
        return given

    @model_validator(mode="after")
    def _picture_size(self) -> Self:
        """`data.image_size: auto` becomes a number here: a run's config.yaml holds that."""
        if self.data.image_size == "auto":
            size = self.model.picture_size() or self.data.pixels
            object.__setattr__(self, "data", self.data.model_copy(update={"image_size": size}))
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        terms = self.objective.terms()
        vision, changes = self.model.vision, self.data.augmentation.kind
        if isinstance(vision, PretrainedVisionConfig) and vision.cache and changes != "none":
            raise ValueError(
                f"model.vision.cache keeps the tokens of pictures, but data.augmentation.kind is {changes}, "
                "which makes each picture a new one. Set model.vision.cache=0, or data.augmentation.kind=none"
            )
        check_combination(self.balancing, self.backward, terms, self.strategy, self.training)
        check_model(self.model, terms, self.training)
        if self.training.evaluate_every:
            check_playing(self.evaluation, self.during_training)
        return self

    @property
    def during_training(self) -> EvaluationConfig:
        """The evaluations of `training.evaluate_every`: the averaged weights on starts of their own, without
        controls or videos."""
        training = self.training
        own = {"episodes": training.evaluate_episodes, "first_seed": training.evaluate_first_seed}
        controls = self.evaluation.controls.none()
        own |= {"weights": "ema", "controls": controls, "videos_per_task": 0}
        return self.evaluation.model_copy(update=own)

    @property
    def classes(self) -> frozenset[str]:
        """The classes of the user's own that this config names."""
        return classes_in(self.model_dump(mode="json"))

    def sections(self, *names: str) -> dict[str, Any]:
        """The named sections as plain values, as they are written in config.yaml."""
        return self.model_dump(mode="json", include=set(names))


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file (or of nothing but defaults) with `key.sub=value` overrides.

    Raises: UserError, naming the file, the key, what was expected and found, and the nearest known key.
    """
    layers, parsed = [] if path is None else read_layers(Path(path)), parse_overrides(overrides)
    values = composed(layers, RunConfig())
    apply_overrides(values, parsed, RunConfig())
    files = " on ".join(str(layer.source) for layer in reversed(layers))
    return build_config(values, files or "the defaults", parsed)


def load_run_config(path: Path, trust: Trust = False) -> RunConfig:
    """The config.yaml of a run's folder. Somebody else may have written it, so a class that it names is
    imported only where `trust` allows it.

    Raises: UserError as `load_config`. A class that is not trusted is refused when it is built.
    """
    return build_config(read_yaml(path, path.parent), str(path), origin=Origin(path, trust))


def build_config(
    values: dict[str, Any], source: str, overrides: Sequence[Override] = (), origin: Origin | None = None
) -> RunConfig:
    """The config of plain values. A mistake is attributed to the override that set it, else to `source`.

    `origin` is for a config that somebody else may have written.
    """
    # So `optimizer: {lr: 3e-4}` means the default optimizer; `model` does the same with its size's preset.
    # What a term weighs is not merged: a weight in the file must not meet the default share.
    spared = {"model": True, "objective": {name: set(AMOUNTS) for name in DEFAULT_KINDS}}
    values = merge(RunConfig().model_dump(mode="json", exclude=spared), _with_seed(values))
    try:
        return RunConfig.model_validate(values, context=origin)
    except ValidationError as error:
        raise UserError(explain(error, values, source, json_schema(), overrides)) from None


def with_overrides(
    config: RunConfig, overrides: Sequence[str], source: str, origin: Origin | None = None
) -> RunConfig:
    """The config with `key.sub=value` overrides. Raises: UserError as `load_config`."""
    values, parsed = config.model_dump(mode="json"), parse_overrides(overrides)
    apply_overrides(values, parsed, RunConfig())
    return build_config(values, source, parsed, origin)


def to_yaml(config: RunConfig) -> str:
    """The resolved config, every default spelled out, as `load_config` reads it."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)
    return f"# The resolved config of run '{config.name}', defaults spelled out.\n{text}"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors that complete and check YAML."""
    schema = RunConfig.model_json_schema()
    schema["properties"] = {BASE: BASE_SCHEMA, **schema["properties"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _with_seed(values: dict[str, Any]) -> dict[str, Any]:
    """Copies the run's seed into the sections that have a seed but do not set it; one that is no number is a
    mistake of the run alone."""
    seeded = dict(values)
    for name, kind in SEEDED.items() if type(values.get("seed")) is int else ():
        section = values.get(name) or {}
        if isinstance(section, dict) and kind in ("", section.get("kind")):
            seeded[name] = {"seed": values["seed"], **section}
    return seeded
