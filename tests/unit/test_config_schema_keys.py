"""The keys read off the shipped schema: it is today's, and finds what the config's classes would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tutti.config.messages import shipped_schema, unknown_keys
from tutti.config.run_config import json_schema, load_config, to_yaml
from tutti.studies.config import StudyConfig

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_schema_is_that_of_the_config() -> None:
    """If this fails: tutti schema > src/tutti/config/schema.json."""
    assert shipped_schema() == json_schema()


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("modle: {size: small}", ["modle"]),
        (
            "training: {stepz: 3, optimizer: {kind: muon, lr: 1, betaz: [1, 2]}}",
            ["training.stepz", "training.optimizer.betaz"],
        ),
        ("training: {optimizer: {betas: [0.9, 0.95], lrx: 3}}", ["training.optimizer.lrx"]),
        (
            "objective: {align: {kind: contrastive, temperatur: 1}, x: {kind: progress, foo: 1}}",
            ["objective.align.temperatur", "objective.x.foo"],
        ),
        ("data: {sources: [{path: a}, {path: b, weigth: 2}]}", ["data.sources.1.weigth"]),
        ("objective: {align: null, mine: {kind: 'own:Term', options: {whatever: {deep: 1}}}}", []),
        ("model: {action: {kind: no_such_kind, hidden: 3}}", []),
        ("record: {episodes_per_task: {reach: 3}}", []),
        ("model: 3", []),
    ],
)
def test_keys_that_no_form_has_are_found(text: str, keys: list[str]) -> None:
    values: Any = yaml.safe_load(text)
    assert unknown_keys(values) == keys


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_no_key_of_a_whole_config_is_unknown(path: Path) -> None:
    assert unknown_keys(yaml.safe_load(path.read_text())) == []
    assert unknown_keys(yaml.safe_load(to_yaml(load_config(path)))) == []


def test_every_key_of_a_run_and_of_a_study_has_a_description() -> None:
    """A `kind` says which class it chooses, whose own keys are described."""
    undescribed = [
        f"{name}.{key}"
        for schema in (shipped_schema(), StudyConfig.model_json_schema())
        for name, definition in {"": schema, **schema["$defs"]}.items()
        for key, value in definition.get("properties", {}).items()
        if key != "kind" and "description" not in value
    ]
    assert undescribed == []
