"""Config of the data: which data sets, and how they become batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from jaxtyping import Int64
from pydantic import Field, model_validator

from tutti.data.augmentation import Augmentation, NoAugmentation
from tutti.data.bundle import Batches, DataBundle, Statistics, evenly_spread
from tutti.data.cache import CacheConfig, decide, give_back, open_frames, share, shared
from tutti.data.conventions.config import CanonicalConfig
from tutti.data.conventions.served import Served
from tutti.data.episodes import ALL_USED, Episodes, Progress
from tutti.data.loader import Loader
from tutti.data.mixture import UNLABELLED, ComposedMixture, Mixture, MixtureConfig
from tutti.data.normalize import NormalizationKind
from tutti.data.opened import Source
from tutti.data.sources import (
    Labelled,
    Part,
    SourceConfig,
    check_compatible,
    check_lengths,
    check_unchanged,
    fit_normalizer,
    labelled_rows,
    masked_line,
    open_parts,
    slots,
    source_shares,
    split_parts,
    stores_of,
    training_answers,
    training_texts,
    weighed,
)
from tutti.data.split import GroupOf, Tasks, check_wordings, grouped
from tutti.data.tokenize import MAX_LENGTH, Tokenizer, normalized_text
from tutti.data.windows import WindowIndex
from tutti.durations import ChunkSteps, PastSteps, require_steps
from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.storage.text_source import TextSource
from tutti.types import DataNeeds, DataSpec

PictureSize = Annotated[int, Field(ge=8, le=1024)]


class DataConfig(FrozenConfig):
    """Data sets and how they become batches."""

    sources: tuple[SourceConfig, ...] = Field(
        default=(),
        description="Data sets of one robot or of several, and of pictures with texts; empty: the one that "
        "this run records.",
    )
    canonical: CanonicalConfig = Field(
        default_factory=CanonicalConfig,
        description="The one form of rotations and actions that sources of several conventions are brought "
        "to.",
    )
    slots: Literal["plain", "canonical"] = Field(
        default="plain",
        description="plain: each robot's own numbers stand first. canonical: by what they are: position, "
        "rotation, joints, gripper, base, of a second arm, others.",
    )
    mixture: MixtureConfig = Field(
        default_factory=MixtureConfig,
        description="How windows are drawn, besides the weights of the sources.",
    )
    horizon: ChunkSteps = Field(default=16, description='Actions in a chunk, or how long it is: "0.8s".')
    history: PastSteps = Field(
        default=(0,),
        description='Pictures and states that are observed: steps or times back, ["-0.8s", "-0.4s", 0].',
    )
    batch_size: int = Field(default=64, ge=1, description="Windows in a batch.")
    image_size: PictureSize | Literal["auto"] = Field(
        default=64,
        description="Edge of the square pictures, in pixels; auto: of those which the pre-trained "
        "vision tower was trained with.",
    )
    validation_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of all episodes held out, of every task alike."
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
        default_factory=NoAugmentation,
        description="none; colour: brightness, contrast, saturation; or "
        "pictures: each operation with its range and probability.",
    )
    prefetch: int = Field(default=3, ge=0, le=64, description="Batches made ahead by a thread; 0: none.")
    cache: CacheConfig = Field(
        default_factory=CacheConfig, description="Decoded pictures, kept for all runs and deleted at will."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the order, the split and the augmentation.")

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.sources and not any(source.labels.actions for source in self.sources):
            raise ValueError("sources: labels.actions is false in all; at least one must have actions")
        if self.episodes_per_task != "all" and any(one.per_task != "all" for one in self.sources):
            raise ValueError(
                "episodes_per_task is for all sources and sources.per_task for one: give one of them"
            )
        if self.slots == "plain" and any(source.slots != "auto" for source in self.sources):
            raise ValueError("sources.slots is said, but slots is plain; set data.slots=canonical")
        self._check_mixture()
        share, size = self.mixture.labelled, self.batch_size
        if share != "by_weight" and abs(size * share - (whole := max(1, round(size * share)))) > 1e-6:
            raise ValueError(
                f"mixture.labelled is {share:g} of batch_size {size}, {size * share:g} windows; "
                f"{whole / size:g} would be {whole}"
            )
        return self

    def _check_mixture(self) -> None:
        """Raises: ValueError for names that are not each another, and weights that cannot be compared."""
        given = [source.name for source in self.sources if source.name != "auto"]
        if twice := [name for name in given if given.count(name) > 1]:
            raise ValueError(f"sources.name: {twice[0]!r} is given twice; give each source its own name")
        by_size = [source.weight == "auto" for source in self.sources]
        if any(by_size) and not all(by_size):
            other, number = by_size.index(False), by_size.index(True)
            raise ValueError(
                f"sources.{number}.weight is auto, sources.{other}.weight {self.sources[other].weight:g}; "
                "a number says nothing beside sizes: give auto to all sources, or numbers to all"
            )
        if self.mixture.temperature != 2 and not any(by_size):
            raise ValueError(
                f"mixture.temperature is {self.mixture.temperature:g}, but no source has weight: auto, which "
                "alone it is for; set sources.weight to auto in all"
            )

    @property
    def pixels(self) -> int:
        """`image_size` as a number. Raises: UserError if it is auto, and there is no tower."""
        if self.image_size == "auto":
            raise UserError(
                "data.image_size is auto, the size of a pre-trained vision tower's pictures, and there is no "
                "such tower.\n  cure: give a number, or model.vision.kind=pretrained"
            )
        return self.image_size

    def open(self, home: Path | None = None) -> list[Part]:
        """The sources, opened and checked, with their numbers as they are learned; large ones from an index
        below `home`, the folder of caches. Raises: UserError."""
        return open_parts(self.sources, self.canonical, canonical_slots=self.slots == "canonical", home=home)

    def build(
        self,
        needs: DataNeeds,
        progress: Progress | None = None,
        *,
        group_of: GroupOf | None = None,
        trained_on: Path | None = None,
        kept: Statistics | None = None,
        choice: Path | None = None,
        text: TextSource | None = None,
    ) -> DataBundle:
        """Opens the sources, fits normalisation and text on the training episodes, decodes frames once.

        `group_of(instruction)` names the task that the split of validation episodes is stratified by, and
        that `task_id` numbers; left out, each wording counts as its own group. `tasks` goes before it. Frame
        caches are kept in `cache.folder` and found again.

        `trained_on` is the file of digests of the data that a run has been trained on, which these must be.
        `kept` are the normaliser and the tokenizer of another run, instead of fitted ones. `choice` is the
        file that keeps what `cache.kind` auto has decided. `text`: a language encoder's own tokenizer, which
        goes before a kept one, since no other's ids are rows of its embedding.

        Raises UserError for anything wrong with the data sets or between them, one that is too short for
        the horizon, or a full disk.
        """
        if not self.sources:
            raise UserError("data.sources is empty; expected at least one {path: <data set>}.")
        require_steps(self, "data")
        opened = self.open(home := self.cache.home())
        for store in stores_of(opened):
            store.share(lambda owner: share(owner, home))
        if trained_on is not None:
            check_unchanged(stores_of(opened), trained_on)
        spec = check_compatible(opened)
        check_lengths(opened, needs, self.horizon, self.history)
        if kept is not None:
            kept.check(spec, opened[0].store.name, self.normalization)
        parts = self.split(opened, group_of)
        stores = stores_of(parts)
        labelled: Labelled = {
            store: {label: shared(own, home) for label, own in labelled_rows(store, parts, spec).items()}
            for store in stores
        }
        normalizer = fit_normalizer(parts, spec, self.normalization, self.horizon, home, labelled=labelled)
        spoken = training_texts(parts)
        spoken |= training_answers(parts) - {""} if "answer" in needs.labels else set()
        tokenizer = Tokenizer.of(spoken, self.vocab_size, self.text_length, text)
        if kept is not None:
            normalizer, tokenizer = kept.normalizer, kept.tokenizer if text is None else tokenizer
        cache = decide(stores, self.cache, self.pixels, choice)
        frames = open_frames(stores, cache, self.pixels, progress=progress)
        places = [slots(store, spec) for store in stores]
        windows = WindowIndex(
            list(map(Source, stores, frames, labelled.values(), places)),
            horizon=self.horizon,
            history=self.history,
            normalizer=normalizer,
            tokenizer=tokenizer,
            needs=needs,
            group_of=grouped(self.tasks, group_of),
            parts=[(stores.index(p.store), Episodes.joined((p.training, p.held_out))) for p in parts],
            common=spec,
            home=home,
        )
        share(windows, home)
        check_wordings(self.tasks, [normalized_text(t) for store in stores for t in store.instructions])
        trained = [shared(windows.rows_of(stores.index(p.store), p.training), home) for p in parts]
        if any(part.any_rate for part in parts):
            windows.remarks += tuple(map(masked_line, parts, map(windows.masked_share, trained)))
        drawn = [shared(self._drawn(windows, rows), home) for rows in trained]
        # A resume must find the data sets, and what of them is trained on, unchanged.
        digest = hashlib.sha256(json.dumps([store.fingerprint for store in stores]).encode())
        for rows in drawn:
            digest.update(np.ascontiguousarray(rows).data)
        if any(part.labels != ALL_USED for part in parts):
            digest.update(b"".join(rows.tobytes() for own in labelled.values() for rows in own.values()))
        if cache.kind == "jpeg":  # other pictures
            digest.update(f"jpeg {cache.quality}".encode())
        train = Loader(
            windows,
            self._mixture(windows, drawn, [part.weight for part in parts]),
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            prefetch=self.prefetch,
            identity=digest.hexdigest()[:16],
        )
        held_out = np.concatenate(
            [windows.rows_of(stores.index(part.store), part.held_out) for part in parts]
        )
        # Shuffled once, so that every batch of the validation mixes instructions.
        order = np.random.default_rng([self.seed, 4])
        chosen = order.permutation(evenly_spread(held_out, self.validation_windows))
        described = DataSpec(
            views=spec.views,
            image_size=self.pixels,
            state_dim=spec.state_dim,
            action_dim=spec.action_dim,
            horizon=self.horizon,
            vocab_size=tokenizer.vocab_size,
            text_length=tokenizer.text_length,
            embodiments=windows.embodiments,
            fps=spec.fps,
            history=self.history,
            robots=spec.robots,
            **spec.dimensions(),
        )
        served = Served.of(stores, described)
        give_back()
        if kept is not None:
            kept.check_form(served, opened[0].store.name)
        return DataBundle(
            train=train,
            validation=Batches(windows, chosen, self.batch_size),
            spec=described,
            served=served,
            normalizer=normalizer,
            tokenizer=tokenizer,
            windows=windows,
            parts=tuple(parts),
            shares=source_shares(parts, spec, self.mixture.labelled, labelled),
            training_rows=trained[0] if len(trained) == 1 else shared(np.concatenate(trained), home),
            held_out_rows=held_out,
        )

    def split(self, parts: Sequence[Part], group_of: GroupOf | None = None) -> list[Part]:
        """The opened sources with their episodes, those held out and those to train on (`split_parts`), and
        the weights that are by their size. `tasks` goes before `group_of`."""
        count = None if self.episodes_per_task == "all" else self.episodes_per_task
        found = split_parts(parts, self.validation_fraction, self.seed, count, grouped(self.tasks, group_of))
        by_size = any(source.weight == "auto" for source in self.sources)
        return weighed(found, self.mixture.temperature) if by_size else found

    def _drawn(self, windows: WindowIndex, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " _"]:
        """The training windows of a source, those before a key frame as often as `mixture` says."""
        if (times := self.mixture.near_key_frames) == 1:
            return rows
        if not windows.needs.grippers:
            raise UserError(
                f"data.mixture.near_key_frames is {times}, but no term names a gripper, whose opening and "
                "closing makes key frames.\n  cure: set objective.state.gripper.dimension=N, or "
                "near_key_frames=1."
            )
        return np.repeat(rows, np.where(windows.before_key_frame(rows), times, 1))

    def _mixture(
        self, windows: WindowIndex, drawn: Sequence[Int64[np.ndarray, " _"]], weights: Sequence[float]
    ) -> Mixture | ComposedMixture:
        """The order of the windows `drawn` of each source; with and without actions apart, if batches are
        composed of both."""
        if self.mixture.labelled == "by_weight":
            return Mixture(tuple(drawn), tuple(weights), self.seed)
        kinds: list[Mixture] = []
        count = round(self.mixture.labelled * self.batch_size)
        for key in ((), (UNLABELLED,))[: 1 + (count < self.batch_size)]:
            some = [rows[windows.known("actions", rows) != bool(key)] for rows in drawn]
            each = enumerate(zip(some, weights, strict=True))
            full = [(rows, weight, number) for number, (rows, weight) in each if len(rows)]
            if not full:
                raise UserError(
                    f"data.mixture.labelled is {self.mixture.labelled:g}, but no window to train on "
                    f"{'lacks' if key else 'has'} actions.\n  cure: set data.mixture.labelled=by_weight, or "
                    f"add a source with sources.labels.actions={'false' if key else 'true'}."
                )
            own, shares, numbers = map(tuple, zip(*full, strict=True))
            kinds.append(Mixture(own, shares, self.seed, key=key, numbers=numbers))
        if len(kinds) == 1:
            return kinds[0]
        return ComposedMixture(*kinds, counts=(count, self.batch_size - count))
