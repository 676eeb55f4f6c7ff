"""Builds a frame cache of any kind, shard by shard on all cores: what interrupts it costs the last shards.

It lies outside of the runs, under a name made of what it holds, so that all runs share it:

    ~/.cache/tutti/64px-0123456789abcdef01234567/
      frames.u8       the pictures, row by row      complete.json   what they are, once they are complete
      frames.partial  the pictures so far           built.json      how many rows are on the disk for certain
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from tutti.data.cache.decoding import SHARD_BYTES, Decoders
from tutti.data.episodes import EpisodeStore, Progress
from tutti.distributed.cores import usable_cores
from tutti.errors import UserError
from tutti.storage.files import (
    exclusive_lock,
    explain_disk_errors,
    explain_full_disk,
    megabytes,
    sync,
    write_atomically,
    write_json,
)
from tutti.storage.reading import read_json

log = logging.getLogger("tutti.data")

SHARD_ROWS = 1024
MOST_THREADS = 32
"""Each holds a shard and what it is made of."""
_FORMAT = 2
"""Raised when the meaning of the bytes changes, so that older caches are built anew."""
_CURE = (
    "choose another folder (data.cache.folder), smaller pictures (data.image_size), or what takes less room: "
    "data.cache.kind=jpeg or none"
)


class FrameFiles(ABC):
    """The files of one kind of cache of a store: how shards are packed, written and found complete.

    `names` are those of the files, `key` what the kind adds to the name of the folder, `label` in words.
    """

    names: tuple[str, ...]
    key: Mapping[str, Any] = {}
    label = ""

    def __init__(self, store: EpisodeStore, folder: Path, image_size: int) -> None:
        spec = store.spec
        self.store, self.image_size = store, image_size
        self.shape = (spec.num_frames, len(spec.views), 3, image_size, image_size)
        self.row_bytes = len(spec.views) * 3 * image_size**2
        views = {"format": _FORMAT, "data": store.fingerprint, "views": spec.views, "shape": self.shape}
        self.key = {**views, **self.key}
        name = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:24]
        self.home = folder / f"{image_size}px-{name}"

    @abstractmethod
    def sizes(self, said: Mapping[str, Any], rows: int) -> list[int]:
        """Bytes of each file with so many rows, of which `said` is what `state` gave then."""

    @abstractmethod
    def begin(self, files: Sequence[IO[bytes]], said: Mapping[str, Any]) -> None:
        """Makes ready to write behind what is there, where `said` is what `state` gave; nothing: from 0 on.

        Raises: OSError if it is known to be too much for the disk.
        """

    @abstractmethod
    def pack(self, pictures: UInt8[np.ndarray, "k v 3 s s"]) -> Any:
        """What `write` wants of a shard; in any thread."""

    @abstractmethod
    def write(self, first: int, packed: Any) -> None:
        """Writes the shard that begins at this row."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain values of what has been written so far."""

    @abstractmethod
    def expected(self, rows: int) -> int:
        """Bytes that all files will have, by those of the first so many rows."""

    def said(self, marker: Path) -> Mapping[str, Any]:
        """What of the file about a complete cache `sizes` needs."""
        return read_json(marker)

    def partial(self, name: str) -> str:
        """The name of a file that is not complete."""
        return Path(name).with_suffix(".partial").name

    def paths(self) -> list[Path]:
        """The files, where they are complete."""
        return [self.home / name for name in self.names]

    def complete(self) -> bool:
        """Whether all of it is there."""
        marker = self.home / "complete.json"
        try:
            return marker.is_file() and _sizes(self.paths()) == self.sizes(self.said(marker), self.shape[0])
        except (UserError, OSError, KeyError, TypeError, ValueError):
            return False

    def taken(self) -> int:
        """Bytes on the disk of what is not complete."""
        sizes = [path.stat().st_blocks * 512 for path in self.home.glob("*.partial") if path.is_file()]
        return sum(sizes)


def build(files: FrameFiles, progress: Progress | None = None) -> None:
    """Makes sure that the cache is there and complete.

    Where it is missing it is built first, shard by shard (at most 31 MiB); after a kill at any moment the
    next call goes on behind the last finished shard. The bytes do not depend on interruptions. Of several
    processes one builds and the others wait; where the file system has no locks each builds for itself, and
    the files of the last one stay. The name is a hash of the store's fingerprint, views, size and kind, so a
    changed data set gets a new cache, and another choice of episodes too. The time of the cache's folder is
    that of its last use.

    Raises UserError where a picture cannot be read, or the disk has not the room, which is found before the
    first picture is decoded, or of packed pictures after the first shards.
    """
    home, store = files.home, files.store
    if not files.complete():
        with explain_disk_errors(home, "the frame cache (data.cache.folder)"):
            home.mkdir(parents=True, exist_ok=True)
        busy = "%s: another process is decoding these pictures; waiting for it"
        with exclusive_lock(home, waiting=lambda: log.info(busy, home)) as locked:
            if not files.complete():  # another process may have built it meanwhile
                with nullcontext(home) if locked else TemporaryDirectory(dir=home) as place:
                    built = _fill(files, Path(place), progress)
                    said = {**files.key, "store": store.name, "end": store.spec.num_frames, **files.state()}
                    write_json(built, said)
                    with explain_disk_errors(home, "the frame cache"):
                        for name in files.names:
                            os.replace(Path(place) / files.partial(name), home / name)
                        sync(home)
                        # Last: without it the pictures do not count as complete.
                        os.replace(built, home / "complete.json")
    with suppress(OSError):  # where it belongs to somebody else
        os.utime(home)


def _fill(files: FrameFiles, place: Path, progress: Progress | None) -> Path:
    """Fills files in `place`. Gives the one that says up to which row they are on the disk."""
    built, total, image_size = place / "built.json", files.store.spec.num_frames, files.image_size
    paths = [place / files.partial(name) for name in files.names]
    begin, said = _kept(files, paths, built)
    step = max(1, min(SHARD_ROWS, SHARD_BYTES // files.row_bytes))
    threads = min(usable_cores(), MOST_THREADS, -(-(total - begin) // step))
    decoders = Decoders(files.store, image_size, max(1, threads))
    needed = [0]
    with explain_full_disk(place, "the frame cache", lambda: megabytes(needed[0]), _CURE):
        free, started = shutil.disk_usage(place).free, time.monotonic()
        opened = [path.open("r+b" if begin else "w+b") for path in paths]
        try:
            needed[0] = files.expected(0)
            files.begin(opened, said)
            pieces = (
                np.arange(row, min(row + step, total), dtype=np.int64) for row in range(begin, total, step)
            )
            told = begin + step * decoders.threads  # by then all threads have given a shard
            for rows, packed in decoders.ahead(pieces, files.pack):
                files.write(int(rows[0]), packed)
                for file in opened:
                    file.flush()
                    os.fsync(file.fileno())
                done = int(rows[-1]) + 1
                write_atomically(built, json.dumps({"end": done, **files.state()}))
                if rows[0] < told <= done or told > done == total:
                    needed[0] = files.expected(done)
                    seconds = (time.monotonic() - started) / (done - begin) * (total - done)
                    log.info(
                        "frame cache: %s%s for %d pictures of %d px in %s (%s free)%s; data.cache.folder "
                        "chooses another folder, data.image_size another size",
                        megabytes(needed[0]),
                        files.label,
                        total * files.shape[1],
                        image_size,
                        place,
                        megabytes(free),
                        f", decoded in about {timedelta(seconds=round(seconds))}" if seconds > 1 else "",
                    )
                    if needed[0] - sum(_sizes(paths)) > shutil.disk_usage(place).free:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if progress is not None:
                    progress(done, total)
        finally:
            for file in opened:
                file.close()
    return built


def _kept(files: FrameFiles, paths: list[Path], built: Path) -> tuple[int, Mapping[str, Any]]:
    """The rows that an interrupted call has written, and what it said of them."""
    for path in paths:
        if path.is_symlink():  # it would be written through
            path.unlink()
    if not (built.is_file() and all(path.is_file() for path in paths)):
        return 0, {}
    said = read_json(built)
    enough = zip(_sizes(paths), files.sizes(said, int(said["end"])), strict=True)
    return (int(said["end"]), said) if all(size >= least for size, least in enough) else (0, {})


def _sizes(paths: list[Path]) -> list[int]:
    return [path.stat().st_size for path in paths]
