"""The keys of a config by its JSON schema: lists them, finds unknown ones and the nearest known one.

Needs neither torch nor the config's classes, so a misspelt key is answered in a fraction of a second.
`schema.json` beside this file is what `tutti schema` prints; a test compares them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

Schema = Mapping[str, Any]
BRANCHES = ("oneOf", "anyOf", "allOf")


@cache
def shipped_schema() -> dict[str, Any]:
    """The schema of this version's config files."""
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))


def unknown_keys(values: Any, schema: Schema) -> list[str]:
    """Every key in `values` that the schema does not have at its place, such as `training.stepz`.

    A `kind` chooses one form of a mapping; without it all forms count. Below an unknown `kind`, and in open
    mappings, every key is accepted.
    """
    return [".".join(path) for path in _unknown(values, list(_forms(schema, schema)), schema, ())]


def _unknown(
    values: Any, forms: list[Schema], schema: Schema, path: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    if isinstance(values, list):
        items = [inner for form in forms for inner in _forms(form.get("items"), schema)]
        for place, value in enumerate(values):
            yield from _unknown(value, items, schema, (*path, str(place)))
    if not isinstance(values, dict):
        return
    mappings = _chosen(
        [form for form in forms if "properties" in form or form.get("type") == "object"], values
    )
    for key, value in values.items():
        below = [inner for form in mappings for inner in _below(form, str(key), schema)]
        if (
            mappings
            and not below
            and all(form.get("additionalProperties", True) is False for form in mappings)
        ):
            yield (*path, str(key))
        else:
            yield from _unknown(value, below, schema, (*path, str(key)))


def _chosen(forms: list[Schema], values: Mapping[str, Any]) -> list[Schema]:
    """Those of the forms that have the `kind` of `values`; all of them where it names none."""
    if "kind" not in values:
        return forms
    kinds = [form.get("properties", {}).get("kind", {}) for form in forms]
    return [
        form
        for form, kind in zip(forms, kinds, strict=True)
        if values["kind"] in (kind.get("const"), *kind.get("enum", ()))
    ]


def _below(form: Schema, key: str, schema: Schema) -> Iterator[Schema]:
    """The forms that the value of `key` may have. A key that may hold anything gives one open form."""
    known = form.get("properties", {})
    inner = known[key] if key in known else form.get("additionalProperties", False)
    if inner is True or inner == {}:
        yield {}
    elif inner is not False:
        yield from _forms(inner, schema)


def _forms(node: Any, schema: Schema) -> Iterator[Schema]:
    """`node` with references and unions resolved: each form that a value there may have."""
    if not isinstance(node, Mapping):
        return
    if "$ref" in node:
        yield from _forms(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
        return
    choices = [choice for branch in BRANCHES for choice in node.get(branch, ())]
    for choice in choices:
        yield from _forms(choice, schema)
    if not choices:
        yield node


def key_paths(schema: Schema) -> Iterator[tuple[str, ...]]:
    """Every key that the schema knows, as a path; entries of lists and of open mappings are '*'."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for form in _forms(node, schema):
            for key, value in form.get("properties", {}).items():
                yield (*path, key)
                yield from walk(value, (*path, key))
            for inner in ("items", "additionalProperties"):
                yield from walk(form.get(inner), (*path, "*"))

    return walk(schema, ())


def nearest(key: Any, known: Iterable[str]) -> str:
    """' Did you mean ...?', looking first among the key's neighbours, then for its last word anywhere."""
    known = list(known)
    key = re.sub(r"\.\d+(?=\.)", ".*", str(key))
    parent, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    close = [beside[name] for name in difflib.get_close_matches(leaf, beside, n=1)]
    close += sorted(
        (name for name in known if name.rpartition(".")[2] == leaf), key=lambda name: (name.count("."), name)
    )
    close += difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f" Did you mean '{close[0]}'?" if close else ""
