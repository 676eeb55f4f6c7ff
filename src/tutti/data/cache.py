"""The frame cache: decoded, resized frames in one memory-mapped file, so that a batch costs a copy.

It lies outside of the runs, under a name made of what it holds, so that all runs share it:

    ~/.cache/tutti/64px-0123456789abcdef01234567/
      frames.u8       the pictures, row by row      complete.json   what they are, once they are complete
      frames.partial  the pictures so far           built.json      how many rows are on the disk for certain
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8
from pydantic import Field

from tutti.data.episodes import EpisodeStore, Progress
from tutti.data.formats.pictures import resized
from tutti.frozen_config import FrozenConfig
from tutti.storage.files import (
    LocalPath,
    exclusive_lock,
    expanded,
    explain_disk_errors,
    explain_full_disk,
    megabytes,
    reserve,
    sync,
    write_atomically,
    write_json,
)
from tutti.storage.reading import read_json

log = logging.getLogger("tutti.data")

_SHARD_BYTES, _SHARD_ROWS = 32 * 2**20, 1024
_FORMAT = 2
"""Raised when the meaning of the bytes changes, so that older caches are built anew."""
_CURE = "choose another folder (data.cache.folder) or smaller pictures (data.image_size)"


class CacheConfig(FrozenConfig):
    """Where decoded pictures are kept for all runs. It is always safe to delete that folder."""

    folder: Literal["auto"] | LocalPath = Field(
        default="auto", description="auto: $TUTTI_CACHE, else $XDG_CACHE_HOME/tutti, else ~/.cache/tutti."
    )

    def home(self) -> Path:
        """The folder. Raises: UserError if `~` or a `$VAR` in the environment's own says nothing."""
        if self.folder != "auto":
            return self.folder
        if chosen := os.environ.get("TUTTI_CACHE"):
            return expanded(chosen)
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else expanded("~/.cache")) / "tutti"


def resize_images(images: UInt8[np.ndarray, "k h w 3"], size: int) -> UInt8[np.ndarray, "k 3 s s"]:
    """Pictures to squares of `size` pixels, channels first; the same size gives the very same bytes.

    Triangle filter with antialiasing (Pillow's BILINEAR). The whole picture is kept: where it is not
    square its aspect changes, and nothing is cropped. Training and serving both use this function.
    """
    if images.shape[1:3] == (size, size):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    out = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for target, image in zip(out, images, strict=True):
        target[:] = resized(image, size).transpose(2, 0, 1)
    return out


def cached_frames(
    store: EpisodeStore, folder: Path, image_size: int, progress: Progress | None = None
) -> UInt8[np.ndarray, "n v 3 s s"]:
    """The frames of a store's episodes at `image_size`, as a read-only memory map of a file below `folder`.

    Where it is missing it is built first, shard by shard (at most 32 MiB); after a kill at any moment the
    next call goes on behind the last finished shard. The bytes do not depend on interruptions. Of several
    processes one builds and the others wait; where the file system has no locks each builds for itself, and
    the file of the last one stays. The name is a hash of the store's fingerprint, views and size, so a
    changed data set gets a new cache, and another choice of episodes too. The time of the cache's folder is
    that of its last use.

    Raises UserError where a picture cannot be read, or the disk has not the room, which is found before the
    first picture is decoded.
    """
    spec = store.spec
    shape = (spec.num_frames, len(spec.views), 3, image_size, image_size)
    key = {"format": _FORMAT, "data": store.fingerprint, "views": spec.views, "shape": shape}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    home = folder / f"{image_size}px-{name}"
    path, marker = home / "frames.u8", home / "complete.json"
    size = int(np.prod(shape, dtype=np.int64))

    def complete() -> bool:
        return marker.is_file() and path.is_file() and path.stat().st_size == size

    if not complete():
        with explain_disk_errors(home, "the frame cache (data.cache.folder)"):
            home.mkdir(parents=True, exist_ok=True)
        busy = "%s: another process is decoding these pictures; waiting for it"
        with exclusive_lock(home, waiting=lambda: log.info(busy, home)) as locked:
            if not complete():  # another process may have built it meanwhile
                with nullcontext(home) if locked else TemporaryDirectory(dir=home) as place:
                    partial, built = _build(store, Path(place), image_size, progress)
                    write_json(built, {**key, "store": store.name, "end": spec.num_frames})
                    with explain_disk_errors(home, "the frame cache"):
                        os.replace(partial, path)
                        sync(home)
                        os.replace(built, marker)  # last: without it the pictures do not count as complete
    with suppress(OSError):  # where it belongs to somebody else
        os.utime(home)
    # A plain array over the same pages: fancy indexing of np.memmap itself costs more Python.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r", shape=shape))


def _resized(
    store: EpisodeStore, rows: Int64[np.ndarray, " n"], image_size: int
) -> UInt8[np.ndarray, "n v 3 s s"]:
    """The pictures of these rows, of which so many are decoded at once as are no larger than a shard: large
    ones would fill the memory, and leave the processor's caches before they are resized."""
    spec = store.spec
    out = np.empty((len(rows), len(spec.views), 3, image_size, image_size), dtype=np.uint8)
    for number, (view, (height, width)) in enumerate(zip(spec.views, spec.image_shapes, strict=True)):
        if store.is_pairs:  # each from its own size, or one would be resized twice
            for place, picture in enumerate(store.own_sizes(view, rows)):
                out[place, number] = resize_images(picture[None], image_size)[0]
            continue
        step = max(1, _SHARD_BYTES // (3 * height * width))
        for first in range(0, len(rows), step):
            here = slice(first, first + step)
            out[here, number] = resize_images(store.frames(view, rows[here]), image_size)
    return out


def _build(store: EpisodeStore, place: Path, image_size: int, progress: Progress | None) -> tuple[Path, Path]:
    """Fills a file in `place`. Gives it, and the one that says up to which row it is on the disk."""
    partial, built, views = place / "frames.partial", place / "built.json", store.spec.views
    row_bytes, total = len(views) * 3 * image_size**2, store.spec.num_frames
    size = total * row_bytes
    if partial.is_symlink():  # it would be written through
        partial.unlink()
    kept = partial.is_file() and built.is_file() and partial.stat().st_size == size
    begin = int(read_json(built)["end"]) if kept else 0
    step = max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))
    with (
        explain_full_disk(place, "the frame cache", lambda: megabytes(size), _CURE),
        partial.open("r+b" if begin else "w+b") as file,
    ):
        free, started = shutil.disk_usage(place).free, time.monotonic()
        try:  # a full disk is found before the first picture is decoded
            reserve(file, size)
        except OSError:
            if not begin:  # give back what it did get
                file.truncate(0)
            raise
        for row in range(begin, total, step):
            rows = np.arange(row, min(row + step, total), dtype=np.int64)
            file.seek(row * row_bytes)
            file.write(_resized(store, rows, image_size).data)
            file.flush()
            os.fsync(file.fileno())
            done = row + len(rows)
            write_atomically(built, json.dumps({"end": done}))
            if row == begin:
                seconds = (time.monotonic() - started) / len(rows) * (total - done)
                log.info(
                    "frame cache: %s for %d pictures of %d px in %s (%s free)%s; data.cache.folder chooses "
                    "another folder, data.image_size another size",
                    megabytes(size),
                    total * len(views),
                    image_size,
                    place,
                    megabytes(free),
                    f", decoded in about {timedelta(seconds=round(seconds))}" if seconds > 1 else "",
                )
            if progress is not None:
                progress(done, total)
    return partial, built
