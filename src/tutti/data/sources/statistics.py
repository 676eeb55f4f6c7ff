"""Statistics of the numbers that are trained on, for each embodiment by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from jaxtyping import Float32

from tutti.data.conventions.chunks import MOST_CHUNKS, chunks_of
from tutti.data.embodiments import CommonSpec
from tutti.data.episodes import VECTORS, Vector, row_spans
from tutti.data.normalize import ActionStats, EmbodimentStats, NormalizationKind, Normalizer
from tutti.data.sources.parts import Part, labelled_rows
from tutti.durations import in_own_steps
from tutti.errors import UserError
from tutti.types import Label

MOST_VIEWS = 1 << 16
"""Stretches of rows that are looked at in place."""


def fit_normalizer(parts: Sequence[Part], spec: CommonSpec, kind: NormalizationKind) -> Normalizer:
    """The statistics of all rows to train on that have the label; `spec` is what the parts share.

    Raises: UserError if none has.
    """
    stats: dict[str, EmbodimentStats] = {}
    for robot, own in spec.own.items():
        of_robot = [part for part in parts if part.store.spec.embodiment == robot]
        known = {part.store: labelled_rows(part.store, parts, spec) for part in of_robot}
        fitted: dict[Vector, ActionStats] = {}
        for vector, label in VECTORS.items():
            found = [np.empty((1, 0), np.float32)]
            if getattr(own, f"{vector}_dim"):
                found = [rows for part in of_robot for rows in _rows(part, known[part.store][label], label)]
                if not found:
                    whose = f" of {robot}" * (len(spec.own) > 1)
                    raise UserError(
                        f"data.sources: no frame to train on has {label}{whose}.\n"
                        f"  expected: one source with them\n  cure: set sources.labels.{label}=true where "
                        "they are, or name a source with them."
                    )
            fitted[vector] = ActionStats.fit(*found)
        stats[robot] = EmbodimentStats(**fitted)
    return Normalizer(kind, stats)


def _rows(part: Part, known: np.ndarray, label: Label) -> list[Float32[np.ndarray, "_ d"]]:
    """The numbers that a part trains on, as views where these are few: a copy takes as much again."""
    values = part.store.states if label == "state" else part.store.actions
    used = np.zeros(len(values), bool)
    for start, end in row_spans(part.training):
        used[start:end] = known[start:end]
    edges = np.flatnonzero(np.diff(used, prepend=False, append=False)).reshape(-1, 2)
    if len(edges) > MOST_VIEWS:
        return [values[used]]
    return [values[start:end] for start, end in edges.tolist()]


def with_relative_chunks(
    rows: Normalizer, parts: Sequence[Part], spec: CommonSpec, horizon: int
) -> Normalizer:
    """The statistics of actions relative to the state at the start of their chunk, of training chunks; those
    of the states are kept."""
    acting = [part for part in parts if part.labels["actions"] and part.store.spec.action_dim]
    found = [
        chunks_of(
            *(part.store, part.training, labelled_rows(part.store, parts, spec)["actions"]),
            in_own_steps(horizon, Fraction(part.store.spec.fps) / Fraction(spec.fps)),
            MOST_CHUNKS // len(acting),
        )
        for part in acting
    ]
    moved = replace(rows.stats[spec.embodiment], action=ActionStats.fit(*found))
    return Normalizer(rows.kind, {spec.embodiment: moved})


def training_answers(parts: Iterable[Part]) -> set[str]:
    """The answers about pictures that the text is fitted on, besides."""
    trained = (
        (part.store, episode.start) for part in parts if part.store.answers for episode in part.training
    )
    return {store.answers[store.answer_of[row]] for store, row in trained}
