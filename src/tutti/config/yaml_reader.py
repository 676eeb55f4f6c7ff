"""Reads YAML files and overrides, and checks their keys without torch and the config classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutti.config.messages import unknown_key_message
from tutti.config.overrides import Override, apply_overrides, check_no_contradiction
from tutti.config.paths import config_file
from tutti.config.schema_keys import shipped_schema, unknown_keys
from tutti.errors import UserError
from tutti.storage.reading import YAML_BYTES, parse_yaml, read_text, shown


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a config file. Raises: UserError, naming the file and, where YAML fails, the line."""
    path = config_file(path)
    values = parse_yaml(read_text(path, YAML_BYTES), path)
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected keys such as `training:`, found {shown(values)}.")
    return values or {}


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """What each `key.sub=value` sets.

    Raises: UserError where a text has another form, or two of them contradict each other.
    """
    overrides: list[Override] = []
    for text in texts:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise UserError(
                f"'{text:.200}' is not an override: expected key.sub=value, such as training.steps=500."
            )
        overrides.append(Override(text, path, parse_yaml(value, key)))
    check_no_contradiction(overrides)
    return overrides


def check_keys(path: Path, overrides: Sequence[str]) -> None:
    """Refuses unknown keys before an import takes seconds; values are checked later.

    Raises: UserError, naming the file or the overrides, each key, and the nearest known one.
    """
    values, parsed = read_yaml(path), parse_overrides(overrides)
    apply_overrides(values, parsed, {})
    schema = shipped_schema()
    if keys := unknown_keys(values, schema):
        raise UserError(unknown_key_message(keys, values, str(path), schema, parsed))
