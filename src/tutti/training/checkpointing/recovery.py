"""The newest checkpoint that is whole: a damaged one is set aside, and said, and the one before it taken."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tutti.storage.checkpoint import checkpoints, verify
from tutti.storage.files import explain_disk_errors
from tutti.types import UserError

log = logging.getLogger("tutti.training")

DAMAGED = "damaged-"


def newest_whole(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The folder of a run's newest checkpoint that is whole, and the names of the damaged ones after it.

    Those are renamed to `damaged-step-N`, never deleted, once an older one has proved to be whole. (None, ())
    for a run without checkpoints.

    Raises: UserError if there are checkpoints and none is whole; then nothing is renamed, for a run that
    began anew by itself would hide the loss.
    """
    wrong: list[tuple[Path, UserError]] = []
    for folder in reversed(checkpoints(run)):
        try:
            verify(folder)
        except UserError as error:
            wrong.append((folder, error))
            continue
        for bad, error in wrong:
            aside = _set_aside(bad)
            first = str(error).splitlines()[0].split(" Delete the folder", maxsplit=1)[0]
            log.warning(
                "checkpoint %s is damaged (%s): renamed to %s, going on from %s instead",
                bad.name,
                first,
                aside.name,
                folder.name,
            )
        return folder, tuple(bad.name for bad, _ in wrong)
    if wrong:
        listed = "\n".join(f"  {str(error).splitlines()[0]}" for _, error in wrong)
        raise UserError(
            f"{run}: none of the {len(wrong)} checkpoints is whole, so the run cannot go on:\n{listed}\n"
            "Restore one of them from a copy, or delete the folder checkpoints to train from the start."
        )
    return None, ()


def _set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint; a number is added where an older wreck has the name already."""
    aside = folder.with_name(DAMAGED + folder.name)
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}-{number}")
    with explain_disk_errors(folder):
        os.replace(folder, aside)
    return aside
