"""Config of the data: which data sets, and how they become batches."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from tutti.data.bundle import Batches, DataBundle, Statistics, evenly_spread, texts_of
from tutti.data.cache import CacheConfig, cached_frames
from tutti.data.episodes import Episode, EpisodeStore, Progress, check_unchanged
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.columns import MAX_TOLERANCE
from tutti.data.formats.lerobot.metadata import Chosen, read_info
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.formats.lerobot.video import TOLERANCE
from tutti.data.loader import ColourJitter, Loader, NoAugmentation
from tutti.data.mixture import Mixture
from tutti.data.normalize import NormalizationKind, Normalizer
from tutti.data.split import GroupOf, Tasks, are_held_out, check_wordings, first_episodes, grouped
from tutti.data.tokenize import MAX_LENGTH, Tokenizer
from tutti.data.windows import Source, WindowIndex
from tutti.durations import ChunkSteps, require_steps
from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.storage.files import LocalPath
from tutti.types import DataNeeds, DataSpec

Augmentation = Annotated[NoAugmentation | ColourJitter, Field(discriminator="kind")]


FeatureKeys = Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]

_SPAN = r"^\d{1,10}-\d{1,10}$"
EpisodeNumbers = tuple[Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=_SPAN)], ...]


def _as_range(numbers: int | str) -> range:
    """Of 7, or of "0-99", both ends included."""
    first, last = map(int, numbers.split("-")) if isinstance(numbers, str) else (numbers, numbers)
    return range(first, last + 1)


def _as_keys(keys: str | tuple[str, ...]) -> tuple[str, ...]:
    return keys if isinstance(keys, tuple) else (keys,)


class SourceConfig(FrozenConfig):
    """One data set: a LeRobotDataset v3.0 folder."""

    path: LocalPath = Field(description="The folder that contains meta/ and data/.")
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Share of the samples: weight / sum of the weights of all sources.",
    )
    views: FeatureKeys | Literal["auto"] = Field(
        default="auto",
        description="The camera features to use, in order; auto: all, without depth and mono cameras.",
    )
    state: str | FeatureKeys | Literal["none"] = Field(
        default=STATE,
        description="The feature that is the state, or several, joined in this order; none: no "
        "proprioception, a state without numbers.",
    )
    action: str | FeatureKeys = Field(
        default=ACTION, description="The feature that is the action, or several, joined in this order."
    )

    episodes: EpisodeNumbers | Literal["all"] = Field(
        default="all", description='The episodes to use: numbers and ranges, [3, "10-99"].'
    )
    exclude: EpisodeNumbers = Field(
        default=(), description="Episodes to leave out, such as damaged ones; nothing of them is checked."
    )
    tolerance: float = Field(
        default=TOLERANCE,
        gt=0,
        le=MAX_TOLERANCE,
        description="How far a timestamp may lie off frame number / fps, in frames. Above the default, for "
        "times by a clock, video frames are taken by number.",
    )

    @field_validator("episodes", "exclude", mode="before")
    @classmethod
    def _check_numbers(cls, given: Any) -> Any:
        numbers = (given,) if isinstance(given, int | str) and given != "all" else given
        for one in numbers if isinstance(numbers, list | tuple) else ():
            is_span = isinstance(one, str) and re.fullmatch(_SPAN, one) is not None and len(_as_range(one))
            if not is_span and not (type(one) is int and one >= 0):
                raise ValueError(
                    f'expected episode numbers and rising ranges, [7, "10-19"], found {one!r:.60}'
                )
        return numbers

    @field_validator("state", "action", mode="before")
    @classmethod
    def _check_features(cls, given: Any) -> Any:
        many = given if isinstance(given, list | tuple) else [given]
        if not many or not all(isinstance(one, str) for one in many) or len(set(many)) < len(many):
            raise ValueError(
                f"expected the name of a feature, or several different ones, found {given!r:.60}"
            )
        return given

    @property
    def fps(self) -> float:
        """The frames a second of the data set, which is not opened."""
        return read_info(self.path).fps

    def open(self) -> EpisodeStore:
        """Opens and checks the data set."""
        views = None if self.views == "auto" else self.views
        state = () if self.state == "none" else _as_keys(self.state)
        episodes = None if self.episodes == "all" else tuple(map(_as_range, self.episodes))
        return LeRobotStore(
            self.path,
            views,
            state=state,
            action=_as_keys(self.action),
            chosen=Chosen(
                episodes=episodes, exclude=tuple(map(_as_range, self.exclude)), tolerance=self.tolerance
            ),
        )


class DataConfig(FrozenConfig):
    """Data sets and how they become batches."""

    sources: tuple[SourceConfig, ...] = Field(
        default=(), description="Data sets of one embodiment; empty: the one that this run records."
    )
    horizon: ChunkSteps = Field(default=16, description='Actions in a chunk, or how long it is: "0.8s".')
    batch_size: int = Field(default=64, ge=1, description="Windows in a batch.")
    image_size: int = Field(default=64, ge=8, le=1024, description="Edge of the square pictures, in pixels.")
    validation_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of all episodes held out, of every task alike.",
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
        default="auto",
        description="Tokens that instructions are padded to, and cut after; auto: padded to 1.5 times the "
        "longest in training, and cut after 1.5 times its bytes, at least 64.",
    )
    tasks: Tasks = Field(
        default={},
        description="Instructions that are wordings of one task, {open-door: [open the door, pull it open]}. "
        "Of others the suite that recorded them knows the task; else each is one of its own.",
    )
    augmentation: Augmentation = Field(
        default_factory=NoAugmentation, description="none, or colour: brightness, contrast, saturation."
    )
    prefetch: int = Field(default=3, ge=0, le=64, description="Batches made ahead by a thread; 0: none.")
    cache: CacheConfig = Field(
        default_factory=CacheConfig, description="Decoded pictures, kept for all runs and deleted at will."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the order, the split and the augmentation.")

    def build(
        self,
        needs: DataNeeds,
        progress: Progress | None = None,
        *,
        group_of: GroupOf | None = None,
        trained_on: Path | None = None,
        kept: Statistics | None = None,
    ) -> DataBundle:
        """Opens the sources, fits normalisation and text on the training episodes, decodes frames once.

        `group_of(instruction)` names the task that the split of validation episodes is stratified by, and
        that `task_id` numbers; left out, each wording counts as its own group. `tasks` goes before it. Frame
        caches are kept in `cache.folder` and found again.

        `trained_on` is the file of digests of the data that a run has been trained on, which these must be.
        `kept` are the normaliser and the tokenizer of another run, instead of fitted ones.

        Raises UserError for anything wrong with the data sets or between them, one that is too short for
        the horizon, or a full disk.
        """
        if not self.sources:
            raise UserError("data.sources is empty; expected at least one {path: <LeRobot folder>}.")
        require_steps(self, "data")
        cache = self.cache.home()
        stores = [source.open() for source in self.sources]
        if trained_on is not None:
            check_unchanged(stores, trained_on)
        check_compatible(stores)
        self._check_lengths(stores, needs)
        if kept is not None:
            for store in stores:
                kept.check(store, self.normalization)
        training, validation = self.split(stores, group_of)
        normalizer, first = self.fit_normalizer(stores, training), stores[0].spec
        length = None if self.text_length == "auto" else self.text_length
        texts = set[str]().union(*map(texts_of, stores, training))
        tokenizer = Tokenizer.fit(texts, self.vocab_size, length)
        if kept is not None:
            normalizer, tokenizer = kept.normalizer, kept.tokenizer
        frames = [cached_frames(store, cache, self.image_size, progress) for store in stores]
        windows = WindowIndex(
            list(map(Source, stores, frames, (source.weight for source in self.sources))),
            horizon=self.horizon,
            normalizer=normalizer,
            tokenizer=tokenizer,
            needs=needs,
            group_of=grouped(self.tasks, group_of),
        )
        check_wordings(self.tasks, windows.instructions)
        parts = tuple(windows.rows_of(number, part) for number, part in enumerate(training))
        # A resume must find the data sets, and what of them is trained on, unchanged.
        digest = hashlib.sha256(json.dumps([store.fingerprint for store in stores]).encode())
        for part in parts:
            digest.update(part.tobytes())
        train = Loader(
            windows,
            Mixture(parts, tuple(source.weight for source in self.sources), self.seed),
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            prefetch=self.prefetch,
            identity=digest.hexdigest()[:16],
        )
        held_out = np.concatenate([windows.rows_of(number, part) for number, part in enumerate(validation)])
        # Shuffled once, so that every batch of the validation mixes instructions.
        order = np.random.default_rng([self.seed, 4])
        chosen = order.permutation(evenly_spread(held_out, self.validation_windows))
        return DataBundle(
            train=train,
            validation=Batches(windows, chosen, self.batch_size),
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
                **first.dimensions(),
            ),
            normalizer=normalizer,
            tokenizer=tokenizer,
            windows=windows,
            training_episodes=tuple(training),
            validation_episodes=tuple(validation),
            training_rows=np.concatenate(parts),
            held_out_rows=held_out,
        )

    def training_texts(self, group_of: GroupOf | None = None) -> set[str]:
        """The instructions that `build` would fit the text on, without decoding a picture."""
        stores = [source.open() for source in self.sources]
        training, _ = self.split(stores, group_of)
        return set[str]().union(*map(texts_of, stores, training))

    def split(
        self, stores: Sequence[EpisodeStore], group_of: GroupOf | None = None
    ) -> tuple[list[tuple[Episode, ...]], list[tuple[Episode, ...]]]:
        """(training, validation) episodes of each store; to train on, the first ones of each group.

        One split over all of them (`are_held_out`), by the episodes' identities. How many are trained on does
        not change it. Of store number i the episodes to train on are drawn with `seed` + i. `tasks`
        goes before `group_of`.
        """
        group_of = grouped(self.tasks, group_of)
        episodes = [episode for store in stores for episode in store.episodes]
        identities = [identity for store in stores for identity in store.identities]
        held = iter(are_held_out(episodes, identities, self.validation_fraction, self.seed, group_of))
        training, validation = [], []
        for seed, store in enumerate(stores, self.seed):
            flags = list(zip(store.episodes, held, strict=False))
            used = tuple(episode for episode, is_held in flags if not is_held)
            if self.episodes_per_task != "all":
                used = first_episodes(used, self.episodes_per_task, seed, group_of)
            training.append(used)
            validation.append(tuple(episode for episode, is_held in flags if is_held))
        return training, validation

    def fit_normalizer(
        self, stores: Sequence[EpisodeStore], training: Sequence[Sequence[Episode]]
    ) -> Normalizer:
        """The statistics of all rows to train on; `training` has the episodes of each store."""
        rows = [np.concatenate([np.arange(e.start, e.end) for e in part]) for part in training]
        states, actions = (
            np.concatenate([getattr(store, name)[part] for store, part in zip(stores, rows, strict=True)])
            for name in ("states", "actions")
        )
        return Normalizer.fit(self.normalization, stores[0].spec.embodiment, states, actions)

    def _check_lengths(self, stores: Sequence[EpisodeStore], needs: DataNeeds) -> None:
        for store in stores:
            longest = max(episode.length for episode in store.episodes)
            offset = max(needs.offsets, default=0)
            if self.horizon > longest or offset >= longest:
                name, value = ("data.horizon", self.horizon) if self.horizon > longest else ("future", offset)
                raise UserError(
                    f"{name} is {value}, but the longest episode of {store.name} has {longest} frames.\n"
                    "  Episodes shorter than the horizon are masked at the end, but one must reach it.\n"
                    f"  cure: set data.horizon to at most {longest} and the future offset below it."
                )


def check_compatible(stores: Sequence[EpisodeStore]) -> None:
    """One embodiment, and the same sizes, in all sources. Raises: UserError for others."""
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
        if other := store.spec.contradiction(first.spec):
            raise UserError(
                f"data.sources: {first.name} and {store.name} have {other}.\n"
                "  One number would mean two things to the model.\n"
                "  cure: bring the numbers of one set into the order and units of the other, or correct its "
                "names in meta/info.json."
            )
