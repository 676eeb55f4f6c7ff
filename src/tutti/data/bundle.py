"""The data of a training in one object, and samples of its windows for checks and probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tutti.data.conventions.served import Served
from tutti.data.embodiments import CommonSpec
from tutti.data.episodes import Episode, EpisodeStore, texts_of
from tutti.data.formats.wanted import read_as
from tutti.data.loader import Loader
from tutti.data.normalize import NormalizationKind, Normalizer
from tutti.data.sources import Part, SourceShare, stores_of
from tutti.data.tokenize import Tokenizer
from tutti.data.windows import WindowIndex
from tutti.errors import UserError
from tutti.nested_dicts import changed_keys, indented
from tutti.types import Batch, DataSpec, Label

BATCH = 128
"""Windows of a sample that are read at once."""


@dataclass(frozen=True, slots=True)
class Batches(Sequence[Batch]):
    """Batches of the windows `rows`, in this order, always the same. The last one may be smaller."""

    windows: WindowIndex
    rows: Int64[np.ndarray, " n"]
    batch_size: int

    def __getitem__(self, number: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        start = range(0, len(self.rows), self.batch_size)[number]
        return self.windows.gather(self.rows[start : start + self.batch_size])

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """How another training has normalised its numbers and split its texts; `spec` is that of its data."""

    spec: DataSpec
    normalizer: Normalizer
    tokenizer: Tokenizer
    served: Served | None = None

    def check(self, mine: CommonSpec, name: str, kind: NormalizationKind) -> None:
        """Whether they can be those of these data, called `name`, under `data.normalization` = `kind`.

        Raises: UserError that says what does not fit.
        """
        wrong, known = "", self.spec.embodiments
        for robot, own in mine.own.items():
            if robot not in known:
                wrong = f"the robot {robot!r}; the statistics are of {', '.join(known)}"
                break
            theirs = self.spec.alone(robot)
            wrong = wrong or theirs.contradiction(own)
            for what in ("state", "action"):
                here, there = getattr(own, f"{what}_dim"), getattr(theirs, f"{what}_dim")
                wrong = wrong or (f"{here} {what} dimensions, {there} there" if here != there else "")
        if kind != self.normalizer.kind:
            wrong = f"data.normalization is {kind}, {self.normalizer.kind} there"
        if wrong:
            raise UserError(
                f"training.init_from.statistics is kept, but those of the other run do not fit {name}: "
                f"{wrong}. Set training.init_from.statistics=new, or make the data or data.normalization "
                "those of the other run."
            )

    def check_form(self, mine: Served | None, name: str) -> None:
        """Raises: UserError unless both learn their numbers in one form."""
        here, there = (one.form if one else {} for one in (mine, self.served))
        if lines := changed_keys(there, here, "conventions"):
            raise UserError(
                f"training.init_from.statistics is kept, but the numbers of {name} are learned in another "
                f"form (there -> here):\n{indented(lines)}\nSet training.init_from.statistics=new, or make "
                "sources.conventions and data.canonical those of the other run."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBundle:
    """The data of a training: loader, validation set, and what a model must know.

    `parts` say what each source uses of its data set; several may be of one of `windows.sources`. `shares`
    are what they have of a batch.
    `training_rows` are the windows of all training episodes, in order, `held_out_rows` those of all others;
    `validation` has some of these, shuffled. `served` are the conventions of the sources, None where their
    numbers are learned as they are recorded.
    """

    train: Loader
    validation: Batches
    spec: DataSpec
    normalizer: Normalizer
    tokenizer: Tokenizer
    windows: WindowIndex
    parts: tuple[Part, ...]
    shares: tuple[SourceShare, ...]
    training_rows: Int64[np.ndarray, " n"]
    held_out_rows: Int64[np.ndarray, " m"]
    served: Served | None = None

    def replay(self, windows: Sequence[int] | Int64[Tensor, " b"]) -> Batch:
        """The batch of these window numbers (`batch.window` of a saved bad batch), without augmentation."""
        return self.windows.gather(torch.as_tensor(windows, dtype=torch.int64).cpu().numpy())

    @property
    def source_names(self) -> tuple[str, ...]:
        """Those of the sources, each another."""
        return tuple(share.name for share in self.shares)

    def epochs(self, position: Mapping[str, Any]) -> tuple[float, ...]:
        """How often each source's windows have been drawn, on average, at this position of the loader."""
        drawn = self.train.mixture.drawn(int(position["consumed"]) * self.train.batch_size)
        return tuple(drawn.get(n, 0) / max(1, share.windows) for n, share in enumerate(self.shares))

    def training_chunks(self, count: int) -> tuple[Float[Tensor, "n t a"], Bool[Tensor, "n t a"]]:
        """Normalised actions and masks of at most `count` training windows with actions, evenly spread, in
        order."""
        return self.windows.chunks(evenly_spread(self.windows.having("actions", self.training_rows), count))

    def measured(self) -> Batches:
        """The validation windows that a policy is measured on."""
        chosen = self.validation
        return Batches(self.windows, self.windows.measurable(chosen.rows), chosen.batch_size)

    def texts(self, batch: Batch) -> list[str]:
        """The instruction of each sample."""
        return [self.windows.instructions[number] for number in batch.instruction_id.tolist()]

    def contents(self) -> list[dict[str, Any]]:
        """Digests of what each source says, for `check_unchanged`."""
        return [source.store.content.to_dict() for source in self.windows.sources]

    def describe(self) -> dict[str, Any]:
        """What the data is, as plain values for logs and reports; seconds are of robot time."""
        per_source = []
        for store in stores_of(self.parts):
            own = [part for part in self.parts if part.store is store]
            training = [episode for part in own for episode in part.training]
            held = [episode for part in own for episode in part.held_out]
            weight = {"weight": sum(part.weight for part in own)}
            per_source.append(describe_source(store, training, held) | weight)
        names = ("episodes", "training_episodes", "validation_episodes", "frames", "seconds")
        totals = {name: sum(entry[name] for entry in per_source) for name in names}
        spoken = set[str]().union(*(part.texts(part.held_out) for part in self.parts))
        return {
            **totals,
            "validation_instructions": len(spoken),
            "training_windows": len(self.training_rows),
            "validation_windows": len(self.validation.rows),
            "batches_per_epoch": self.train.batches_per_epoch,
            "instructions": len(set(self.windows.instructions) - {""}),
            "vocab_size": self.tokenizer.vocab_size,
            "text_length": self.tokenizer.text_length,
            "normalization": self.normalizer.kind,
            "sources": per_source,
            **({"mixture": list(map(asdict, self.shares))} if len(self.shares) > 1 else {}),
        }


def describe_source(
    store: EpisodeStore, training: Sequence[Episode], held: Sequence[Episode]
) -> dict[str, Any]:
    """What a data set is, as plain values."""
    spec, episodes = store.spec, store.episodes
    lines = [*store.converted.conversion.said.lines()] if store.converted else []
    lengths = [episode.length for episode in episodes]
    return {
        "name": store.name,
        "fingerprint": store.fingerprint,
        "embodiment": spec.embodiment,
        "episodes": len(episodes),
        "training_episodes": len(training),
        "validation_episodes": len(held),
        "frames": spec.num_frames,
        "seconds": spec.num_frames / spec.fps,
        "shortest": min(lengths),
        "longest": max(lengths),
        "instructions": len(texts_of(store, episodes)),
        "views": list(spec.views),
        "stored_image_shapes": [list(shape) for shape in spec.image_shapes] if not store.is_pairs else [],
        "format": store.format,
        "read_as": read_as(store.roles),
        **({"conventions": lines} if lines else {}),
    }


def evenly_spread(rows: Int64[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " _"]:
    """At most `count` of `rows`, evenly spread, in order."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some windows of a data set, in rising order. `episode` numbers the episode of each from 0."""

    index: WindowIndex
    rows: Int64[np.ndarray, " n"]
    episode: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def known(self, label: Label) -> Bool[np.ndarray, " n"]:
        """Which windows have this label."""
        return self.index.known(label, self.rows)

    @property
    def num_episodes(self) -> int:
        """How many episodes they come from."""
        return int(self.episode.max()) + 1

    def batches(self) -> Batches:
        """The windows in order, `BATCH` at a time."""
        return Batches(self.index, self.rows, BATCH)

    def actions(self, steps: int) -> tuple[Float64[np.ndarray, "n t a"], Bool[np.ndarray, "n t a"]]:
        """The first `steps` normalised actions of each window and their mask."""
        actions, mask = self.index.chunks(self.rows)
        return actions[:, :steps].double().numpy(), mask[:, :steps].numpy()

    def previous(self) -> tuple[Float64[np.ndarray, "n a"], Bool[np.ndarray, " n"]]:
        """The action before each window, 0 and False at an episode's start and where it is not known."""
        before = np.maximum(self.rows - 1, 0)
        known = (self.rows > 0) & (self.index.episodes_of(before) == self.index.episodes_of(self.rows))
        actions, mask = self.index.chunks(before)
        known &= mask[:, 0].any(dim=1).numpy()
        return np.where(known[:, None], actions[:, 0].double().numpy(), 0.0), known


def spread(index: WindowIndex, rows: Int64[np.ndarray, " n"], most: int) -> Sample:
    """At most `most` of `rows`, evenly spread over them in rising order."""
    chosen = evenly_spread(np.sort(rows), most)
    episode = np.unique(index.episodes_of(chosen), return_inverse=True)[1].astype(np.int64)
    return Sample(index=index, rows=chosen, episode=episode)


def held_out(data: DataBundle, most: int) -> Sample:
    """Windows of held-out episodes, those that a policy is measured on.

    Raises: UserError if there is none.
    """
    if len(rows := data.windows.measurable(data.held_out_rows)) == 0:
        raise UserError(
            "probes: there is no held-out window with actions, and probing what was trained on says little. "
            "Set data.validation_fraction (0.05, say) and train again."
        )
    return spread(data.windows, rows, most)


def training(data: DataBundle, most: int) -> Sample:
    """Windows of training episodes, those that a policy is measured on."""
    return spread(data.windows, data.windows.measurable(data.training_rows), most)


def states(sample: Sample) -> Float64[np.ndarray, "n s"]:
    """The normalised states."""
    return np.concatenate([batch.observation.state.double().numpy() for batch in sample.batches()])
