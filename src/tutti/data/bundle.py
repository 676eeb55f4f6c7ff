"""The data of a training in one object, and what is fitted on its training episodes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tutti.data.episodes import Episode, EpisodeStore
from tutti.data.loader import Loader
from tutti.data.normalize import EmbodimentStats, NormalizationKind, Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.data.windows import Source, WindowIndex
from tutti.errors import UserError
from tutti.types import Batch, DataSpec


@dataclass(frozen=True, slots=True)
class ValidationSet(Sequence[Batch]):
    """Batches of held-out episodes, always the same, in one shuffled order.

    `chosen` are the windows in use, `all_windows` every held-out one. The last batch may be smaller.
    """

    windows: WindowIndex
    chosen: Int64[np.ndarray, " c"]
    batch_size: int
    all_windows: Int64[np.ndarray, " _"]

    def __getitem__(self, number: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        start = range(0, len(self.chosen), self.batch_size)[number]
        return self.windows.gather(self.chosen[start : start + self.batch_size])

    def __len__(self) -> int:
        return math.ceil(len(self.chosen) / self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBundle:
    """The data of a training: loader, validation set, and what a model must know. Episodes are per source."""

    train: Loader
    validation: ValidationSet
    spec: DataSpec
    normalizer: Normalizer
    tokenizer: Tokenizer
    windows: WindowIndex
    training_episodes: tuple[tuple[Episode, ...], ...]
    validation_episodes: tuple[tuple[Episode, ...], ...]

    def replay(self, windows: Sequence[int] | Int64[Tensor, " b"]) -> Batch:
        """The batch of these window numbers (`batch.window` of a saved bad batch), without augmentation."""
        return self.windows.gather(torch.as_tensor(windows, dtype=torch.int64).cpu().numpy())

    @property
    def training_rows(self) -> Int64[np.ndarray, " _"]:
        """The windows of all training episodes, in order."""
        parts = [self.windows.rows_of(number, part) for number, part in enumerate(self.training_episodes)]
        return np.concatenate(parts)

    def training_chunks(self, count: int) -> tuple[Float[Tensor, "n t a"], Bool[Tensor, "n t a"]]:
        """Normalised actions and masks of at most `count` training windows, evenly spread, in order."""
        return self.windows.chunks(evenly_spread(self.training_rows, count))

    def texts(self, batch: Batch) -> list[str]:
        """The instruction of each sample."""
        return [self.windows.instructions[number] for number in batch.instruction_id.tolist()]

    def describe(self) -> dict[str, Any]:
        """What the data is, as plain values for logs and reports; seconds are of robot time."""
        parts = zip(self.windows.sources, self.training_episodes, self.validation_episodes, strict=True)
        per_source = [_describe_source(*part) for part in parts]
        names = ("episodes", "training_episodes", "validation_episodes", "frames", "seconds")
        totals = {name: sum(entry[name] for entry in per_source) for name in names}
        return {
            **totals,
            "training_windows": self.train.mixture.epoch_length,
            "validation_windows": len(self.validation.chosen),
            "batches_per_epoch": self.train.batches_per_epoch,
            "instructions": len(self.windows.instructions),
            "vocab_size": self.tokenizer.vocab_size,
            "text_length": self.tokenizer.text_length,
            "normalization": self.normalizer.kind,
            "sources": per_source,
        }


def _describe_source(
    source: Source, training: tuple[Episode, ...], held: tuple[Episode, ...]
) -> dict[str, Any]:
    spec, episodes = source.store.spec, source.store.episodes
    lengths = [episode.length for episode in episodes]
    return {
        "name": source.store.name,
        "fingerprint": source.store.fingerprint,
        "embodiment": spec.embodiment,
        "weight": source.weight,
        "episodes": len(episodes),
        "training_episodes": len(training),
        "validation_episodes": len(held),
        "frames": spec.num_frames,
        "seconds": spec.num_frames / spec.fps,
        "shortest": min(lengths),
        "longest": max(lengths),
        "instructions": len(set(_texts(source.store, episodes))),
        "views": list(spec.views),
        "stored_image_shapes": [list(shape) for shape in spec.image_shapes],
    }


def _texts(store: EpisodeStore, episodes: Sequence[Episode]) -> set[str]:
    used = {int(i) for e in episodes for i in np.unique(store.instruction_of[e.start : e.end])}
    return {store.instructions[i] for i in used}


def texts_of(stores: Sequence[EpisodeStore], parts: Sequence[Sequence[Episode]]) -> set[str]:
    return {text for store, part in zip(stores, parts, strict=True) for text in _texts(store, part)}


def check_compatible(stores: Sequence[EpisodeStore]) -> None:
    """One embodiment, and the same sizes, in all sources."""
    first = stores[0]
    for store in stores[1:]:
        for key in ("embodiment", "views", "state_dim", "action_dim", "fps"):
            expected, value = getattr(first.spec, key), getattr(store.spec, key)
            if expected != value:
                raise UserError(
                    f"data.sources: {store.name} and {first.name} differ in {key}.\n"
                    f"  expected: {expected}\n  found:    {value}\n"
                    "  cure: mix data sets of one embodiment; choose the same cameras by sources.views."
                )


def fit_normalizer(
    kind: NormalizationKind, stores: Sequence[EpisodeStore], training: Sequence[Sequence[Episode]]
) -> Normalizer:
    """Statistics of each embodiment over its training frames, every frame counting once."""
    stats: dict[str, EmbodimentStats] = {}
    for embodiment in dict.fromkeys(store.spec.embodiment for store in stores):
        states, actions = [], []
        for store, episodes in zip(stores, training, strict=True):
            if store.spec.embodiment == embodiment:
                rows = np.concatenate([np.arange(e.start, e.end) for e in episodes])
                states.append(store.states[rows])
                actions.append(store.actions[rows])
        fitted = Normalizer.fit(kind, embodiment, np.concatenate(states), np.concatenate(actions))
        stats |= fitted.stats
    return Normalizer(kind, stats)


def evenly_spread(rows: Int64[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " _"]:
    """At most `count` of `rows`, evenly spread, in order."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def content_hash(stores: Sequence[EpisodeStore], parts: Sequence[np.ndarray]) -> str:
    """A hash of the data sets and of what is trained on, which a resume must find unchanged."""
    digest = hashlib.sha256(json.dumps([store.fingerprint for store in stores]).encode())
    for part in parts:
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]
