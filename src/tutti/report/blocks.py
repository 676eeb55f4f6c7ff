"""What a page is made of: sections of charts, tables, facts, videos and notes, and the page as HTML.

The page is one file with its styles, script and drawings; it loads nothing from the network.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tutti.findings import Finding
from tutti.report.formatting import NOTHING, WORDS
from tutti.report.svg.drawing import Chart

TEMPLATES = Path(__file__).parent / "templates"
T = TypeVar("T")


def data_address(kind: str, content: bytes) -> str:
    """The content of a file as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Drawings side by side, or below each other where they are wide; `small` ones many in a row."""

    charts: Sequence[Chart]
    small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table cell: its text, a smaller second text, and a word for its colour ("good", "bad", "quiet")."""

    text: str
    small: str = ""
    mood: str = ""


ABSENT = Cell(text=NOTHING, mood="quiet")
Column = tuple[str, str, Callable[[T], Cell | str]]
"""A head, its explanation, and what an item has in this column."""


def column(head: str, make: Callable[[T], Cell | str]) -> Column[T]:
    """A column with the explanation that templates/words.toml has for its head."""
    return head, WORDS["heads"].get(head, ""), make


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under heads; a head has an explanation (may be empty). The first column is the row's name."""

    heads: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    last_is_total: bool = False


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


def texts(table: Table, without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Heads and rows as plain text for the terminal, without the columns of the heads in `without`."""
    places = [place for place, (head, _) in enumerate(table.heads) if head not in without]
    rows = [[f"{row[place].text} {row[place].small}".strip() for place in places] for row in table.rows]
    return [table.heads[place][0] for place in places], rows


def markdown(table: Table) -> str:
    """The table as Markdown, its caption above."""
    heads, rows = texts(table)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([f"**{table.caption}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names with their values, in a list; a value may be long."""

    pairs: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One rollout. `source` is a data address, or empty where the video did not fit (`why` says so)."""

    success: bool
    label: str
    instruction: str
    source: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Videos:
    """The rollouts of each task."""

    groups: Sequence[tuple[str, Sequence[Video]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG, with what it shows."""

    png: bytes
    caption: str

    @property
    def source(self) -> str:
        """The picture as a data address."""
        return data_address("image/png", self.png)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Small pictures under a title, many in a row."""

    title: str
    pictures: Sequence[Picture]


MOODS = {"fault": "bad", "warning": "warn", "hint": "hint", "ok": "good"}
"""The mood of a note for each severity of a finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A paragraph; `mood` "good", "bad" or "" colours its edge."""

    text: str
    mood: str = ""


def note_of(finding: Finding) -> Note:
    """A finding as a note in the colour of its severity."""
    return Note(text=finding.text, mood=MOODS[finding.severity])


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Text in a fixed pitch, folded away under `title` unless `open`."""

    title: str
    text: str
    open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Blocks that the reader opens."""

    title: str
    blocks: Sequence[Block]


Block = Charts | Table | Facts | Videos | Picture | Gallery | Note | Code | Fold
"""The template draws each kind by the name of its class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A numbered part of the page. `missing`, if set, says why there is nothing to show and how to get it."""

    id: str = ""
    title: str = ""
    lead: str = ""
    blocks: Sequence[Block] = ()
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number at the top of the page."""

    value: str
    name: str
    small: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the template draws. `kicker` says what kind of page it is, `result` is its one sentence."""

    kicker: str
    name: str
    result: str
    tiles: Sequence[Tile]
    notes: Sequence[Note]
    warnings: Sequence[str]
    sections: Sequence[Section]
    footer: str


def render(page: Page) -> str:
    """The whole page; every text in it is escaped, and its content security policy forbids the network."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["prose"] = prose
    # Ours, and without "</": nothing in them can end the element they stand in.
    style, script = (Markup((TEMPLATES / f"report.{kind}").read_text("utf-8")) for kind in ("css", "js"))
    return environment.get_template("page.html").render(page=page, style=style, script=script)


def prose(text: str) -> Markup:
    """Escaped text in which `commands` are set as code and " %" stays on the line of its number."""
    safe = str(escape(text)).replace(" %", "\u00a0%")
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", safe))
