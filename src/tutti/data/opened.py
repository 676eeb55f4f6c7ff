"""One opened data set of a WindowIndex: its store, its frames, which labels and views of it are used."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from tutti.data.cache import Frames, gathered
from tutti.data.cache.frames import ARRAYS
from tutti.data.embodiments import CommonSpec
from tutti.data.episodes import KEPT_FROM, VECTORS, EpisodeStore, bounds_of, rows_of
from tutti.data.keyframes import check_grippers, next_keyframes
from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer, normalized_text
from tutti.storage.arrays import Arrays, kept, packed
from tutti.types import LABELS, Label

log = logging.getLogger("tutti.data")

_FORMAT = 1
"""Raised when the same sources get other rows (`WindowRows`)."""


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
    without a tokenizer. `rows` number the answers (`answer_texts`)."""

    def __init__(
        self, stores: Sequence[EpisodeStore], rows: Int64[np.ndarray, " n"], tokenizer: Tokenizer | None
    ) -> None:
        self._rows = rows
        texts = answer_texts(stores)
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


def answer_texts(stores: Sequence[EpisodeStore]) -> tuple[str, ...]:
    """The answers of all stores, each once, after that of rows that have none."""
    return ("", *dict.fromkeys(text for store in stores for text in store.answers if text))


@dataclass(frozen=True, slots=True)
class WindowRows:
    """What is known of each row of some sources laid end to end, besides its pictures, as arrays by name.

    `states`, `actions`: normalised, by `common`. `known LABEL`: whether it has the label. `instruction`: its
    number among `instructions`, `answer` that among `answer_texts`, `embodiment` that among `embodiments`, -1
    in pairs. `end`: one past its episode's last row, `progress` 0 to 1 in it. `next_key`: the next row at
    which one of `grippers` opens or closes; `keyed`: whether its actions tell. `remarks`: lines for the user
    on these, `packed`.
    """

    sources: Sequence[Source]
    embodiments: Sequence[str]
    instructions: Sequence[str]
    normalizer: Normalizer
    common: CommonSpec
    grippers: tuple[int, ...]

    def kept(self, home: Path | None) -> Arrays:
        """The arrays; of many rows from the index below `home`, where it has them.

        Raises: UserError if one of `grippers` is none.
        """
        if home is None or sum(source.store.spec.num_frames for source in self.sources) < KEPT_FROM:
            return self.made()
        of = hashlib.sha256(repr((_FORMAT, np.__version__, self.embodiments, self.instructions)).encode())
        of.update(repr((self.normalizer.to_dict(), self.common, self.grippers)).encode())
        for source in self.sources:
            store = source.store
            of.update(repr((store.fingerprint, store.is_pairs, store.spec)).encode())
            if not store.is_as_recorded:
                of.update(np.ascontiguousarray(store.states).data)
                of.update(np.ascontiguousarray(store.actions).data)
            for label in LABELS:
                of.update(np.ascontiguousarray(source.known(label)).data)
        return kept(home / "index" / of.hexdigest()[:24], of.hexdigest(), self.made)

    def made(self) -> dict[str, np.ndarray]:
        """The arrays, computed."""
        stores, found = [source.store for source in self.sources], dict[str, np.ndarray]()
        number = {text: place for place, text in enumerate(self.instructions)}
        for label in LABELS:
            found[f"known {label}"] = np.concatenate([source.known(label) for source in self.sources])
        for vector, label in VECTORS.items():
            normalised = self.common.normalised
            own = [normalised(s.store, s.known(label), self.normalizer, vector) for s in self.sources]
            found[f"{vector}s"] = np.concatenate(own)
        texts = [[number.get(normalized_text(text), 0) for text in store.instructions] for store in stores]
        said = [np.array(own, np.int64)[s.instruction_of] for own, s in zip(texts, stores, strict=True)]
        found["instruction"] = np.where(found["known text"], np.concatenate(said), number.get("", 0))
        place = {text: row for row, text in enumerate(answer_texts(stores))}
        silent = [np.zeros(store.spec.num_frames, np.int64) for store in stores]
        each = [np.array([place[text] for text in store.answers] or [0], np.int64) for store in stores]
        rows = [s.answer_of if s.answers else none for s, none in zip(stores, silent, strict=True)]
        found["answer"] = np.concatenate([own[some] for own, some in zip(each, rows, strict=True)])
        found["known answer"] = found["answer"] > 0
        robots = [-1 if s.is_pairs else self.embodiments.index(s.spec.embodiment) for s in stores]
        counts = [store.spec.num_frames for store in stores]
        found["embodiment"] = np.repeat(np.array(robots, np.int64), counts)
        offsets = np.cumsum([0, *counts])
        end = np.empty(offsets[-1], np.int64)
        progress = np.zeros(len(end), np.float32)
        for store, offset in zip(stores, offsets.tolist(), strict=False):
            lengths, rows = bounds_of(store.episodes)[1], rows_of(store.episodes) + offset
            size, before = np.repeat([lengths, np.cumsum(lengths) - lengths], lengths, axis=1)
            step = np.arange(len(rows)) - before
            end[rows], progress[rows] = rows - step + size, step / np.maximum(1, size - 1)
        return found | {"end": end, "progress": progress} | self._key_frames(found, end, offsets)

    def _key_frames(
        self, found: Arrays, end: Int64[np.ndarray, " n"], offsets: Int64[np.ndarray, " _"]
    ) -> dict[str, np.ndarray]:
        """The next key frame of each row, the rows whose actions tell it, and what there is to say."""
        acting, grippers, remarks = found["known actions"][:, None], list(self.grippers), list[str]()
        if (has := self.common.present("action")) is not None:
            acting = acting & np.asarray(has[found["embodiment"]])[:, grippers]
        for number, source in enumerate(self.sources):
            here = np.arange(*offsets[number : number + 2])[source.known("actions")]
            own, store = self.common.having(source.store.spec.embodiment, self.grippers), source.store
            if own and len(here):
                given = found["actions"][here], end[here], own, store.name, store.spec.action_names
                remarks += check_grippers(*given)
        commands = np.where(acting, found["actions"][:, grippers], np.float32(np.nan))
        return {
            "next_key": next_keyframes(commands, end, range(len(grippers))),
            "keyed": np.asarray(acting.any(axis=1)),
            "remarks": packed(remarks),
        }


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
    out = [ARRAYS.empty((len(rows), views, *pixels)) for rows in wanted]
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
