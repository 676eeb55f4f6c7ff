"""Tables: made once from rows and columns, shown as HTML, as Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from tutti.report.formatting import NOTHING

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table cell: its text, a smaller second text, and a word for its colour ("good", "bad", "quiet")."""

    text: str
    small: str = ""
    mood: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under heads; a head has an explanation (may be empty). The first column is the row's name."""

    heads: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    last_is_total: bool = False
    kind: ClassVar[str] = "table"


ABSENT = Cell(text=NOTHING, mood="quiet")
Column = tuple[str, str, Callable[[T], Cell | str]]
"""A head, its explanation, and what an item has in this column."""


def table(
    items: Iterable[T], columns: Sequence[Column[T]], caption: str = "", *, last_is_total: bool = False
) -> Table:
    """One row for each item."""
    made = [[make(item) for _, _, make in columns] for item in items]
    return Table(
        heads=[(head, help) for head, help, _ in columns],
        rows=[[cell if isinstance(cell, Cell) else Cell(text=cell) for cell in row] for row in made],
        caption=caption,
        last_is_total=last_is_total,
    )


def markdown(table: Table) -> str:
    """The table as Markdown, its caption above."""
    rule = ["---", *["---:"] * (len(table.heads) - 1)]
    lines = [[head for head, _ in table.heads], rule]
    lines += [[_plain(cell).replace("|", "\\|") for cell in row] for row in table.rows]
    return "\n".join([f"**{table.caption}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def texts(table: Table, without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Heads and rows as plain text for the terminal, without the columns of the heads in `without`."""
    places = [place for place, (head, _) in enumerate(table.heads) if head not in without]
    heads = [table.heads[place][0] for place in places]
    return heads, [[_plain(row[place]) for place in places] for row in table.rows]


def _plain(cell: Cell) -> str:
    return f"{cell.text} {cell.small}".strip()
