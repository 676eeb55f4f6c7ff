"""What a section of the report is made of; the page template draws each block by its `kind`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tutti.report.svg.elements import Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Drawings side by side, or below each other where they are wide."""

    charts: Sequence[Chart]
    kind: ClassVar[str] = "charts"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names with their values, in a list; a value may be long."""

    pairs: Sequence[tuple[str, str]]
    title: str = ""
    kind: ClassVar[str] = "facts"


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
    kind: ClassVar[str] = "videos"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG as data address, with what it shows."""

    source: str
    caption: str
    kind: ClassVar[str] = "picture"


MOODS = {"fault": "bad", "warning": "warn", "hint": "hint", "ok": "good"}
"""The mood of a note for each severity of a finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A paragraph; `mood` "good", "bad" or "" colours its edge."""

    text: str
    mood: str = ""
    kind: ClassVar[str] = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Text in a fixed pitch, folded away under `title` unless `open`."""

    title: str
    text: str
    open: bool = False
    kind: ClassVar[str] = "code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Blocks that the reader opens."""

    title: str
    blocks: Sequence[Block]
    kind: ClassVar[str] = "fold"


Block = Charts | Table | Facts | Videos | Picture | Note | Code | Fold


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A numbered part of the page. `missing`, if set, says why there is nothing to show and how to get it."""

    id: str
    title: str
    lead: str = ""
    blocks: Sequence[Block] = field(default=())
    missing: str = ""
