"""Writing safely: atomic files and folders, and a full disk said in one sentence."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tutti.types import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says when a disk, a quota or the largest size of a file is reached."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a kill at any moment leaves the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".partial")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:  # a link that lay there would be followed, and its file overwritten
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def lock_file(folder: Path) -> io.FileIO:
    """The file `.lock` of a folder, open for a lock. It is not emptied, and a link in its place not followed.

    Raises: UserError if it cannot be had.
    """
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        return os.fdopen(handle, "rb", buffering=0)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be used as a lock ({error.strerror}). A writable folder with no such file, or a "
            "plain one, is expected."
        ) from error


def sync(path: Path) -> None:
    """Makes what was written to a file, by whomever, or renamed inside a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder below `folder`, and of itself."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def megabytes(count: int | float) -> str:
    """A number of bytes for people."""
    return f"{count / 2**20:,.1f} MiB"


@contextmanager
def full_disk_is_a_user_error(folder: Path, what: str, needed: Callable[[], str]) -> Iterator[None]:
    """Turns "no space left" (a spent quota, a file too large) in the block into a UserError with the cure.

    `needed` says how much space the step wants; it is asked only when the disk is full.
    """
    try:
        yield
    except Exception as error:
        # PyAV's and Arrow's own errors carry errno too, but are not all OSError.
        if getattr(error, "errno", None) not in FULL:
            raise
        home = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = megabytes(shutil.disk_usage(home).free)
        raise UserError(
            f"The disk is full while writing {what}.\n"
            f"  folder: {folder}\n  needed: {needed()}\n  free:   {free}\n"
            "  cure:   free some space there, or choose a folder on another disk, and run again."
        ) from error
