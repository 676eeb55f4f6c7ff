"""RunConfig: everything one run is, composed of the configs that live beside their components.

Order of precedence: defaults < the preset of `model.size` < YAML file < `key.sub=value` on the command line.
Mappings merge key by key, but a changed `kind` drops the keys of the old one, and a mapping given on the
command line takes the place of the file's. Overrides count as one set, in whatever order they are given: a
`kind` among them drops keys of the file, never those of another override. A section's `seed` is the run's,
unless it names its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutti.config.compatibility import check_combination
from tutti.config.overrides import Override, blamed, lay
from tutti.config.schema_keys import key_paths, nearest
from tutti.config.yaml_reader import (
    LONGEST_KEY,
    MOST_MISTAKES,
    mistaken,
    not_a_key,
    parse_overrides,
    read_yaml,
)
from tutti.data.config import DataConfig
from tutti.evaluation.closed_loop.evaluate import EvaluationConfig
from tutti.models.vla import ModelConfig
from tutti.objectives.balancing.fixed import FixedBalancingConfig
from tutti.objectives.balancing.union import BalancingConfig
from tutti.objectives.unified import ObjectiveConfig
from tutti.plugin import Origin, Trust, classes_in
from tutti.recording.recorder import RecordConfig
from tutti.storage.reading import shown
from tutti.training.backward.one import OneBackwardConfig
from tutti.training.backward.union import BackwardConfig
from tutti.training.config import TrainingConfig
from tutti.training.strategy import EndToEndConfig, StrategyConfig
from tutti.types import UserError

SEEDED = ("record", "data", "training", "evaluation")
SEEDED_KINDS = {"balancing": "rlw", "backward": "k_gradients"}


class RunConfig(BaseModel):
    """One run: what is recorded, read, built, minimised, trained and judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's folder under runs/."
    )
    seed: int = Field(default=0, ge=0, description="The seed of every section that does not name its own.")
    record: RecordConfig = Field(default_factory=RecordConfig, description="Demonstrations to record.")
    data: DataConfig = Field(default_factory=DataConfig, description="Data sets and how they become batches.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Encoders, fusion, action decoder.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="The terms of the loss.")  # pyright: ignore
    balancing: BalancingConfig = Field(
        default_factory=FixedBalancingConfig, description="How the lambdas are chosen."
    )
    backward: BackwardConfig = Field(
        default_factory=OneBackwardConfig, description="How the terms become one gradient."
    )
    strategy: StrategyConfig = Field(
        default_factory=EndToEndConfig, description="Which parts learn from which terms, and when."
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Optimizer and schedule.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="How it is judged.")

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        terms = self.objective.terms()
        check_combination(self.balancing, self.backward, terms, self.strategy, self.training)
        return self

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
    values = read_yaml(Path(path)) if path is not None else {}
    given = parse_overrides(overrides)
    lay(values, given, RunConfig())
    return build_config(values, "the defaults" if path is None else str(path), given)


def load_run_config(path: Path, trust: Trust = False) -> RunConfig:
    """The config.yaml of a run's folder, which somebody else may have written: a class that it names is
    imported only where `trust` covers it.

    Raises: UserError as `load_config`. A class that is not trusted is refused when it is built.
    """
    return build_config(read_yaml(path), str(path), origin=Origin(path, trust))


def build_config(
    values: dict[str, Any], source: str, given: Sequence[Override] = (), origin: Origin | None = None
) -> RunConfig:
    """Checks plain values; a mistake is blamed on the overrides in `given` that set it, else on `source`.
    `origin` is given for a config that is not the user's own."""
    values = _with_defaults(_with_seed(values))
    try:
        return RunConfig.model_validate(values, context=origin)
    except ValidationError as error:
        raise UserError(explain(error, values, source, json_schema(), given)) from None


def to_yaml(config: RunConfig) -> str:
    """The resolved config, every default spelled out, as `load_config` reads it."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)
    return f"# The resolved config of run '{config.name}', defaults spelled out.\n{text}"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors that complete and check YAML."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Every key at which two configs differ, as `training.steps: 2000 -> 500`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = ((f"{prefix}{key}", old.get(key), new.get(key)) for key in keys)
        return [line for key, left, right in pairs for line in differences(left, right, f"{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {shown(old, 200)} -> {shown(new, 200)}"]


def _with_seed(values: dict[str, Any]) -> dict[str, Any]:
    """Gives the run's seed to the sections that have a seed and do not name one."""
    if "seed" not in values:
        return values
    seeded = dict(values)
    for name in SEEDED:
        section = values.get(name) or {}
        if isinstance(section, dict) and "seed" in RunConfig.model_fields[name].annotation.model_fields:  # pyright: ignore
            seeded[name] = {"seed": values["seed"], **section}
    for name, kind in SEEDED_KINDS.items():
        section = values.get(name)
        if isinstance(section, dict) and section.get("kind") == kind:
            seeded[name] = {"seed": values["seed"], **section}
    return seeded


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Lays the values over the defaults, so that `optimizer: {lr: 3e-4}` means the default optimizer.

    `model` does the same with the preset of its size. What is no mapping is left for the checks to refuse.
    """
    defaults = RunConfig().model_dump(mode="json", exclude={"model"})
    return _merge(defaults, values)


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            same_kind = value.get("kind", below.get("kind")) == below.get("kind")
            merged[key] = _merge(below, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def explain(
    error: ValidationError,
    values: dict[str, Any],
    source: str,
    schema: Mapping[str, Any],
    given: Sequence[Override] = (),
) -> str:
    """Who made the mistakes, the overrides in `given` or `source`, and one line a mistake: the key, what was
    expected and found, and the nearest key that `schema` knows."""
    known = {".".join(path) for path in key_paths(schema)}
    lines: dict[str, str] = {}
    mistakes: list[tuple[str, str, str]] = []
    more: set[str] = set()
    for problem in error.errors(include_url=False):
        key = _key(problem["loc"], values, missing=problem["type"] == "missing")
        if key not in lines and len(lines) == MOST_MISTAKES:
            more.add(key)  # its sentence would look for near keys, which takes milliseconds
            continue
        line = _sentence(key, problem, known, values)
        lines[key] = line if key not in lines else f"{lines[key]}\n    or: {line}"
        mistakes.append((key, problem["type"], line))
    return mistaken(blamed(source, mistakes, given), list(lines.values()), len(more))


def _sentence(key: str, problem: Any, known: set[str], values: Any) -> str:
    context, found = problem.get("ctx") or {}, shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        return not_a_key(key, known, values)
    key = shown(key, LONGEST_KEY, quoted=False)
    match problem["type"]:
        case "missing":
            return f"{key} is missing."
        case "union_tag_not_found":
            return f"{key}.kind is missing: it chooses what {key} is."
        case "union_tag_invalid":
            kinds = re.findall(r"'([^']+)'", context["expected_tags"])
            near = nearest(context["tag"], kinds)
            return f"{key}.kind: expected {_either(kinds)}, found '{context['tag']}'.{near}"
        case "value_error" | "assertion_error":
            said = str(context.get("error", problem["msg"])).rstrip(".")
            return f"{key}: {said}." if key else f"{said}."
        case _:
            expected = problem["msg"].replace("Input should be", "expected").rstrip(".")
            return f"{key}: {expected}, found {found}."


def _key(loc: Sequence[str | int], values: Any, missing: bool) -> str:
    """Pydantic's location without the names of union members that it puts between the keys."""
    kept: list[str] = []
    for position, part in enumerate(loc):
        if missing and position == len(loc) - 1:
            kept.append(str(part))
            continue
        inside = (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        if inside:
            values = values[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
            kept.append(str(part))
    return ".".join(kept)


def _either(names: Any) -> str:
    return " or ".join(f"'{name}'" for name in names)
