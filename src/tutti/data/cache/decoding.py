"""Decodes and resizes the pictures of a store, on several threads with a reader of its own each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt8

from tutti.data.episodes import EpisodeStore
from tutti.data.formats.pictures import resized

SHARD_BYTES = 31 * 2**20
"""Pictures that are decoded at once, at most: below the 32 MiB from which on glibc always maps new memory."""
T = TypeVar("T")


class Decoders:
    """The pictures of a store as squares of `image_size` pixels, on up to `threads` threads.

    `threads` is how many there are: one where the store has no reader for another thread.
    """

    def __init__(self, store: EpisodeStore, image_size: int, threads: int) -> None:
        self._image_size, self._idle = image_size, SimpleQueue[EpisodeStore]()
        self.threads = 0
        while self.threads < threads:
            one = store.another_reader() if self.threads else store
            if one is None:
                break
            self._idle.put(one)
            self.threads += 1

    def __call__(self, rows: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n v 3 s s"]:
        """The pictures of these rows, in the order asked; a thread waits while all readers are used."""
        store = self._idle.get()
        try:
            return _resized(store, rows, self._image_size)
        finally:
            self._idle.put(store)

    def ahead(
        self,
        pieces: Iterable[Int64[np.ndarray, " _"]],
        then: Callable[[UInt8[np.ndarray, "_ v 3 s s"]], T],
    ) -> Iterator[tuple[Int64[np.ndarray, " _"], T]]:
        """Each piece of rows with what `then` makes of its pictures, in order; a few are made ahead."""

        def make(rows: Int64[np.ndarray, " _"]) -> T:
            return then(self(rows))

        if self.threads == 1:
            yield from ((rows, make(rows)) for rows in pieces)
            return
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="tutti-decode")
        waiting = deque[tuple[Int64[np.ndarray, " _"], Future[T]]]()
        try:
            for rows in pieces:
                waiting.append((rows, pool.submit(make, rows)))
                if len(waiting) > self.threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for rows, future in waiting:
                yield rows, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def resize_images(images: UInt8[np.ndarray, "k h w 3"], size: int) -> UInt8[np.ndarray, "k 3 s s"]:
    """Pictures to squares of `size` pixels, channels first; the same size gives the very same bytes.

    Triangle filter with antialiasing (Pillow's BILINEAR). The whole picture is kept: where it is not
    square its aspect changes, and nothing is cropped. Training and serving both use this function.
    """
    out = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for target, image in zip(out, images, strict=True):
        _fill(target, image)
    return out


def _fill(target: UInt8[np.ndarray, "3 s s"], image: UInt8[np.ndarray, "h w 3"]) -> None:
    size = target.shape[-1]
    target[:] = (image if image.shape[:2] == (size, size) else resized(image, size)).transpose(2, 0, 1)


def _resized(
    store: EpisodeStore, rows: Int64[np.ndarray, " n"], image_size: int
) -> UInt8[np.ndarray, "n v 3 s s"]:
    """The pictures of these rows, read in rising order. At most so many are decoded at once as are no larger
    than a shard: large ones would fill the memory, and leave the processor's caches before they are resized.
    """
    spec = store.spec
    out = np.empty((len(rows), len(spec.views), 3, image_size, image_size), dtype=np.uint8)
    order = np.argsort(rows, kind="stable")
    for number, (view, (height, width)) in enumerate(zip(spec.views, spec.image_shapes, strict=True)):
        step = max(1, SHARD_BYTES // (3 * height * width))
        same = height == width == image_size  # to resize channels apart is slower
        for places in np.split(order, range(step, len(rows), step)):
            for place, picture in zip(
                places.tolist(), store.rising(view, rows[places], planes=same), strict=True
            ):
                _fill(out[place, number], picture)
    return out
