"""Gives Tutti hundreds of odd configs and overrides and counts what becomes of them.

    python benchmarks/odd_configs.py                 # 600 inputs, benchmarks/results/odd_configs.{md,json}

A value is judged beforehand by the published schema (`tutti schema`), read by a small validator of its own:
what the schema forbids must be refused, and so must hostile YAML texts. Wanted: no traceback, no hang, no
large memory, a message of one screen. Exit code 1 if any input ends otherwise.
"""

from __future__ import annotations

import json
import math
import operator
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bounded_process import BoundedProcess, Outcome, command_line, kind_of

from tutti.config.run_config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((REPOSITORY / "src" / "tutti" / "config" / "schema.json").read_text())
CONFIGS = ("smoke.yaml", "demo.yaml")
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        0.5,
        -0.0,
        1e-300,
        1e300,
        10**9,
        10**18,
        2**63,
        10**400,
        math.nan,
        math.inf,
    ),
    *(
        -math.inf,
        "",
        "a",
        "auto",
        "off",
        "none",
        "0",
        "1e-3",
        "..",
        "/",
        "~",
        "a" * 10_000,
        "日本語",
        "\x00",
        "a:B",
    ),
    *(
        "builtins:eval",
        "..a:B",
        "os:system",
        [],
        [1],
        [[]],
        [None],
        ["a"],
        list(range(1000)),
        {},
        {"kind": "x"},
    ),
    *(
        {"a": 1},
        {"kind": None},
        {"kind": ["x"]},
        {"start": 1},
        {1: 2},
        [{}],
        [[1, 2], [3, 4]],
        "2026-11-27",
        "0x10",
    ),
)
TEXTS = {
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"b{i}: &b{i} [*a, *a, *a, *a]\n" for i in range(1)),
    "alias": "training: &t {steps: 5, also: *t}\n",
    "list": "[1, 2]\n",
    "word": "training\n",
    "tabs": "training:\n\tsteps: 5\n",
    "twice": "seed: 1\nseed: 2\n",
    "tag": "seed: !!python/object/apply:os.system [touch canary]\n",
    "int tag": "seed: !!int abc\n",
    "binary": "seed: !!binary abc\n",
    "octal": "seed: 010\n",
    "minutes": "seed: 1:30\n",
    "date": "name: 2026-11-27\n",
    "bad date": "name: 2026-99-99\n",
    "deep": "training: " + "[" * 500 + "]" * 500 + "\n",
    "long": "name: " + "x" * 10**6 + "\n",
    "huge number": "seed: " + "9" * 5000 + "\n",
    "key list": "? [a, b]\n: 1\n",
    "key map": "{a: 1}: 2\n",
    "key null": "null: 1\n",
    "control": "name: a\x07b\n",
    "escape": 'name: "\\e[31m"\n',
    "documents": "seed: 1\n---\nseed: 2\n",
    "merge": "training:\n  <<: {steps: 5}\n",
    "yes": "seed: yes\n",
    "total": "objective:\n  total: {kind: align, weight: 1}\n",
    "dotted": "objective:\n  a.b: {kind: align, weight: 1}\n",
    "clip": "training: {gradients: {clip_norm: .nan}}\n",
    "class": "objective:\n  mine: {kind: 'sys:X'}\n",
    "builtin": "objective:\n  mine: {kind: 'builtins:int'}\n",
    "relative": "objective:\n  mine: {kind: '..a:B'}\n",
    "empty class": "model: {action: {kind: ':'}}\n",
    "not text": "\xff\xfe",
    "unclosed": "name: [a\n",
}
SHORT_FORMS = {(("training", "compile"), bool)}
"""Keys and types that may be given beside what the schema says: `compile: true` is `blocks`."""
TAKEN = {"date", "bad date", "class", "builtin"}
"""Texts that may be taken: a date is a name, and a class is looked for when it is built."""
OVERRIDES = (
    *("training.steps", "=5", "training..steps=5", "training.steps=", "training.steps=[", ".=1", "a=b=c"),
    *(
        "training.steps.x=5",
        "training=5",
        "training={}",
        "seed=&a [*a]",
        "seed=!!python/name:os.system",
        "x" * 10_000,
    ),
    *(
        "training.stepz=5",
        "trainign.steps=5",
        "data.sources[0].path=x",
        "data.sources.0.path=x",
        "seed=1 # x",
    ),
    *(
        "training.steps=5e",
        "seed=0x7f",
        "seed=--1",
        "name=\x1b[31mred",
        "objective.align.kind=recon",
        "SEED=1",
    ),
)


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its reference followed."""
    return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


KINDS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: type(value) is int or (type(value) is float and value.is_integer()),
    "number": lambda value: type(value) in (int, float),
    "array": lambda value: isinstance(value, list | tuple),
    "object": lambda value: isinstance(value, dict),
}
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether JSON schema allows the value (the words that pydantic writes)."""
    schema = resolve(schema)
    alternatives = [schema[word] for word in ("anyOf", "oneOf") if word in schema]
    constants = [schema["const"]] if "const" in schema else schema.get("enum", [value])
    return (
        all(any(fits(value, one) for one in choice) for choice in alternatives)
        and any(value == one and type(value) is type(one) for one in constants)
        and ("type" not in schema or KINDS[schema["type"]](value))
        and (
            not KINDS["number"](value)
            or all(BOUNDS[word](value, schema[word]) for word in BOUNDS if word in schema)
        )
        and (not isinstance(value, str) or _text_fits(value, schema))
        and (not isinstance(value, list | tuple) or _list_fits(value, schema))
        and (not isinstance(value, dict) or _object_fits(value, schema))
    )


def _text_fits(value: str, schema: dict[str, Any]) -> bool:
    return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))


def _list_fits(value: Sequence[Any], schema: dict[str, Any]) -> bool:
    first = schema.get("prefixItems", [])
    items = [*first, *[schema.get("items", {})] * (len(value) - len(first))]
    right_length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
    return right_length and all(fits(one, item) for one, item in zip(value, items, strict=False))


def _object_fits(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    if set(schema.get("required", ())) - value.keys() or len(value) < schema.get("minProperties", 0):
        return False
    others = [value[key] for key in value if key not in known]
    if rest is False and others:
        return False
    return all(fits(value[key], known[key]) for key in value if key in known) and (
        not isinstance(rest, dict) or all(fits(one, rest) for one in others)
    )


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a config, the inner ones too."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield (*path, key)
            yield from leaves(below, (*path, key))


def load(request: list[Any]) -> str:
    """Loads the config of a file with overrides; what was understood as text."""
    path, overrides = request
    return load_config(Path(path), overrides).model_dump_json()


def inputs(count: int, folder: Path) -> Iterator[tuple[str, str, str, list[Any]]]:
    """Line, note, judgement and request of each: texts, overrides, then odd values in shipped configs."""
    place = folder / "odd.yaml"
    smoke = REPOSITORY / "configs" / CONFIGS[0]
    for name, text in TEXTS.items():
        place.write_bytes(text.encode("latin-1") if name == "not text" else text.encode())
        yield (
            "texts",
            name,
            "may be taken" if name in TAKEN else "refused: hostile or wrong",
            [str(place), []],
        )
    for text in OVERRIDES:
        allowed = text in ("seed=0x7f", "training={}", "seed=1 # x", "objective.align.kind=recon")
        yield "overrides", text[:40], "may be taken" if allowed else "refused: wrong", [str(smoke), [text]]
    random = np.random.default_rng(11)
    shipped = {}
    for name in CONFIGS:
        full = json.loads(load([str(REPOSITORY / "configs" / name), []]))
        shipped[name] = full, sorted(leaves(full))
    for number in range(count - len(TEXTS) - len(OVERRIDES)):
        name = CONFIGS[number % len(CONFIGS)]
        values = yaml.safe_load((REPOSITORY / "configs" / name).read_text())
        full, keys = shipped[name]
        path = keys[int(random.integers(len(keys)))]
        odd = VALUES[int(random.integers(len(VALUES)))]
        below: Any = values
        for key in path[:-1]:
            if not isinstance(below.get(key), dict):
                below[key] = {}
            below = below[key]
        below[path[-1]] = odd
        try:
            place.write_text(yaml.safe_dump(values, allow_unicode=True))
        except yaml.YAMLError:
            continue
        # NaN and infinity are numbers to the schema, but no setting of a training.
        finite = not isinstance(odd, float) or math.isfinite(odd)
        merged = json.loads(json.dumps(full))
        below, given = merged, values
        for key in path[:-1]:
            below, given = below[key], given[key]
        if path[-1] == "kind":  # the defaults of the former kind are no keys of this one
            below.clear()
        # Written without quotes, which YAML 1.2 reads as the number.
        meant = 1e-3 if odd == "1e-3" else odd
        below |= given if path[-1] == "kind" else {path[-1]: meant}
        taken = (finite and fits(merged, SCHEMA)) or (path, type(odd)) in SHORT_FORMS
        judged = "may be taken" if taken else "refused: by the schema"
        yield "values", f"{name}: {'.'.join(path)} = {str(odd)[:30]}", judged, [str(place), []]


def outcomes_of(count: int) -> list[Outcome]:
    """What became of `count` inputs."""
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        process = BoundedProcess(__file__)
        for number, (line, note, judged, request) in enumerate(inputs(count, Path(name))):
            said = process.ask(request)
            kind = kind_of(said, judged, lambda _: True)
            if kind == "too strict":  # more than the schema can say may be wrong
                kind = "refused"
            if kind == "silent" and judged == "may be taken":
                kind = "taken"
            message = said.get("refused") or said.get("traceback") or ""
            outcomes.append(
                Outcome(line, number, note, judged, kind, message, said["seconds"], said["megabytes"])
            )
        process.close()
    return outcomes


if __name__ == "__main__":
    sys.exit(command_line(__doc__, "odd_configs", 600, load, outcomes_of))
