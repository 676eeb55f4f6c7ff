"""A config as text: file and overrides read, keys checked, without torch and the config's classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutti.config.overrides import Override, blamed, check_agree, lay
from tutti.config.paths import config_file
from tutti.config.schema_keys import key_paths, nearest, shipped_schema, unknown_keys
from tutti.errors import UserError
from tutti.storage.reading import YAML_BYTES, parse_yaml, read_text, shown

MOST_MISTAKES = 8
LONGEST_KEY = 200


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a config file. Raises: UserError, naming the file and, where YAML fails, the line."""
    path = config_file(path)
    values = parse_yaml(read_text(path, YAML_BYTES), path)
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected keys such as `training:`, found {shown(values)}.")
    return values or {}


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """What each `key.sub=value` sets.

    Raises: UserError where that is not what a text is, or where two of them contradict each other.
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
    check_agree(overrides)
    return overrides


def check_keys(path: Path, overrides: Sequence[str]) -> None:
    """Refuses what no config has, before anything is imported that takes seconds; values come later.

    Raises: UserError, naming the file or the overrides, each key, and the nearest known one.
    """
    values, given = read_yaml(path), parse_overrides(overrides)
    lay(values, given, {})
    schema = shipped_schema()
    wrong = unknown_keys(values, schema)
    if not wrong:
        return
    known = {".".join(keys) for keys in key_paths(schema)}
    lines = [not_a_key(key, known, values) for key in wrong[:MOST_MISTAKES]]
    mistakes = [(key, "extra_forbidden", line) for key, line in zip(wrong, lines, strict=False)]
    raise UserError(mistaken(blamed(str(path), mistakes, given), lines, len(wrong) - len(lines)))


def not_a_key(key: str, known: set[str], values: Any) -> str:
    """The sentence about a key that is not there."""
    where = "." if len(key) > LONGEST_KEY else f".{nearest(key, known)}"
    if key in known:  # naming it again would be no help
        for part in key.split(".")[:-1]:
            values = values.get(part) if isinstance(values, dict) else None
        kind = values.get("kind") if isinstance(values, dict) else None
        where = f" where {key.rpartition('.')[0]}.kind is " + (f"'{kind}'." if kind else "the default.")
    return f"{shown(key, LONGEST_KEY, quoted=False)} is not a key{where}"


def mistaken(source: str, lines: Sequence[str], more: int) -> str:
    """The message: who made the mistakes, a line for each, and how many `more` there are."""
    said = [f"  {line}" for line in lines] + ([f"  ... and {more} more"] if more else [])
    count = len(lines) + more
    return "\n".join([f"{source}: {count} mistake{'s' if count > 1 else ''}", *said])
