"""What the doctor says: one sentence with the number behind it and the cure, a problem or only a note."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """`about` is what was looked at. A `problem` makes the doctor's answer "no"."""

    about: str
    text: str
    problem: bool = False


def problem(about: str, text: str) -> Remark:
    """Something that must be mended before training."""
    return Remark(about=about, text=text, problem=True)


def note(about: str, text: str) -> Remark:
    """Something to know."""
    return Remark(about=about, text=text)
