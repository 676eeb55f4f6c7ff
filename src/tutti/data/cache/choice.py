"""Opens the frames of the data sets of a run; of kind auto it chooses the kind by size and free disk."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import UInt8

from tutti.data.cache.building import MOST_THREADS
from tutti.data.cache.config import CacheConfig, CacheKind
from tutti.data.cache.decoding import Decoders
from tutti.data.cache.frames import Frames
from tutti.data.cache.jpeg import JpegFiles, jpeg_frames
from tutti.data.cache.live import LiveFrames
from tutti.data.cache.raw import RawFiles, cached_frames
from tutti.data.episodes import EpisodeStore, Progress
from tutti.distributed.cores import usable_cores
from tutti.errors import UserError
from tutti.storage.files import megabytes, write_json
from tutti.storage.reading import read_json, shown

log = logging.getLogger("tutti.data")

ROOM = 0.8
"""Share of the free disk that a cache may take by `auto`."""
_CURE = 'write the kind there, as {"kind": "raw"}, or train anew (--redo)'
PLACES, ROWS = 8, 4
"""Stretches of a data set that are decoded to see what it costs, and the rows of each."""


def open_frames(
    stores: Sequence[EpisodeStore],
    config: CacheConfig,
    image_size: int,
    *,
    progress: Progress | None = None,
) -> list[UInt8[np.ndarray, "n v 3 s s"] | Frames]:
    """The frames of each store, as `config` says, whose kind is not auto (`decide`)."""
    found = list[UInt8[np.ndarray, "n v 3 s s"] | Frames]()
    for store in stores:
        if config.kind == "none":
            memory = config.memory * 2**20
            found.append(LiveFrames(store, image_size, memory=memory, threads=config.threads))
        elif config.kind == "jpeg":
            given = {"quality": config.quality, "threads": config.threads}
            found.append(jpeg_frames(store, config.home(), image_size, progress=progress, **given))
        else:
            found.append(cached_frames(store, config.home(), image_size, progress))
    return found


def decide(
    stores: Sequence[EpisodeStore], config: CacheConfig, image_size: int, kept: Path | None = None
) -> CacheConfig:
    """The config with a kind other than auto: what the file `kept` says was decided; else it is decided now,
    told in one line, and written there.

    Raises: UserError if the file is damaged.
    """
    if config.kind != "auto":
        return config
    if kept is not None and kept.exists():
        kind = read_json(kept, cure=f"Cure: {_CURE}.").get("kind")
        if kind not in get_args(CacheKind):
            raise UserError(
                f"{kept}: kind is {shown(kind)}.\n  expected: one of {', '.join(get_args(CacheKind))}, as "
                f"this run was trained with\n  cure: {_CURE}."
            )
    else:
        kind = _choose(stores, config, image_size)
        if kept is not None:
            write_json(kept, {"kind": kind})
    return config.model_copy(update={"kind": kind})


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a store takes, by a sample: bytes of its JPEG cache, and seconds for all rows of one thread to
    decode, and to encode; `threads` can do it at the same time."""

    jpeg: int
    decoding: float
    encoding: float
    threads: int


def _choose(stores: Sequence[EpisodeStore], config: CacheConfig, image_size: int) -> CacheKind:
    folder = config.home()
    raw = [RawFiles(store, folder, image_size) for store in stores]
    jpeg = [JpegFiles(store, folder, image_size, config.quality) for store in stores]
    missing = [not files.complete() for files in raw]
    lacking = [not files.complete() for files in jpeg]
    free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free
    size = sum(one.shape[0] * one.row_bytes for one in raw)
    if not any(missing):
        log.info("frame cache: raw by data.cache.kind=auto, %s that are there already", megabytes(size))
        return "raw"
    costs = [_cost(files) for files in jpeg]
    packed = sum(cost.jpeg for cost in costs)
    needs = sum(f.shape[0] * f.row_bytes - f.taken() for f, lack in zip(raw, missing, strict=True) if lack)
    needs_packed = sum(
        cost.jpeg - f.taken() for f, cost, lack in zip(jpeg, costs, lacking, strict=True) if lack
    )
    kind: CacheKind = "none"
    if needs <= ROOM * free:
        kind = "raw"
    elif needs_packed <= ROOM * free:
        kind = "jpeg"
    seconds = sum(
        (cost.decoding + (cost.encoding if kind == "jpeg" else 0)) / cost.threads
        for cost, raw_lacks, jpeg_lacks in zip(costs, missing, lacking, strict=True)
        if (raw_lacks if kind == "raw" else jpeg_lacks)
    )
    rows = sum(files.shape[0] for files in raw)
    each = 1000 * sum(cost.decoding for cost in costs) / rows
    log.info(
        "frame cache: %s by data.cache.kind=auto: raw takes %s, jpeg about %s, of %s that are free at %s; %s",
        kind,
        megabytes(size),
        megabytes(packed),
        megabytes(free),
        folder,
        f"nothing is built, each observation is decoded in about {each:.2g} ms as batches need it"
        if kind == "none"
        else f"built in about {timedelta(seconds=max(1, round(seconds)))}",
    )
    return kind


def _cost(files: JpegFiles) -> _Cost:
    """By stretches of rows, spread over the data set: that of a whole set is read in order, too.

    Raises: UserError where a picture of the sample cannot be read.
    """
    store, total = files.store, files.shape[0]
    decoders = Decoders(store, files.image_size, min(usable_cores(), MOST_THREADS))
    firsts = np.unique(np.linspace(0, max(0, total - ROWS), PLACES).astype(np.int64)).tolist()
    pieces = [np.arange(first, min(first + ROWS, total)) for first in firsts]
    started = time.perf_counter()
    pictures = [decoders(piece) for piece in pieces]
    decoded = time.perf_counter()
    packed = [files.pack(some) for some in pictures]
    encoded = time.perf_counter()
    count = sum(map(len, pieces))
    size = sum(len(one) for shard in packed for view in shard for one in view)
    scale = total / count
    return _Cost(
        round(size * scale) + 8 * files.shape[1] * (total + 1),
        (decoded - started) * scale,
        (encoded - decoded) * scale,
        decoders.threads,
    )
