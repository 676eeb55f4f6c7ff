"""A finding: what a run's records say in plain words, with the number behind it and a cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["fault", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "hint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`kind` names the check; `number` is what the sentence rests on; `cure` is what to try.

    `fault`: something does not do what the config says. `warning`: it will cost success. `hint`: worth
    knowing. `term` and `part` are empty where the finding is about no single one.
    """

    kind: str
    severity: Severity
    sentence: str
    number: float
    cure: str
    term: str = ""
    part: str = ""


def at(config: Any, *keys: str) -> Any:
    """The value at a path of a config; None where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def capital(text: str) -> str:
    """The text with a capital letter first."""
    return text[:1].upper() + text[1:]
