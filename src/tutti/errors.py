"""UserError: a mistake that its user can mend. It lies below everything, where nothing imports torch."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection
from difflib import get_close_matches

SCREEN = (24, 2400)
"""Lines and characters of an error message, which must fit on one screen."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Steer a terminal, turn the direction of writing, or stand for a byte that is not UTF-8; line feed and tab
are left.
"""


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


class Terminated(SystemExit):
    """SIGTERM or SIGHUP was obeyed: the process ends with 128 + the signal's number.

    Not with 0, which would say that the work is done: Kubernetes starts a job anew only after another code.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)


def printable(text: str) -> str:
    """The text with control characters, which could steer a terminal, written as escapes."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def _on_one_screen(text: str) -> str:
    most_lines, most = SCREEN
    text = printable(text)
    lines = text.split("\n")
    if len(lines) > most_lines:
        left_out = f"... ({len(lines) - most_lines + 1} lines left out)"
        text = "\n".join([*lines[: most_lines - 5], left_out, *lines[-4:]])
    if len(text) > most:
        head, tail = text[: most * 3 // 4], text[-most // 5 :]
        text = f"{head} ... ({len(text) - len(head) - len(tail)} characters left out) ... {tail}"
    return text
