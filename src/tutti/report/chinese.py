"""A page in Chinese: its texts by the table in templates/zh.toml. What the table does not have stays English,
and so does what comes from data: instructions, code, names of tasks."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from html import escape, unescape
from typing import Literal

from tutti.report.blocks import TEMPLATES

Language = Literal["en", "zh"]
_AS_IT_IS = re.compile(r"(<(script|style|pre|q|code)\b.*?</\2>)", re.DOTALL)
_TEXT = re.compile(r'(?:^|(?<=>))([^<>]+)(?=<|$)|\b(aria-label|data-tip|alt|title)="([^"]*)"')
_NAMED = re.compile(r"(&quot;(?:name|label|unit)&quot;:&quot;)(.*?)(&quot;)")


def in_language(page: str, language: Language) -> str:
    """The page in a language."""
    if language == "en":
        return page
    parts = _AS_IT_IS.split(page.replace('<html lang="en">', '<html lang="zh-Hans">', 1))
    for number in range(0, len(parts), 3):  # between them: what is kept, and the name of its element
        text = _TEXT.sub(_element, parts[number])
        parts[number] = _NAMED.sub(lambda found: found[1] + _escaped(found[2]) + found[3], text)
    del parts[2::3]
    return "".join(parts)


def translated(text: str) -> str:
    """The Chinese of a whole text; itself where the table has none.

    >>> translated("in 9 min 00 s"), translated("put the puck there")
    ('用时 9 分 00 秒', 'put the puck there')
    """
    exact, patterns = _table()
    bare = text.replace("\u00a0", " ").strip()
    found = exact.get(bare)
    for pattern, words in () if found is not None else patterns:
        if match := pattern.fullmatch(bare):
            groups = (group if group == bare else translated(group) for group in match.groups(""))
            found = words.format(*map(_time, groups))
            break
    lead, tail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return text if found is None else f"{lead}{found}{tail}"


@cache
def _table() -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]]]:
    told = tomllib.loads((TEMPLATES / "zh.toml").read_text("utf-8"))
    return told["exact"], [(re.compile(key, re.DOTALL), words) for key, words in told["patterns"].items()]


def _time(text: str) -> str:
    """A duration in Chinese: "9 min 00 s"."""
    if not re.fullmatch(r"(\d[\d,.]* (d|h|min|s|ms) ?)+", text):
        return text
    return (
        text.replace("min", "分")
        .replace("ms", "毫秒")
        .replace("h", "小时")
        .replace(" s", " 秒")
        .replace("d", "天")
    )


def _escaped(text: str) -> str:
    return escape(translated(unescape(text)))


def _element(found: re.Match[str]) -> str:
    if found[1] is not None:
        return _escaped(found[1])
    return f'{found[2]}="{_lines(found[3])}"'


def _lines(value: str) -> str:
    """An attribute, line by line; of "title: values" the title."""
    made: list[str] = []
    for line in value.split("\n"):
        head, colon, rest = line.partition(": ")
        whole = _escaped(line)
        made.append(whole if whole != line or not colon else f"{_escaped(head)}{colon}{rest}")
    return "\n".join(made)
