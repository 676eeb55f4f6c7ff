"""The frame cache: decoded, resized frames in one memory-mapped file, so that a batch costs a copy."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tutti.data.episodes import EpisodeStore, Progress
from tutti.storage.files import explain_full_disk, megabytes, write_atomically
from tutti.storage.reading import read_json

_SHARD_BYTES = 32 * 2**20
_FORMAT = 1
"""Raised when the meaning of the bytes changes, so that older caches are built anew."""


def resize_images(images: UInt8[np.ndarray, "k h w 3"], size: int) -> UInt8[np.ndarray, "k 3 s s"]:
    """Pictures to squares of `size` pixels, channels first; the same size gives the very same bytes.

    Triangle filter with antialiasing (Pillow's BILINEAR). The whole picture is kept: where it is not
    square its aspect changes, and nothing is cropped. Training and serving both use this function.
    """
    if images.shape[1:3] == (size, size):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    out = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for target, image in zip(out, images, strict=True):
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
        target[:] = np.asarray(resized).transpose(2, 0, 1)
    return out


def cached_frames(
    store: EpisodeStore, folder: Path, image_size: int, progress: Progress | None = None
) -> UInt8[np.ndarray, "n v 3 s s"]:
    """All frames of a store at `image_size`, as a read-only memory map of a file below `folder`.

    Where it is missing it is built first, shard by shard (about 32 MiB); after a kill at any moment the next
    call goes on behind the last finished shard. The bytes do not depend on interruptions. The name is a hash
    of the store's fingerprint, views and size, so a changed data set gets a new cache.

    Raises UserError where a picture cannot be read or the disk is full.
    """
    spec = store.spec
    shape = (spec.num_frames, len(spec.views), 3, image_size, image_size)
    key = {"format": _FORMAT, "data": store.fingerprint, "views": spec.views, "shape": shape}
    home = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path, marker = home / "frames.u8", home / "complete.json"
    size = int(np.prod(shape, dtype=np.int64))
    if not (marker.is_file() and path.is_file() and path.stat().st_size == size):
        with explain_full_disk(home, "the frame cache", lambda: megabytes(size)):
            home.mkdir(parents=True, exist_ok=True)
            _build(store, home, image_size, size, progress)
            os.replace(home / "frames.partial", path)
            # The marker comes last: without it the pictures do not count as complete.
            write_atomically(marker, json.dumps({**key, "store": store.name, "bytes": size}, indent=2))
            (home / "built.json").unlink(missing_ok=True)
    # A plain array over the same pages: fancy indexing of np.memmap itself costs more Python.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r", shape=shape))


def _build(store: EpisodeStore, home: Path, image_size: int, size: int, progress: Progress | None) -> None:
    """Fills frames.partial; built.json says how many rows are on the disk for certain."""
    partial, built = home / "frames.partial", home / "built.json"
    num_rows, done = store.spec.num_frames, 0
    row_bytes = size // num_rows
    if partial.is_symlink():  # it would be written through
        partial.unlink()
    if partial.is_file() and built.is_file() and partial.stat().st_size == size:
        done = min(num_rows, int(read_json(built)["rows"]))
    step = max(1, _SHARD_BYTES // row_bytes)
    with partial.open("r+b" if done else "w+b") as file:
        # Reserving everything now finds a full disk before the first picture is decoded.
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            if not done:  # give back what it did get
                file.truncate(0)
            raise
        while done < num_rows:
            rows = np.arange(done, min(done + step, num_rows), dtype=np.int64)
            views = [resize_images(store.frames(view, rows), image_size) for view in store.spec.views]
            file.seek(done * row_bytes)
            file.write(np.stack(views, axis=1).tobytes())
            file.flush()
            os.fsync(file.fileno())
            done += len(rows)
            write_atomically(built, json.dumps({"rows": done}))
            if progress is not None:
                progress(done, num_rows)
