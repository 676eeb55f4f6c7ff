"""Error messages about a config: who made each mistake, the key, what was expected, and the nearest key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tutti.config.overrides import KIND, Override
from tutti.config.schema_keys import key_paths, nearest
from tutti.storage.reading import shown

MAX_MISTAKES = 8
LONGEST_KEY = 200
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
    schema: Mapping[str, Any],
    overrides: Sequence[Override] = (),
) -> str:
    """The message of a validation error: who made the mistakes, and one line for each key.

    `values` are those that pydantic refused, `source` the file that they come from, `schema` knows the keys.
    """
    known = {".".join(path) for path in key_paths(schema)}
    mistakes: list[Mistake] = []
    keys: set[str] = set()
    unexplained: set[str] = set()
    for problem in error.errors(include_url=False):
        key = _key(problem["loc"], values, missing=problem["type"] == "missing")
        if key not in keys and len(keys) == MAX_MISTAKES:
            unexplained.add(key)  # its sentence would look for near keys, which takes milliseconds
            continue
        keys.add(key)
        mistakes.append(Mistake(key, problem["type"], _sentence(key, problem, known, values)))
    return error_message(source, mistakes, overrides, len(unexplained))


def unknown_key_message(
    keys: Sequence[str],
    values: dict[str, Any],
    source: str,
    schema: Mapping[str, Any],
    overrides: Sequence[Override],
) -> str:
    """The message about `keys`, which do not exist in `schema`."""
    known = {".".join(path) for path in key_paths(schema)}
    mistakes = [Mistake(key, NOT_A_KEY, _unknown(key, known, values)) for key in keys[:MAX_MISTAKES]]
    return error_message(source, mistakes, overrides, len(keys) - len(mistakes))


def error_message(
    source: str, mistakes: Sequence[Mistake], overrides: Sequence[Override], unexplained: int = 0
) -> str:
    """Who made the mistakes, a line for each key, and how many more there are."""
    lines: dict[str, str] = {}
    for one in mistakes:
        before = lines.get(one.key)
        lines[one.key] = one.sentence if before is None else f"{before}\n    or: {one.sentence}"
    count = len(lines) + unexplained
    head = f"{_authors(source, mistakes, overrides)}: {count} mistake{'s' if count > 1 else ''}"
    more = [f"  ... and {unexplained} more"] if unexplained else []
    return "\n".join([head, *(f"  {line}" for line in lines.values()), *more])


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
