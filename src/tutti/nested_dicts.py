"""Nested dicts: the keys in which two differ, one merged over another, and the leaves of any structure."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from tutti.storage.reading import shown

ABSENT = "(absent)"
LONGEST = 200
MAX_LINES = 10


def changed_keys(old: Any, new: Any, key: str = "") -> list[str]:
    """A line for each key in which two nested values differ, such as "training.steps: 2000 -> 500".

    `key` is the path of the two values. A tuple equals the list of its items, as after a trip through JSON.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for name in names
            for line in changed_keys(
                old.get(name, ABSENT), new.get(name, ABSENT), f"{key}.{name}" if key else str(name)
            )
        ]
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if lists and all(isinstance(value, Mapping) for value in (*old, *new)):
        return changed_keys(dict(enumerate(old)), dict(enumerate(new)), key)
    return [] if old == new else [f"{key}: {_text(old)} -> {_text(new)}"]


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins key by key, also in nested mappings; where it changes a `kind`, it replaces the mapping."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            same_kind = value.get("kind", below.get("kind")) == below.get("kind")
            merged[key] = merge(below, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, sequences and dataclasses that are none of these, each with its path."""
    if is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{name}/{key}" if name else str(key))


def content_hash(values: Any, length: int) -> str:
    """The first digits of a SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:length]


def without_addresses(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without where its records and checkpoints are sent to, which may hold a password: for
    all that leaves the machine."""
    values = copy.deepcopy(dict(config))
    if isinstance(trackers := values.get("logging"), list):
        values["logging"] = [one for one in trackers if one == {"kind": "tensorboard"}]
    training = values.get("training")
    checkpoints = training.get("checkpoints") if isinstance(training, dict) else None
    if isinstance(checkpoints, dict) and checkpoints.get("mirror", "off") != "off":
        checkpoints["mirror"] = "off"
    return values


def indented(lines: Sequence[str]) -> str:
    """The first lines of a list of changes for an error message, and how many more there are."""
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:MAX_LINES], *more])


def _text(value: Any) -> str:
    return shown(value, LONGEST, quoted=value != ABSENT)
