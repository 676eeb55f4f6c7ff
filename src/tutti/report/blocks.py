"""Blocks of a section of the report: charts, facts, videos, notes; the template draws each by its `kind`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tutti.report.svg.elements import Chart
from tutti.report.tables import Table


def data_address(kind: str, content: bytes) -> str:
    """The content of a file as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Drawings side by side, or below each other where they are wide."""

    charts: Sequence[Chart]
    kind: ClassVar[str] = "charts"


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
    """A PNG, with what it shows."""

    png: bytes
    caption: str
    kind: ClassVar[str] = "picture"

    @property
    def source(self) -> str:
        """The picture as a data address."""
        return data_address("image/png", self.png)


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
