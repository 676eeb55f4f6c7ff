"""One opened data set of a WindowIndex: its store, its frames, which labels and views of it are used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from tutti.data.cache import Frames, gathered
from tutti.data.embodiments import CommonSpec
from tutti.data.episodes import VECTORS, EpisodeStore
from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.types import Label

log = logging.getLogger("tutti.data")


@dataclass(frozen=True, slots=True)
class Source:
    """One data set, opened: its store and its decoded frames (N, v, 3, s, s). `labelled` are the rows in
    which each label is used; None: wherever the store has it. `slots` are the views of the model that its
    own are, the others are masked; None: all, in order."""

    store: EpisodeStore
    frames: UInt8[np.ndarray, "n v 3 s s"] | Frames
    labelled: Mapping[Label, Bool[np.ndarray, " n"]] | None = None
    slots: tuple[int, ...] | None = None

    def known(self, label: Label) -> Bool[np.ndarray, " n"]:
        """The rows in which this label is used."""
        return (self.labelled or self.store.present)[label]


class Answers:
    """What is to be said about the pictures of all rows of the sources laid end to end, as tokens; nothing
    without a tokenizer. `known` are the rows that have an answer."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer | None) -> None:
        stores = [source.store for source in sources]
        texts = ("", *dict.fromkeys(text for store in stores for text in store.answers if text))
        number = {text: place for place, text in enumerate(texts)}
        each = [
            np.array([number[text] for text in store.answers])[store.answer_of]
            if store.answers
            else np.zeros(store.spec.num_frames, np.int64)
            for store in stores
        ]
        self._rows = np.concatenate(each)
        self.known = self._rows > 0
        self._tokens = None if tokenizer is None else [one.numpy() for one in tokenizer.encode_answers(texts)]

    def of(self, windows: Int64[np.ndarray, " b"]) -> dict[str, Tensor]:
        """The fields of a batch of these rows."""
        if self._tokens is None:
            return {}
        own = self._rows[windows]
        ids, mask = (torch.from_numpy(one[own]) for one in self._tokens)
        return {"answer": ids, "answer_mask": mask}


def shown_views(sources: Sequence[Source]) -> Bool[np.ndarray, "k v"]:
    """Which of the views of the model each source has."""
    every = range(max(max(source.slots or [source.frames.shape[1] - 1]) for source in sources) + 1)
    return np.array([[source.slots is None or view in source.slots for view in every] for source in sources])


def all_normalised(
    sources: Sequence[Source], normalizer: Normalizer, common: CommonSpec
) -> list[Float32[np.ndarray, "n _"]]:
    """The normalised states, and actions, of all rows of the sources laid end to end."""
    return [
        np.concatenate(
            [common.normalised(one.store, one.known(label), normalizer, vector) for one in sources]
        )
        for vector, label in VECTORS.items()
    ]


def pictures_of(
    sources: Sequence[Source],
    offsets: Int64[np.ndarray, " k"],
    views: int,
    wanted: Sequence[Int64[np.ndarray, " _"]],
) -> list[UInt8[np.ndarray, "_ v 3 s s"]]:
    """The pictures of each of some lists of rows of the sources laid end to end from `offsets` on, those of a
    source together; of so many views."""
    if len(sources) == 1:
        return gathered(sources[0].frames, wanted)
    pixels = sources[0].frames.shape[2:]
    out = [np.empty((len(rows), views, *pixels), dtype=np.uint8) for rows in wanted]
    numbers = [np.searchsorted(offsets, rows, side="right") - 1 for rows in wanted]
    raw = [one.frames if isinstance(one.frames, np.ndarray) else None for one in sources]
    whole = [frames if one.slots is None else None for one, frames in zip(sources, raw, strict=True)]
    for to, number, rows in zip(out, numbers, wanted, strict=True):
        # Raw pictures are copied once, from where they lie to where they are wanted, in the order of memory.
        own = zip(number.tolist(), (rows - offsets[number]).tolist(), strict=True)
        for place, (source, row) in enumerate(own):
            if (pictures := whole[source]) is not None:
                to[place] = pictures[row]
    for index, (source, offset) in enumerate(zip(sources, offsets, strict=False)):
        if whole[index] is not None:
            continue
        here = [np.flatnonzero(number == index) for number in numbers]
        own = [rows[some] - offset for rows, some in zip(wanted, here, strict=True)]
        found: list[Any] = gathered(source.frames, own) if raw[index] is None else [source.frames] * len(own)
        for to, some, pictures, rows in zip(out, here, found, own, strict=True):
            if source.slots is None:
                to[some] = pictures
                continue
            reading = range(len(some)) if raw[index] is None else rows.tolist()
            to[some] = 0  # what is masked is black
            for place, row in zip(some.tolist(), reading, strict=True):
                for view, slot in enumerate(source.slots):
                    to[place, slot] = pictures[row, view]
    return out


def warn_of_cut(tokenizer: Tokenizer, texts: Sequence[str], mask: Bool[Tensor, "i l"]) -> None:
    """Says which texts are longer than what is read of them; `mask` is that of their tokens."""
    most = tokenizer.max_length
    full = [texts[int(row)] for row in torch.nonzero(mask.sum(dim=1) == most).flatten()]
    if cut := {own: length for own in full if (length := tokenizer.length(own)) > most}:
        worst = max(cut, key=lambda own: cut[own])
        log.warning(
            f"text: {len(cut):,} of {len(mask):,} instructions are cut after {most} tokens "
            f"(data.text_length); the longest has {cut[worst]}: {worst[:80]!r}"
        )
