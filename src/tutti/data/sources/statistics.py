"""Statistics of the numbers that are trained on, for each embodiment by itself."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from tutti.data.conventions.chunks import MOST_CHUNKS, chunks_of, is_relative
from tutti.data.embodiments import CommonSpec
from tutti.data.episodes import KEPT_FROM, VECTORS, EpisodeStore, Vector, mask_of
from tutti.data.normalize import BLOCK, ActionStats, EmbodimentStats, NormalizationKind, Normalizer
from tutti.data.sources.parts import Labelled, Part, labelled_rows, stores_of
from tutti.durations import in_own_steps
from tutti.errors import UserError
from tutti.storage.files import write_json
from tutti.storage.reading import read_json, shown

log = logging.getLogger("tutti.data")

_FORMAT = 2
"""Raised when the same numbers get other statistics, or files other names."""


def fit_normalizer(
    parts: Sequence[Part],
    spec: CommonSpec,
    kind: NormalizationKind,
    horizon: int,
    home: Path | None = None,
    *,
    labelled: Labelled | None = None,
) -> Normalizer:
    """The statistics of all rows to train on that have the label, in one pass over them; `spec` is what the
    parts share. Of actions that are learned relative to the state at the start of their chunk, of `horizon`
    steps, those of evenly spread chunks. Those of many rows are kept below `home`, the folder of caches.
    `labelled` are the rows with each label, where they are known.

    Raises: UserError if none has.
    """
    stats: dict[str, EmbodimentStats] = {}
    known = labelled or {store: labelled_rows(store, parts, spec) for store in stores_of(parts)}

    def own_steps(part: Part) -> int:
        return in_own_steps(horizon, Fraction(part.store.spec.fps) / Fraction(spec.fps))

    for robot, own in spec.own.items():
        of_robot = [part for part in parts if part.store.spec.embodiment == robot]
        fitted: dict[Vector, ActionStats] = {}
        for vector, label in VECTORS.items():
            if not getattr(own, f"{vector}_dim"):
                fitted[vector] = ActionStats.fit(np.empty((1, 0), np.float32))
                continue
            used = [_used(part, known[part.store][label]) for part in of_robot]
            if not any(rows.any() for rows in used):
                whose = f" of {robot}" * (len(spec.own) > 1)
                raise UserError(
                    f"data.sources: no frame to train on has {label}{whose}.\n"
                    f"  expected: one source with them\n  cure: set sources.labels.{label}=true where "
                    "they are, or name a source with them."
                )
            several = zip(of_robot, used, strict=True)
            if vector == "action" and any(is_relative(part.store) for part in of_robot):
                acting = [pair for pair in several if pair[0].labels[label] and pair[0].store.spec.action_dim]
                each, most = MOST_CHUNKS // len(acting), MOST_CHUNKS * horizon
                found = (chunks_of(p.store, p.training, rows, own_steps(p), each) for p, rows in acting)
                fitted[vector] = ActionStats.of(chain.from_iterable(found), most)
            else:
                pairs = [(part.store, rows) for part, rows in several]
                fitted[vector] = _of_rows(pairs, vector, int(sum(map(np.sum, used))), home)
        stats[robot] = EmbodimentStats(**fitted)
    return Normalizer(kind, stats)


def _used(part: Part, known: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """The rows that a part trains on."""
    return known & mask_of(part.training, len(known))


def _of_rows(
    pairs: Sequence[tuple[EpisodeStore, Bool[np.ndarray, " _"]]],
    vector: Vector,
    count: int,
    home: Path | None,
) -> ActionStats:
    """Of these `count` rows; from their file, which is called by digests of them, where there is one."""

    def rows() -> Iterator[Float32[np.ndarray, "_ d"]]:
        return chain.from_iterable(_rows(store, vector, used) for store, used in pairs)

    if home is None or count < KEPT_FROM:
        return ActionStats.of(rows(), count)
    # NumPy's versions may add in other orders.
    digest = hashlib.blake2b(f"{_FORMAT} {np.__version__} {count}".encode(), digest_size=16)
    for store, used in pairs:
        if store.is_as_recorded:
            digest.update(store.number_digests[f"{vector}s"].tobytes() + used.tobytes())
            continue
        for block in _rows(store, vector, used):
            digest.update(np.ascontiguousarray(block).data)
    path = home / "statistics" / f"{digest.hexdigest()}.json"
    if path.exists():
        try:
            kept = read_json(path)
            if kept["sum"] != _sum(kept["stats"]):
                raise ValueError("its numbers are not those that were written")
            return ActionStats.from_dict(kept["stats"])
        except (UserError, KeyError, TypeError, ValueError) as error:
            why = shown(str(error), 200, quoted=False)
            log.warning("statistics: %s is damaged (%s); they are computed anew", path, why)
    found = ActionStats.of(rows(), count)
    with suppress(UserError):  # a full disk: they are computed again the next time
        write_json(path, {"sum": _sum(found.to_dict()), "stats": found.to_dict()})
    return found


def _sum(stats: Any) -> str:
    return hashlib.sha256(json.dumps(stats, sort_keys=True).encode()).hexdigest()


def _rows(
    store: EpisodeStore, vector: Vector, used: Bool[np.ndarray, " n"]
) -> Iterator[Float32[np.ndarray, "_ d"]]:
    """These numbers of a store, as views of its own where all of a block are used."""
    values = store.states if vector == "state" else store.actions
    for begin in range(0, len(used), BLOCK):
        block, own = values[begin : begin + BLOCK], used[begin : begin + BLOCK]
        yield block if own.all() else block[own]


def training_texts(parts: Iterable[Part]) -> set[str]:
    """The instructions that the text is fitted on."""
    return set[str]().union(*(part.texts(part.training) for part in parts))


def training_answers(parts: Iterable[Part]) -> set[str]:
    """The answers about pictures that the text is fitted on, besides."""
    trained = (
        (part.store, episode.start) for part in parts if part.store.answers for episode in part.training
    )
    return {store.answers[store.answer_of[row]] for store, row in trained}
