"""The keys of a config and messages about mistakes in it: where, what was expected, the nearest key.

The keys are read off the JSON schema, which needs neither torch nor the config's classes, so that a misspelt
one is answered in a fraction of a second. `schema.json` beside this file is what `tutti schema` prints.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutti.config.overrides import KIND, Override
from tutti.storage.reading import shown

MAX_MISTAKES = 8
LONGEST_KEY = 200
Schema = Mapping[str, Any]
BRANCHES = ("oneOf", "anyOf", "allOf")
NOT_A_KEY = "extra_forbidden"
"""Pydantic's type of error for a key that does not exist."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake: its key, pydantic's type of error, and the sentence that the user reads."""

    key: str
    problem: str
    sentence: str


def explain(
    error: ValidationError,
    values: dict[str, Any],
    source: str,
    schema: Schema,
    overrides: Sequence[Override] = (),
) -> str:
    """The message of a validation error: who made the mistakes, and one line for each key.

    `values` are those that pydantic refused, `source` the file that they come from, `schema` knows the keys.
    """
    problems = [
        (_key(problem["loc"], values, missing=problem["type"] == "missing"), problem)
        for problem in error.errors(include_url=False)
    ]
    # Of a choice of forms pydantic has the mistakes in each; those inside of one tell more than that no other
    # form fits either.
    inner = [key for key, _ in problems]
    problems = [one for one in problems if not any(key.startswith(f"{one[0]}.") for key in inner)]
    return error_message(problems, values, source, schema, overrides)


def error_message(
    problems: Sequence[tuple[str, Any]],
    values: dict[str, Any],
    source: str,
    schema: Schema,
    overrides: Sequence[Override],
) -> str:
    """The same for problems in pydantic's form, each with its key: the first of them in a sentence, for the
    search for near keys takes milliseconds, and how many more there are."""
    known = {".".join(path) for path in key_paths(schema) if path[-1] != "*"}
    keys = list(dict.fromkeys(key for key, _ in problems))
    mistakes = [
        Mistake(key, problem["type"], _sentence(key, problem, known, values))
        for key, problem in problems
        if key in keys[:MAX_MISTAKES]
    ]
    lines = [
        "\n    or: ".join(one.sentence for one in mistakes if one.key == key) for key in keys[:MAX_MISTAKES]
    ]
    more = [f"... and {len(keys) - len(lines)} more"] if len(keys) > len(lines) else []
    count = f"{len(keys)} mistake{'s' if len(keys) > 1 else ''}"
    return "\n  ".join([f"{_authors(source, mistakes, overrides)}: {count}", *lines, *more])


def _sentence(key: str, problem: Any, known: set[str], values: Any) -> str:
    context, found = problem.get("ctx") or {}, shown(problem["input"])
    if problem["type"] == NOT_A_KEY:
        return _unknown(key, known, values)
    key = shown(key, LONGEST_KEY, quoted=False)
    match problem["type"]:
        case "missing":
            return f"{key} is missing."
        case "union_tag_not_found":
            return f"{key}.kind is missing: it chooses what {key} is."
        case "union_tag_invalid":
            kinds = re.findall(r"'([^']+)'", context["expected_tags"])
            expected = " or ".join(f"'{kind}'" for kind in kinds)
            near = nearest(context["tag"], kinds)
            return f"{key}.kind: expected {expected}, found '{context['tag']}'.{near}"
        case "value_error" | "assertion_error":
            text = str(context.get("error", problem["msg"])).rstrip(".")
            return f"{key}: {text}." if key else f"{text}."
        case _:
            expected = problem["msg"].replace("Input should be", "expected").rstrip(".")
            expected = re.sub(r"a valid (tuple|list)\b", "a list", expected)
            expected = re.sub(r"a valid dictionary( or instance of \w+)?", "keys with values", expected)
            return f"{key}: {expected}, found {found}."


def _unknown(key: str, known: set[str], values: Any) -> str:
    """The sentence about a key that does not exist."""
    where = "." if len(key) > LONGEST_KEY else f".{nearest(key, known)}"
    if key in known:  # it exists for another kind: naming it as the nearest key would be no help
        for part in key.split(".")[:-1]:
            values = values.get(part) if isinstance(values, dict) else None
        kind = values.get(KIND) if isinstance(values, dict) else None
        where = f" where {key.rpartition('.')[0]}.kind is " + (f"'{kind}'." if kind else "the default.")
    return f"{shown(key, LONGEST_KEY, quoted=False)} is not a key{where}"


def _key(loc: Sequence[str | int], values: Any, missing: bool) -> str:
    """Pydantic's location without the names of union members that it puts between the keys."""
    path: list[str] = []
    for position, part in enumerate(loc):
        if missing and position == len(loc) - 1:
            path.append(str(part))
            continue
        inside = (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        if inside:
            values = values[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
            path.append(str(part))
    return ".".join(path)


def _authors(source: str, mistakes: Iterable[Mistake], overrides: Sequence[Override]) -> str:
    """Who made the mistakes: overrides, `source`, or both together."""
    only_overrides, authors = True, list[Override]()
    for one in mistakes:
        path = one.key.split(".") if one.key else []
        # A missing key is a mistake of what should hold it.
        path = {"missing": path[:-1], "union_tag_invalid": [*path, KIND]}.get(one.problem, path)
        setters = [override for override in overrides if override.covers(path)]
        inside = [override for override in overrides if override.path[: len(path)] == tuple(path)]
        words = re.findall(r"\w+", one.sentence)
        authors += setters or [override for override in inside if _word(override) in words] or inside
        only_overrides = only_overrides and bool(setters)
    texts = dict.fromkeys(f"'{override.text:.60}'" for override in authors)
    if not texts:
        return source
    listed = f"override{'s' if len(texts) > 1 else ''} {', '.join(texts)}"
    return listed if only_overrides else f"{source} with {listed}"


def _word(override: Override) -> str:
    """What a sentence about this override would call it."""
    return override.path[-2 if override.path[-1] == KIND and len(override.path) > 1 else -1]


@cache
def shipped_schema() -> dict[str, Any]:
    """The schema of this version's config files."""
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))


@cache
def _shipped_keys() -> frozenset[tuple[str, ...]]:
    return frozenset(key_paths(shipped_schema()))


def unknown_keys(values: Any) -> list[str]:
    """Every key in `values` that no config has at its place, such as `training.stepz`, whatever the `kind`s.

    In open mappings, and where the schema knows no keys, every key is accepted.
    """
    known = _shipped_keys()
    with_keys = {path[:-1] for path in known}

    def walk(value: Any, place: tuple[str, ...], form: tuple[str, ...]) -> Iterator[str]:
        """`place` is where the value lies, `form` that place as the schema names it."""
        items = enumerate(value) if isinstance(value, list) else isinstance(value, dict) and value.items()
        for key, inner in items or ():
            here = (*place, str(key))
            if below := next((path for path in ((*form, str(key)), (*form, "*")) if path in known), None):
                yield from walk(inner, here, below)
            elif isinstance(value, dict) and form in with_keys:
                yield ".".join(here)

    return list(walk(values, (), ()))


def forms_of(node: Any, schema: Schema) -> Iterator[Schema]:
    """`node` with references and unions resolved: each form that a value there may have."""
    if not isinstance(node, Mapping):
        return
    if "$ref" in node:
        yield from forms_of(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
        return
    choices = [choice for branch in BRANCHES for choice in node.get(branch, ())]
    for choice in choices:
        yield from forms_of(choice, schema)
    if not choices:
        yield node


def key_paths(schema: Schema) -> Iterator[tuple[str, ...]]:
    """Every key that the schema knows, as a path; entries of lists and of open mappings are '*'."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for form in forms_of(node, schema):
            for key, value in form.get("properties", {}).items():
                yield (*path, key)
                yield from walk(value, (*path, key))
            for inner in filter(None, (form.get("items"), form.get("additionalProperties"))):
                yield (*path, "*")
                yield from walk(inner, (*path, "*"))

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
