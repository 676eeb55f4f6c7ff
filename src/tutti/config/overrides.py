"""Overrides: `key.sub=value` texts that change config values; their order does not matter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from tutti.errors import UserError
from tutti.storage.reading import parse_yaml

KIND = "kind"


@dataclass(frozen=True, slots=True)
class Override:
    """One `key.sub=value`: its text, the parts of its key, and the value."""

    text: str
    path: tuple[str, ...]
    value: Any

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def touches(self, path: Sequence[str]) -> bool:
        """True if it sets `path`, alone or within a mapping, or a key below `path`."""
        if self.path[: len(path)] == tuple(path):
            return True
        if not self.covers(path):
            return False
        value = self.value
        for part in path[len(self.path) :]:
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    def covers(self, path: Sequence[str]) -> bool:
        """True if it sets `path` or a mapping around it."""
        return self.path == tuple(path[: len(self.path)])


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """What each `key.sub=value` sets.

    Raises: UserError where a text has another form, or two of them contradict each other.
    """
    overrides: list[Override] = []
    for text in texts:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            said = f"'{text:.200}' is not an override: expected key.sub=value, such as training.steps=500."
            if text.endswith((".yaml", ".yml")):
                said += f" A config file comes as --config {text:.200}. So for tutti demo; other commands "
                said += "take one file, before all overrides."
            raise UserError(said)
        overrides.append(Override(text, path, parse_yaml(value, key)))
    for number, one in enumerate(overrides):
        for other in overrides[:number]:
            outer, inner = sorted((one, other), key=lambda override: len(override.path))
            if outer.covers(inner.path) and (why := _contradiction(outer, inner)):
                raise UserError(f"'{other.text}' and '{one.text}' contradict each other: {why}. Keep one.")
    return overrides


def _contradiction(outer: Override, inner: Override) -> str:
    value = outer.value
    for depth in range(len(outer.path), len(inner.path)):
        if isinstance(value, list):
            return ""  # a list is one value; its entries may be changed after it is given
        if not isinstance(value, dict):
            return f"what '{outer.text:.60}' gives has no key {inner.key}"
        if inner.path[depth] not in value:
            return ""
        value = value[inner.path[depth]]
    return "" if value == inner.value else f"{inner.key} is given two values"


def combine_overrides(*layers: Sequence[Override]) -> list[Override]:
    """All layers as one set of overrides, in which a later layer wins over an earlier one."""
    kept: list[Override] = []
    for layer in layers:
        kept = [one for one in kept if not any(new.covers(one.path) for new in layer)] + list(layer)
    return kept


INSTEAD = {"share": "weight", "weight": "share"}
"""Keys that replace one another: of a term one is given, so an override of it drops the file's other one."""


def apply_overrides(values: dict[str, Any], overrides: Iterable[Override], defaults: Any) -> None:
    """Sets each override's value in `values`: outer keys before inner ones, a `kind` before its neighbours.

    So their order does not matter: a `kind` drops the keys that `values` had for another kind, never those of
    an override. `defaults` (mappings or models) tell the kind where `values` have none.

    Raises: UserError where a value on the path has no keys, or a list no such entry.
    """
    ordered = sorted(overrides, key=lambda one: (len(one.path), one.path[-1] != KIND))
    for number, one in enumerate(ordered):
        place, last, holder = _holder(values, one), one.path[-1], one.path[:-1]
        if isinstance(place, list):
            place[_position(place, last, holder)] = copy.deepcopy(one.value)
            continue
        given = any(before.covers(holder) for before in ordered[:number])
        if last == KIND and not given and _drops(place, one.value, _at(defaults, holder)):
            place.clear()
        other = "" if one.value is None else INSTEAD.get(last, "")
        if place.get(other) is not None and not any(before.covers((*holder, other)) for before in ordered):
            del place[other]
        place[last] = copy.deepcopy(one.value)


def _holder(values: dict[str, Any], override: Override) -> dict[str, Any] | list[Any]:
    """The mapping or list that holds the last key of `override`; missing mappings are created."""
    place: Any = values
    for depth, part in enumerate(override.path[:-1]):
        if isinstance(place, list):
            place = place[_position(place, part, override.path[:depth])]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            name = ".".join(override.path[: depth + 1])
            raise UserError(f"'{override.text}': '{name}' is {place!r:.60}, which has no keys.")
    return place


def _position(items: list[Any], part: str, before: Sequence[str]) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(f"{'.'.join(before)} has {len(items)} entries, counted from 0: found '{part}'.")
    return int(part)


def _drops(place: Mapping[str, Any], kind: Any, default: Any) -> bool:
    """True if `kind` chooses another class than that of `place`, so that the keys there must go.

    Where several kinds share one class, `kind` is a key like any other.
    """
    if isinstance(default, BaseModel) and len(get_args(type(default).model_fields[KIND].annotation)) > 1:
        return False
    return place.get(KIND, getattr(default, KIND, None)) != kind


def _at(defaults: Any, path: Sequence[str]) -> Any:
    for part in path:
        defaults = defaults.get(part) if isinstance(defaults, Mapping) else getattr(defaults, part, None)
    return defaults
