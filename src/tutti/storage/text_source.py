"""TextSource: the tokenizer that a pre-trained language encoder was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """The `folder` where it lies, what stands `around` an instruction, and the most tokens that are read;
    `end` is the id that a text of its own ends with, `rows` how many tokens the tower has a vector for."""

    folder: Path
    around: tuple[str, str]
    longest: int | None
    end: int = 0
    rows: int | None = None
