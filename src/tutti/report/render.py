"""Renders a page as one HTML file with its styles, script and drawings; it loads nothing from the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tutti.report.blocks import Note, Section

TEMPLATES = Path(__file__).parent / "templates"


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
    return environment.get_template("page.html").render(
        kicker=page.kicker,
        name=page.name,
        result=page.result,
        tiles=page.tiles,
        notes=page.notes,
        warnings=page.warnings,
        sections=page.sections,
        footer=page.footer,
        # Ours, and without "</": nothing in them can end the element they stand in.
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )


def prose(text: str) -> Markup:
    """Escaped text in which `commands` are set as code and " %" stays on the line of its number."""
    safe = str(escape(text)).replace(" %", "\u00a0%")
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", safe))
