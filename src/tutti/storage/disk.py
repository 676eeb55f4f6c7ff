"""Writing to a disk that may be full or closed: the reason in one sentence, and nothing half-written."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tutti.storage.files import FULL, write_atomically
from tutti.storage.manifest import open_inside
from tutti.types import UserError

TEMPORARY = ".writing-"


def disk_error(error: OSError, path: Path) -> UserError:
    """The message for a write that failed."""
    if error.errno in FULL:
        free = shutil.disk_usage(path if path.exists() else path.parent).free / 2**20
        return UserError(
            f"{path}: cannot write, the disk (or the quota or file size limit) is full; {free:.0f} MiB are "
            "free. Free space and run the same command again: it continues from the last checkpoint."
        )
    return UserError(
        f"{path}: cannot write ({error.strerror or error}). Check that the folder exists and is writable, "
        "and that disk, quota and file size limit are not reached."
    )


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a kill leaves the old file or the new one.

    Raises: UserError if the disk is full.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise disk_error(error, path) from error


def require_writable(folder: Path) -> None:
    """Makes the folder if it is not there, and tries whether a file can be written into it.

    Raises: UserError if not.
    """
    probe = folder / f"{TEMPORARY}probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"tutti")
        probe.unlink()
    except OSError as error:
        raise disk_error(error, folder) from error


def unpickled(path: Path, data: bytes | None = None) -> Any:
    """What `pickled` has made: tensors and plain values, nothing else. `data` is the content of the file
    `path`, which is read if it is not given. Every tensor is on the CPU, whatever device it was saved from:
    there may be none of that kind here, and on several ranks it may be another one's.

    Raises: UserError if the file cannot be read, is damaged, or holds anything else.
    """
    try:
        if data is None:
            with open_inside(path.parent, path.name) as file:
                data = file.read()
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        first = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{path}: cannot be read: missing, damaged, or more than tensors and plain values ({first})."
        ) from error


def pickled(value: Any) -> bytes:
    """What `torch.save` would write, as bytes: a full disk then fails as a plain OSError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
