"""Which keys may change while a run goes on: every key is in the table, and the docs show the table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from tutti.config.run_config import RunConfig
from tutti.data.config import DataConfig
from tutti.key_effects import (
    ADDED_LATER,
    ANOTHER_RESULT,
    EFFECTS,
    LAST_BITS,
    NO_EFFECT,
    effect_of,
    of_effect,
    with_effect,
)
from tutti.runs.build import TRAIN_SECTIONS
from tutti.training.config import TrainingConfig

ROOT = Path(__file__).parents[2]
SCHEMA: dict[str, Any] = RunConfig.model_json_schema()


def keys(node: dict[str, Any], path: tuple[str, ...] = (), seen: tuple[str, ...] = ()) -> Iterator[str]:
    """All keys, in every kind of every section, sections included."""
    if reference := node.get("$ref"):
        if reference not in seen:
            yield from keys(SCHEMA["$defs"][reference.split("/")[-1]], path, (*seen, reference))
        return
    for choice in (
        *node.get("anyOf", ()),
        *node.get("oneOf", ()),
        *([node["items"]] if "items" in node else ()),
    ):
        yield from keys(choice, path, seen)
    for name, below in node.get("properties", {}).items():
        yield ".".join((*path, name))
        yield from keys(below, (*path, name), seen)


def test_every_key_is_in_exactly_one_class_and_every_entry_is_a_key() -> None:
    known = set(keys(SCHEMA))
    assert {"training.parallel.bucket_mb", "data.sources.weight", "training.gradients.zclip.decay"} <= known
    whole = {"training", "data"}  # their keys are decided one by one
    assert {key for key in known if not any(f"{key}.".startswith(f"{entry}.") for entry in EFFECTS)} == whole
    assert len(NO_EFFECT) + len(LAST_BITS) + len(ANOTHER_RESULT) == len(EFFECTS), "one class each"
    assert set(EFFECTS) <= known
    assert effect_of("training.other") == effect_of("training") == "another result"


@pytest.mark.parametrize(("section", "config"), [("training", TrainingConfig), ("data", DataConfig)])
def test_each_key_of_training_and_data_was_decided_by_itself(section: str, config: Any) -> None:
    assert {f"{section}.{name}" for name in config.model_fields} <= set(EFFECTS)
    assert section in TRAIN_SECTIONS and section not in EFFECTS


def test_the_longest_entry_decides_and_places_in_lists_do_not_count() -> None:
    lines = ['training.parallel.kind: "ddp" -> "fsdp"', "training.parallel.timeout: 1.0 -> 2.0"]
    lines += ['data.sources.0.path: "a" -> "b: c"', "data.sources.12.weight: 1 -> 2", "training.ema: 0 -> 1"]
    assert of_effect(lines, "none") == lines[1:3]
    assert of_effect(lines, "last bits") == lines[:1]
    assert of_effect(lines, "another result", "last bits") == [lines[0], *lines[3:]]
    assert effect_of("objective.mine.options.workers") == "another result"
    values = {"training": {"parallel": {"kind": "ddp", "timeout": 1}}, "data": {"sources": [{"path": "a"}]}}
    assert with_effect(values) == {"training": {"parallel": {"kind": "ddp"}}, "data": {"sources": [{}]}}


def test_a_key_that_came_later_is_hashed_only_where_it_says_something() -> None:
    assert set(ADDED_LATER) <= set(keys(SCHEMA))
    for key, before in ADDED_LATER.items():
        *above, name = key.split(".")
        assert with_effect(nested(above, {name: before})) == nested(above, {})
        assert with_effect(nested(above, {name: "other"})) == nested(above, {name: "other"})


def nested(names: list[str], value: Any) -> Any:
    """The value below these keys."""
    return reduce(lambda inner, name: {name: inner}, reversed(names), value)


def test_the_docs_show_the_table() -> None:
    page = (ROOT / "docs" / "reference" / "key-effects.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([^`]+)` \| (no|last bits) \| (.+) \|$", page, re.MULTILINE)
    table = [
        (key, effect, why)
        for effect, rows in (("no", NO_EFFECT), ("last bits", LAST_BITS))
        for key, why in rows.items()
    ]
    assert shown == table
    assert "--allow-inexact" in page
