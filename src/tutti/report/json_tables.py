"""Tables and facts from JSON of any form, for files whose content the writer decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tutti.report.blocks import Block, Facts
from tutti.report.formatting import anything, duration
from tutti.report.tables import ABSENT, Cell, Column, Table, table

MAX_DEPTH = 4
WORDS = {
    "seconds": "robot time",
    "shortest": "shortest episode, frames",
    "longest": "longest episode, frames",
    "vocab_size": "vocabulary, tokens",
    "text_length": "text length, tokens",
    "normalization": "normalisation",
    "stored_image_shapes": "stored images, pixels",
}


def words(name: str) -> str:
    """A key as words: "open_loop_error" is "open loop error"."""
    return WORDS.get(name, name.replace("_", " "))


def blocks_of(value: Any, title: str = "", depth: int = 0) -> list[Block]:
    """Scalars become facts; a list of objects, or an object of like objects, a table; the rest recurs."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return blocks_of(value[0], title, depth)
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return [_table([("", row) for row in value], title, named=False)]
    if not isinstance(value, dict):
        return [Facts(pairs=[(title or "value", anything(value))])] if value not in (None, [], {}) else []
    if _like(list(value.values())):
        return [_table([(words(str(k)), row) for k, row in value.items()], title, named=True)]
    nested = {k: v for k, v in value.items() if _is_nested(v) and depth < MAX_DEPTH}
    facts = [(words(str(k)), _value(str(k), v)) for k, v in value.items() if k not in nested]
    blocks: list[Block] = [Facts(pairs=facts, title=title)] if facts else []
    for key, inner in nested.items():
        blocks += blocks_of(inner, words(str(key)), depth + 1)
    return blocks


def _value(key: str, value: Any) -> str:
    if key.endswith("seconds") and isinstance(value, int | float):
        return duration(value)
    return anything(value).replace("observation.images.", "")


def _is_nested(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(row, dict) for row in value)
    return isinstance(value, dict) and len(value) > 0


def _like(values: Sequence[Any]) -> bool:
    """Whether these are two or more flat objects that share a key: the rows of a table."""
    if len(values) < 2 or not all(isinstance(v, dict) and v for v in values):
        return False
    if any(_is_nested(inner) for v in values for inner in v.values()):
        return False
    return bool(set.intersection(*(set(v) for v in values)))


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str, *, named: bool) -> Table:
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    name: list[Column[tuple[str, Mapping[str, Any]]]] = [(title, "", lambda row: row[0])] if named else []
    columns = [*name, *((words(key), "", lambda row, key=key: _cell(row[1], key)) for key in keys)]
    return table(rows, columns, "" if named else title)


def _cell(row: Mapping[str, Any], key: str) -> Cell:
    mood = "" if isinstance(row.get(key), int | float) else "text"
    return Cell(text=anything(row[key]), mood=mood) if key in row else ABSENT
