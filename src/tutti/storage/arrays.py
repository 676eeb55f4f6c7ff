"""Arrays that take long to make, kept on the disk: made once, mapped by every process that needs them.

Each set of arrays has a folder:

    ~/.cache/tutti/index/0123456789abcdef01234567/
      arrays            all of them, one behind the other
      complete.json     what they were made of, and where each lies, with a checksum
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from tutti.errors import UserError
from tutti.storage.files import exclusive_lock, write_json
from tutti.storage.reading import read_json

log = logging.getLogger("tutti.storage")

Arrays = Mapping[str, np.ndarray]
FRESH = 2.0
"""Seconds that a file must be old: one that changes twice in a moment may keep its time (of FAT, 2 s)."""
_FORMAT = 1
"""Raised when the bytes get another meaning."""
_BLOCK, _ALIGNED = 2**16, 2**12


def kept(folder: Path, made_of: str | None, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` gives, read-only, as pages of a file in `folder` that all processes share.

    `made_of` tells what they depend on: where the folder has them of the same, they are not made but mapped,
    after all of their bytes are compared with their checksums; damaged ones are made anew, and so are those
    of something else, whose place they take. Of several processes one makes them and the others wait. None:
    they are made and not kept, and so they are where the folder cannot be written or has not the room.

    Raises: what `make` raises.
    """
    if made_of is None:
        return make()
    if (found := _mapped(folder, made_of)) is not None:
        return found
    with ExitStack() as stack:
        with suppress(OSError, UserError):
            folder.mkdir(parents=True, exist_ok=True)
            busy = "%s: another process is making this index; waiting for it"
            stack.enter_context(exclusive_lock(folder, waiting=lambda: log.info(busy, folder)))
            if (found := _mapped(folder, made_of)) is not None:  # another process may have made it meanwhile
                return found
        made = make()
        with suppress(OSError, UserError):
            _write(folder, made_of, made)
            # Those that were made are private to this process: they go.
            return _mapped(folder, made_of) or made
    return made


def stamp(path: Path) -> str | None:
    """A digest of the names, sizes and times of all files at or below a path: another one where something was
    written there. None where a file was written just now, and may be again without a trace, or cannot be
    looked at."""
    digest, newest, seen = hashlib.sha256(), 0, set[tuple[int, int]]()
    walk = os.walk(path, followlinks=True) if path.is_dir() else [(str(path.parent), [], [path.name])]
    try:
        for folder, inside, names in walk:
            inside.sort()
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen:  # a link leads back to it
                inside.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            for name in sorted(names):
                found = os.stat(os.path.join(folder, name))
                said = folder, name, found.st_size, found.st_mtime_ns, found.st_ctime_ns
                digest.update(repr(said).encode())
                newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
    except OSError:
        return None
    return None if newest > time.time_ns() - FRESH * 1e9 else digest.hexdigest()


def _mapped(folder: Path, made_of: str) -> dict[str, np.ndarray] | None:
    """The arrays, if they are there and of the same."""
    marker, path = folder / "complete.json", folder / "arrays"
    if not marker.is_file():
        return None
    try:
        said: Any = read_json(marker)
        if (said["format"], said["made_of"]) != (_FORMAT, made_of):
            return None
        found: dict[str, np.ndarray] = {}
        for name, one in said["arrays"].items():
            shape, dtype = tuple(one["shape"]), np.dtype(one["dtype"])
            if dtype.hasobject:
                raise ValueError(f"{name} holds no numbers")
            # A plain array over the same pages: fancy indexing of np.memmap itself costs more Python.
            mapped = math.prod(shape) and np.memmap(path, dtype, "r", offset=one["begin"], shape=shape)
            values = np.asarray(mapped) if math.prod(shape) else np.empty(shape, dtype)
            if checksum(values) != one["sum"]:
                raise ValueError(f"{name} is not what was written")
            found[name] = values
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        log.warning("%s is damaged (%s); it is made anew", folder, str(error).splitlines()[0][:200])
        return None
    with suppress(OSError):  # where it belongs to somebody else
        os.utime(folder)
    return found


def packed(texts: Sequence[str]) -> np.ndarray:
    """Texts as an array of bytes."""
    return np.frombuffer(json.dumps(texts).encode(), np.uint8)


def unpacked(written: np.ndarray) -> tuple[str, ...]:
    """The inverse of `packed`."""
    return tuple(json.loads(written.tobytes()))


def checksum(values: np.ndarray) -> str:
    """Of an array's bytes: a digest of the sums of the 64-bit words of each 64 KiB. A word or page that is
    not what it was shows; it is as fast as reading, and no proof against intent."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    whole = len(raw) // _BLOCK * _BLOCK
    sums = raw[:whole].view(np.uint64).reshape(-1, _BLOCK // 8).sum(axis=1, dtype=np.uint64)
    return hashlib.blake2b(sums.tobytes() + raw[whole:].tobytes(), digest_size=16).hexdigest()


def _write(folder: Path, made_of: str, made: Arrays) -> None:
    (marker := folder / "complete.json").unlink(missing_ok=True)
    said: dict[str, dict[str, Any]] = {}
    with NamedTemporaryFile(dir=folder, delete=False) as file:
        try:
            for name, values in made.items():
                begin = file.seek(-(-file.tell() // _ALIGNED) * _ALIGNED)
                file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
                own = {"dtype": values.dtype.str, "shape": values.shape, "begin": begin}
                said[name] = {**own, "sum": checksum(values)}
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, folder / "arrays")
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise
    # Last: without it they do not count as complete.
    write_json(marker, {"format": _FORMAT, "made_of": made_of, "arrays": said})
