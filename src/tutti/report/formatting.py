"""Formats of numbers: seconds, counts, rates and values of JSON, with their unit."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Number = int | float
"""A real number as JSON gives it."""

NOTHING = "\u2013"  # this number does not exist


WORDS: dict[str, Any] = tomllib.loads(
    (Path(__file__).parent / "templates" / "words.toml").read_text(encoding="utf-8")
)
"""How keys, values, conditions and baselines are called, and what heads of tables mean."""


def words(name: str) -> str:
    """A key as words: "open_loop_error" is "open loop error"."""
    return WORDS["keys"].get(name, name.replace("_", " "))


def plain(value: Number, digits: int = 3) -> str:
    """`value` with `digits` significant digits, without an exponent where it can be read without one."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(rate: Number, decimals: int = 0) -> str:
    """A fraction in [0, 1] as "95 %"."""
    return f"{100 * rate:.{decimals}f} %"


def duration(seconds: Number) -> str:
    """Seconds as "0.4 s", "42 s", "11 min 40 s" or "2 h 05 min"."""
    if not math.isfinite(seconds) or seconds < 0:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: Number) -> str:
    """A number of things as "940", "52,301", "1.84 M" or "3.2 G"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{plain(value / size)} {letter}"
    return f"{value:,.0f}" if float(value).is_integer() else plain(value)


def capitalised(text: str) -> str:
    """The text with a capital letter first."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """Words as people list them: "a, b and c"."""
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)


def anything(value: object) -> str:
    """A JSON value in one line: numbers short, lists with commas, yes and no for booleans."""
    match value:
        case None:
            text = NOTHING
        case bool():
            text = "yes" if value else "no"
        case int():
            text = f"{value:,}"
        case float():
            text = plain(value, 4)
        case [[*_], *_] if all(type(item) is list for item in value):
            text = ", ".join(" x ".join(map(anything, item)) for item in value)
        case list() | tuple():
            text = ", ".join(map(anything, value))
        case dict():
            text = ", ".join(f"{key} {anything(item)}" for key, item in value.items())
        case _:
            text = str(value)
    return text
