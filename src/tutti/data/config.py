"""Config of the data: which data sets, and how they become batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tutti.data.augment import ColourJitter, NoAugmentation
from tutti.data.bundle import (
    DataBundle,
    ValidationSet,
    check_compatible,
    content_hash,
    evenly_spread,
    fit_normalizer,
    texts_of,
)
from tutti.data.cache import FrameCache
from tutti.data.episodes import EpisodeStore, Progress
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.loader import Loader
from tutti.data.mixture import Mixture
from tutti.data.normalize import NormalizationKind
from tutti.data.split import GroupOf, Parts, split_sources
from tutti.data.tokenize import MAX_LENGTH, Tokenizer
from tutti.data.windows import Source, WindowIndex
from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.types import DataNeeds, DataSpec

Augmentation = Annotated[NoAugmentation | ColourJitter, Field(discriminator="kind")]


class SourceConfig(FrozenConfig):
    """One data set: a LeRobotDataset v3.0 folder."""

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

    def open(self) -> EpisodeStore:
        """Opens and checks the data set."""
        views = None if self.views == "auto" else self.views
        return LeRobotStore(self.path, views, self.state_key, self.action_key)


class DataConfig(FrozenConfig):
    """Data sets and how they become batches."""

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
    text_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)] | Literal["auto"] = Field(
        default="auto", description="Tokens of a padded instruction; auto: 1.5 times the longest."
    )
    augmentation: Augmentation = Field(
        default_factory=NoAugmentation, description="none, or colour: brightness, contrast, saturation."
    )
    prefetch: int = Field(default=3, ge=0, le=64, description="Batches made ahead by a thread; 0: none.")
    seed: int = Field(default=0, ge=0, description="Seed of the order, the split and the augmentation.")

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
        check_compatible(stores)
        self._check_lengths(stores, needs)
        training, validation = self._split(stores, group_of)
        normalizer = fit_normalizer(self.normalization, stores, training)
        length = None if self.text_length == "auto" else self.text_length
        tokenizer = Tokenizer.fit(texts_of(stores, training), self.vocab_size, length)
        sources = [
            Source(
                store=store,
                frames=FrameCache.open_or_build(store, cache_folder, self.image_size, progress).frames,
                weight=config.weight,
            )
            for store, config in zip(stores, self.sources, strict=True)
        ]
        windows = WindowIndex(
            sources, horizon=self.horizon, normalizer=normalizer, tokenizer=tokenizer, needs=needs
        )
        parts = tuple(windows.rows_of(number, part) for number, part in enumerate(training))
        train = Loader(
            windows,
            Mixture(parts, tuple(source.weight for source in self.sources), self.seed),
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            prefetch=self.prefetch,
            identity=content_hash(stores, parts),
        )
        held_out = np.concatenate([windows.rows_of(number, part) for number, part in enumerate(validation)])
        # Shuffled once, so that every batch of the validation mixes instructions.
        order = np.random.default_rng([self.seed, 4])
        chosen = order.permutation(evenly_spread(held_out, self.validation_windows))
        first = stores[0].spec
        return DataBundle(
            train=train,
            validation=ValidationSet(windows, chosen, self.batch_size, held_out),
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
        return texts_of(stores, self._split(stores, group_of)[0])

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
