"""The loader of training batches: same seed, same order; prefetched by a thread; resumed exactly.

Its augmentation is a seeded change of colours: brightness, contrast, saturation. One change is drawn for each
sample and view, and the present and every future picture of the sample get the same: what differs between
them is what happened in the world. There is no shift: a random one by 4 pixels cost 23 points of closed-loop
success in a prototype, because it destroys the fixed map from pixels to positions that the policy must learn.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from pydantic import Field

from tutti.data.mixture import ComposedMixture, Mixture
from tutti.data.windows import WindowIndex
from tutti.distributed.ranks import ONE_RANK, Ranks
from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.types import Batch, Observation

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32).reshape(3, 1, 1)


class Loader:
    """An endless iterator of training batches, which knows how many were taken.

    Batch k is a function of (data, seed, batch_size, k) alone: its windows are the entries [k B, (k+1) B)
    of the mixture's stream, its augmentation is seeded by (seed, k), one for all pictures of a sample. A
    thread prepares up to `prefetch` batches ahead, or those of an update if they are more (0: none, made on
    demand); what it has prepared does not count in `state_dict()`, only what was handed out. There is one
    position: `iter(loader)` goes on where the last one stopped.

    On several ranks (`share`) all count the same batches and each makes its own rows of them only; the
    position does not say how many they are, so that any number of ranks goes on from it.
    """

    def __init__(
        self,
        windows: WindowIndex,
        mixture: Mixture | ComposedMixture,
        *,
        batch_size: int,
        augmentation: NoAugmentation | ColourJitter | None = None,
        prefetch: int = 3,
        identity: str = "",
    ) -> None:
        self.windows, self.mixture, self.batch_size = windows, mixture, batch_size
        self.prefetch = prefetch
        self._augmentation = augmentation or NoAugmentation()
        self._identity = identity
        self._consumed = 0
        self._ranks, self._at_once = ONE_RANK, 1
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[Batch]] = deque()

    def share(self, ranks: Ranks, at_once: int = 1) -> None:
        """From now on this rank's rows of each batch, of which `at_once` are taken for each update.

        Raises: UserError unless the ranks divide the batch size.
        """
        check_divides(ranks, self.batch_size)
        self.close()
        self._ranks, self._at_once = ranks, at_once

    @property
    def batches_per_epoch(self) -> float:
        """Batches in one pass over the windows (one epoch of the mixture)."""
        return self.mixture.epoch_length / self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.prefetch == 0:
            batch = self.batch_at(self._consumed)
        else:
            try:
                batch = self._prefetched()
            except BaseException:
                self.close()  # the next call makes the batch again, and those after it
                raise
        self._consumed += 1
        return batch

    def _prefetched(self) -> Batch:
        """The next batch, once as many as wanted are on their way behind it.

        The thread computes nothing by torch, which would start a second pool of threads in it.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="tutti-loader")
            # Ends the thread also when the loader is just forgotten.
            self._end = weakref.finalize(self, self._thread.shutdown, cancel_futures=True)
        while len(self._ahead) <= max(self.prefetch, self._at_once):
            self._ahead.append(self._thread.submit(self._maker(), self._consumed + len(self._ahead)))
        return self._ahead.popleft().result()

    def batch_at(self, number: int) -> Batch:
        """Batch `number` of the stream (from 0), or this rank's rows of it; the same bytes each time."""
        return self._maker()(number)

    def state_dict(self) -> dict[str, Any]:
        """The position for a checkpoint, plain JSON: batches handed out, and what they depend on."""
        return {"consumed": self._consumed, **self._conditions()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes to the position of `state_dict()`; the next batch is the one that would have come then.

        Raises UserError where the state was saved with another seed, batch size or data set, because the
        order would be another one.
        """
        for key, now in self._conditions().items():
            if state.get(key) != now:
                raise UserError(
                    f"The checkpoint's data position was saved with {key} = {state.get(key)!r}; this run has "
                    f"{now!r}, so the order of batches would differ.\n"
                    "  cure: resume with the checkpoint's data section and data set, or start a new run."
                )
        self.close()
        self._consumed = int(state["consumed"])

    def close(self) -> None:
        """Stops the thread; the next batch starts it again at the same position."""
        if self._thread is not None:
            self._end.detach()  # it would hold the thread as long as there is a loader
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            self._ahead.clear()

    def _conditions(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "seed": self.mixture.seed,
            "windows": self.mixture.epoch_length,
            "identity": self._identity,
        }

    def _maker(self) -> Callable[[int], Batch]:
        """Batch by number, as a function that does not hold the loader: the thread would keep it alive."""
        windows, mixture, size, augmentation = self.windows, self.mixture, self.batch_size, self._augmentation
        rows = self._ranks.rows(size)

        def make(number: int) -> Batch:
            batch = windows.gather(mixture.take(number * size, size)[rows])
            if isinstance(augmentation, NoAugmentation):
                return batch
            images, changes = batch.observation.images.numpy(), list[RowChange]()
            for stream in mixture.streams(rows, size):
                # By the batch's number: the same pictures after a resume and on any number of ranks; and by
                # the stream, so that they do not depend on what is beside it.
                random = np.random.default_rng([mixture.seed, 3, number, *stream.key])
                change = augmentation.draw(images[stream.rows], random, stream.first, stream.count)
                changes.append((stream.rows, change))
            futures = {
                offset: replace(future, observation=_changed(future.observation, changes))
                for offset, future in batch.futures.items()
            }
            return replace(batch, observation=_changed(batch.observation, changes), futures=futures)

        return make


def _changed(observation: Observation, changes: Sequence[RowChange]) -> Observation:
    """The observation with each change made to its rows."""
    before = observation.images.numpy()
    images = np.empty_like(before)
    for rows, change in changes:
        images[rows] = change(before[rows])
    return replace(observation, images=torch.from_numpy(images))


def check_divides(ranks: Ranks, size: int) -> None:
    """Raises: UserError unless every rank gets equally many windows of a batch of `size`."""
    if size % ranks.count:
        near = sorted({max(1, size // ranks.count) * ranks.count, (size // ranks.count + 1) * ranks.count})
        raise UserError(
            f"data.batch_size is {size}, the windows of a batch on all {ranks.count} ranks together, which "
            f"cannot be shared out evenly. Set data.batch_size to {' or '.join(map(str, near))}, or start "
            "another number of processes."
        )


@dataclass(frozen=True, slots=True)
class ColourChange:
    """x -> clip(g + s (c (b x - m) + m - g)) for each sample and view, the same for every picture of it.

    b, c, s are factors of brightness, contrast and saturation, m is a grey that contrast leaves as it is, and
    g the grey of the pixel before the last step. Pixels that are equal in two pictures stay equal.
    """

    brightness: Float32[np.ndarray, "b v 1 1 1"]
    contrast: Float32[np.ndarray, "b v 1 1 1"]
    saturation: Float32[np.ndarray, "b v 1 1 1"]
    mean: Float32[np.ndarray, "b v 1 1 1"]

    def __call__(self, images: UInt8[np.ndarray, "b v 3 h w"]) -> UInt8[np.ndarray, "b v 3 h w"]:
        """The changed pictures, rounded to bytes."""
        x = (images * self.brightness - self.mean) * self.contrast + self.mean
        grey = _grey(x)
        x = (x - grey) * self.saturation + grey
        return np.clip(np.rint(x), 0, 255).astype(np.uint8)


RowChange = tuple[slice | Int64[np.ndarray, " _"], ColourChange]
"""Some rows of a batch, and what changes in their pictures."""


class NoAugmentation(FrozenConfig):
    """Pictures as they are."""

    kind: Literal["none"] = Field(default="none", description="No augmentation.")


class ColourJitter(FrozenConfig):
    """Each strength r draws a factor uniformly from [1 - r, 1 + r], for each sample and view alone."""

    kind: Literal["colour"] = Field(default="colour", description="Colour jitter.")
    brightness: float = Field(default=0.2, ge=0, le=1, description="Factors lie in 1 - r to 1 + r.")
    contrast: float = Field(
        default=0.2, ge=0, le=1, description="Factors lie in 1 - r to 1 + r, about the picture's mean grey."
    )
    saturation: float = Field(
        default=0.2, ge=0, le=1, description="Factors lie in 1 - r to 1 + r, about each pixel's grey."
    )

    def draw(
        self, images: UInt8[np.ndarray, "b v 3 h w"], random: np.random.Generator, first: int = 0, of: int = 0
    ) -> ColourChange:
        """The change of samples whose present pictures are `images`; contrast is about their mean grey.

        A function of `images` and the state of `random` alone. Where `images` are rows of a batch of `of`,
        from row `first` on, factors are drawn for all of it, so that they do not depend on how the batch is
        spread over ranks.
        """
        rows = slice(first, first + len(images))
        lead = (max(of, rows.stop), images.shape[1], 1, 1, 1)

        def factor(strength: float) -> Float32[np.ndarray, "b v 1 1 1"]:
            return random.uniform(1 - strength, 1 + strength, lead)[rows].astype(np.float32)

        brightness, contrast = factor(self.brightness), factor(self.contrast)
        mean = _grey(images * brightness).mean((3, 4), keepdims=True)
        return ColourChange(brightness, contrast, factor(self.saturation), mean)


def _grey(x: Float32[np.ndarray, "b v 3 h w"]) -> Float32[np.ndarray, "b v 1 h w"]:
    return (x * _LUMINANCE).sum(2, keepdims=True)
