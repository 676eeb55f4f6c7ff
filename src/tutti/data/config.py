"""DataConfig: from data sets on disk to training batches, a validation set and what a model must know."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tutti.data.augment import ColourJitter, NoAugmentation
from tutti.data.cache import FrameCache
from tutti.data.episodes import Episode, EpisodeStore, Progress
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.loader import Loader
from tutti.data.mixture import Mixture
from tutti.data.normalize import EmbodimentStats, NormalizationKind, Normalizer
from tutti.data.split import GroupOf, Parts, split_sources
from tutti.data.tokenize import MOST_LENGTH, Tokenizer
from tutti.data.windows import Source, WindowIndex
from tutti.types import Batch, DataNeeds, DataSpec, UserError

Augmentation = Annotated[NoAugmentation | ColourJitter, Field(discriminator="kind")]


class SourceConfig(BaseModel):
    """One data set: a LeRobotDataset v3.0 folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="The folder that contains meta/ and data/.")
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Its share of the samples is weight / sum of weights.",
    )
    views: tuple[str, ...] | Literal["auto"] = Field(
        default="auto", description="The camera features to use, in order; auto: all of them."
    )
    state_key: str = Field(default="observation.state", description="The feature that is the state.")
    action_key: str = Field(default="action", description="The feature that is the action.")

    def open(self) -> LeRobotStore:
        """Opens and checks the data set."""
        views = None if self.views == "auto" else self.views
        return LeRobotStore(self.path, views, self.state_key, self.action_key)


class DataConfig(BaseModel):
    """Data sets and how they become batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceConfig, ...] = Field(
        default=(), description="Data sets of one embodiment; empty: the one that this run records."
    )
    horizon: int = Field(default=16, ge=1, le=4096, description="Actions in a chunk.")
    batch_size: int = Field(default=64, ge=1, description="Windows in a batch.")
    image_size: int = Field(default=64, ge=8, le=1024, description="Edge of the square pictures, in pixels.")
    validation_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the episodes held out, at least one an instruction."
    )
    episodes_per_task: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        default="all", description="Episodes of each task to train on, of those that are not held out."
    )
    validation_windows: int = Field(
        default=1024, ge=1, description="At most so many held-out windows are used, evenly spread."
    )
    normalization: NormalizationKind = Field(
        default="quantile", description="quantile: q01, q99 to -1, 1. standard: mean 0, deviation 1."
    )
    vocab_size: int = Field(default=512, ge=257, le=2**20, description="At most so many text tokens.")
    text_length: Annotated[int, Field(ge=1, le=MOST_LENGTH)] | Literal["auto"] = Field(
        default="auto", description="Tokens of a padded instruction; auto: 1.5 times the longest."
    )
    augmentation: Augmentation = Field(
        default_factory=NoAugmentation, description="none, or colour: brightness, contrast, saturation."
    )
    prefetch: int = Field(default=3, ge=0, le=64, description="Batches made ahead by a thread; 0: none.")
    seed: int = Field(default=0, ge=0, description="Order, split and augmentation follow from it.")

    def build(
        self,
        needs: DataNeeds,
        cache_folder: Path,
        progress: Progress | None = None,
        *,
        group_of: GroupOf | None = None,
    ) -> DataBundle:
        """Opens the sources, fits normalisation and text on the training episodes, decodes frames once.

        `group_of(instruction)` names the task that the split of validation episodes is stratified by; left
        out, each wording counts as its own group. Frame caches are kept in `cache_folder` and found again.

        Raises UserError for anything wrong with the data sets or between them, one that is too short for
        the horizon, or a full disk.
        """
        if not self.sources:
            raise UserError("data.sources is empty; expected at least one {path: <LeRobot folder>}.")
        stores = [source.open() for source in self.sources]
        _check_alike(stores)
        self._check_lengths(stores, needs)
        training, validation = self._split(stores, group_of)
        normalizer = _fit_normalizer(self.normalization, stores, training)
        length = None if self.text_length == "auto" else self.text_length
        tokenizer = Tokenizer.fit(_all_texts(stores, training), self.vocab_size, length)
        sources = [
            Source(
                store=store,
                frames=FrameCache.open_or_build(store, cache_folder, self.image_size, progress).frames,
                weight=config.weight,
            )
            for store, config in zip(stores, self.sources, strict=True)
        ]
        windows = WindowIndex(
            sources,
            horizon=self.horizon,
            normalizer=normalizer,
            tokenizer=tokenizer,
            needs=needs,
        )
        parts = tuple(windows.rows_of(number, part) for number, part in enumerate(training))
        train = Loader(
            windows,
            Mixture(parts, tuple(source.weight for source in self.sources), self.seed),
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            prefetch=self.prefetch,
            identity=_identity(stores, parts),
        )
        rows = np.concatenate([windows.rows_of(number, part) for number, part in enumerate(validation)])
        chosen = _spread(rows, self.validation_windows, self.seed)
        first = stores[0].spec
        return DataBundle(
            train=train,
            validation=ValidationSet(windows, chosen, self.batch_size, rows),
            spec=DataSpec(
                views=first.views,
                image_size=self.image_size,
                state_dim=first.state_dim,
                action_dim=first.action_dim,
                horizon=self.horizon,
                vocab_size=tokenizer.vocab_size,
                text_length=tokenizer.text_length,
                embodiments=windows.embodiments,
                fps=first.fps,
            ),
            normalizer=normalizer,
            tokenizer=tokenizer,
            windows=windows,
            training_episodes=tuple(training),
            validation_episodes=tuple(validation),
        )

    def training_texts(self, group_of: GroupOf | None = None) -> set[str]:
        """The instructions that `build` would fit the text on, without decoding a picture."""
        stores = [source.open() for source in self.sources]
        return _all_texts(stores, self._split(stores, group_of)[0])

    def _split(self, stores: Sequence[EpisodeStore], group_of: GroupOf | None) -> tuple[Parts, Parts]:
        episodes = [store.episodes for store in stores]
        return split_sources(
            episodes, self.validation_fraction, self.episodes_per_task, self.seed, group_of=group_of
        )

    def _check_lengths(self, stores: Sequence[EpisodeStore], needs: DataNeeds) -> None:
        for store in stores:
            longest = max(episode.length for episode in store.episodes)
            offset = max(needs.futures, default=0)
            if self.horizon > longest or offset >= longest:
                name, value = ("data.horizon", self.horizon) if self.horizon > longest else ("future", offset)
                raise UserError(
                    f"{name} is {value}, but the longest episode of {store.name} has {longest} frames.\n"
                    "  Episodes shorter than the horizon are masked at the end, but one must reach it.\n"
                    f"  cure: set data.horizon to at most {longest} and the future offset below it."
                )


@dataclass(frozen=True, slots=True)
class ValidationSet(Sequence[Batch]):
    """Batches of held-out episodes, always the same, in one shuffled order (so instructions mix).

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
    """Everything `DataConfig.build` makes. Episodes are listed for each source."""

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

    def training_chunks(self, count: int) -> tuple[Float[Tensor, "n t a"], Bool[Tensor, "n t a"]]:
        """Normalised actions and masks of at most `count` training windows, evenly spread, in order."""
        rows = np.concatenate(
            [self.windows.rows_of(number, part) for number, part in enumerate(self.training_episodes)]
        )
        if len(rows) > count:
            rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
        return self.windows.chunks(rows)

    def texts(self, batch: Batch) -> list[str]:
        """The instruction of each sample."""
        return [self.windows.instructions[number] for number in batch.instruction_id.tolist()]

    def describe(self) -> dict[str, Any]:
        """What the data is, as plain values for logs and reports; seconds are of robot time."""
        per_source = []
        for source, training, held in zip(
            self.windows.sources, self.training_episodes, self.validation_episodes, strict=True
        ):
            per_source.append(_describe_source(source, training, held))
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


def _all_texts(stores: Sequence[EpisodeStore], parts: Sequence[Sequence[Episode]]) -> set[str]:
    return {text for store, part in zip(stores, parts, strict=True) for text in _texts(store, part)}


def _check_alike(stores: Sequence[EpisodeStore]) -> None:
    """One embodiment, and the same sizes, in all sources."""
    first = stores[0]
    for store in stores[1:]:
        for key in ("embodiment", "views", "state_dim", "action_dim", "fps"):
            expected, found = getattr(first.spec, key), getattr(store.spec, key)
            if expected != found:
                raise UserError(
                    f"data.sources: {store.name} and {first.name} differ in {key}.\n"
                    f"  expected: {expected}\n  found:    {found}\n"
                    "  cure: mix data sets of one embodiment; choose the same cameras by sources.views."
                )


def _fit_normalizer(
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


def _spread(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of `rows`, evenly spread, then shuffled for good."""
    if len(rows) > count:
        rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
    return np.random.default_rng([seed, 4]).permutation(rows)


def _identity(stores: Sequence[EpisodeStore], parts: Sequence[np.ndarray]) -> str:
    """A hash of the data sets and of what is trained on, which a resume must find unchanged."""
    digest = hashlib.sha256(json.dumps([store.fingerprint for store in stores]).encode())
    for part in parts:
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]
