"""UserError: a mistake that its user can mend. It lies below everything, where nothing imports torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

SCREEN = (24, 2400)
"""Lines and characters of an error message, which must fit on one screen."""


class UserError(ValueError):
    """Something the user can mend: bad input, a bad key, a full disk, a missing library.

    The message names the thing (file, key, step), what was expected, what was found, and the cure. The
    command line prints it alone, without a traceback.

    What a file says may be in it, so the middle of a message beyond a screen is left out, and control
    characters, which could steer a terminal, are written as escapes.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_on_one_screen(message))


def near_miss(name: str, known: Collection[str]) -> str:
    """The end of a message, " Did you mean 'x'?"; empty where no known name is like this one."""
    close = get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _on_one_screen(text: str) -> str:
    most_lines, most = SCREEN
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
    lines = text.split("\n")
    if len(lines) > most_lines:
        left_out = f"... ({len(lines) - most_lines + 1} lines left out)"
        text = "\n".join([*lines[: most_lines - 5], left_out, *lines[-4:]])
    if len(text) > most:
        head, tail = text[: most * 3 // 4], text[-most // 5 :]
        text = f"{head} ... ({len(text) - len(head) - len(tail)} characters left out) ... {tail}"
    return text
