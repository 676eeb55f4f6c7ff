"""The message for a data set that is wrong, in any format."""

from __future__ import annotations

from pathlib import Path

from tutti.errors import UserError
from tutti.storage.reading import shown

COPY_AGAIN = "copy or record the data set again."


def data_error(
    problem: str, *, expected: object = "", found: object = "", cure: str = COPY_AGAIN
) -> UserError:
    """`problem` names file and key; `expected` and `found` are given where it does not say them."""
    lines = {"expected": expected, "found": found, "cure": cure}
    texts = {name: shown(str(text), 500, quoted=False) for name, text in lines.items() if text}
    return UserError(problem + "".join(f"\n  {name + ':':9} {text}" for name, text in texts.items()))


def no_permission(path: Path) -> UserError:
    """The message for a file that may not be read, as the videos that LeRobot joins (mode 0600)."""
    problem = f"{path} may not be read by this user: its permissions forbid it."
    return data_error(problem, cure="let its owner allow that: chmod -R a+rX on the folder of the data set.")
