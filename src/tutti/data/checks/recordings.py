"""Checks of recorded data: constant dimensions, clipped actions, duplicates, empty pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np
from jaxtyping import Float32

from tutti.data.bundle import DataBundle, evenly_spread
from tutti.data.windows import Source
from tutti.findings import CLIPPED_ACTIONS_MAX, EMPTY_FRAMES_MAX, PICTURE_DEVIATION_MIN, Finding

PICTURES = 256
"""Frames that are looked at in each view, evenly spread."""
RELATIVE_RANGE_MIN = 1e-6
"""A dimension whose range is below this times its size is constant."""


def check_recordings(data: DataBundle) -> list[Finding]:
    """Findings about all sources."""
    findings: list[Finding] = []
    for source in data.windows.sources:
        store, name = source.store, source.store.name
        findings += _constant_dimensions("state", store.states, name)
        findings += _constant_dimensions("action", store.actions, name)
        findings += _clipped_actions(store.actions, name)
        findings += _empty_pictures(source)
    return [*findings, *_duplicates(data)]


def _constant_dimensions(what: str, values: Float32[np.ndarray, "n d"], name: str) -> Iterator[Finding]:
    if not values.shape[1]:  # a state without numbers
        return
    span = values.max(0).astype(np.float64) - values.min(0)
    constant = np.flatnonzero(span <= RELATIVE_RANGE_MIN * np.maximum(1.0, np.abs(values).max(0)))
    found = partial(Finding, kind="constant_dimensions", number=len(constant))
    if len(constant) == values.shape[1]:
        text, cure = (
            f"{name}: the {what} never moves in any dimension.",
            f"Is data.sources.{what} the right feature?",
        )
        yield found(severity="fault", sentence=text, cure=cure)
    elif len(constant):
        dimensions = ", ".join(map(str, constant.tolist()))
        yield found(severity="hint", sentence=f"{name}: dimension {dimensions} of the {what} never moves.")


def _clipped_actions(actions: Float32[np.ndarray, "n a"], name: str) -> Iterator[Finding]:
    """Share of actions exactly at the minimum or maximum; two-valued dimensions are meant to be."""
    shares = {
        number: float(np.mean((column == column.min()) | (column == column.max())))
        for number, column in enumerate(actions.T)
        if len(np.unique(column)) > 2
    }
    clipped = {number: share for number, share in shares.items() if share > CLIPPED_ACTIONS_MAX}
    if clipped:
        where = ", ".join(f"{100 * share:.0f} % in dimension {number}" for number, share in clipped.items())
        text = f"{name}: actions lie at their minimum or maximum in {where}: they are clipped."
        yield Finding(kind="clipped_actions", severity="hint", sentence=text, number=max(clipped.values()))


def _duplicates(data: DataBundle) -> Iterator[Finding]:
    """Episodes with the same states and actions: in training a hint, across the split a fault."""
    training, held_out = (
        [
            hashlib.sha256(
                store.states[e.start : e.end].tobytes() + store.actions[e.start : e.end].tobytes()
            ).digest()
            for store, part in zip((source.store for source in data.windows.sources), parts, strict=True)
            for e in part
        ]
        for parts in (data.training_episodes, data.validation_episodes)
    )
    twice = len(training) - len(set(training))
    if twice:
        text = f"{twice} training episodes are exact copies of others."
        yield Finding(kind="duplicates", severity="hint", sentence=text, number=twice)
    copies = sum(key in set(training) for key in held_out)
    if copies:
        text = (
            f"{copies} of {len(held_out)} held-out episodes are exact copies of training ones: the held-out "
            "error is too good."
        )
        cure = "Remove the copies from the data set."
        yield Finding(
            kind="duplicates_across_split", severity="fault", sentence=text, number=copies, cure=cure
        )


def _empty_pictures(source: Source) -> Iterator[Finding]:
    """Of `PICTURES` frames, evenly spread, in each view."""
    rows = evenly_spread(np.arange(len(source.frames)), PICTURES)
    for number, view in enumerate(source.store.spec.views):
        pictures = source.frames[rows, number].astype(np.float32)
        empty = float(np.mean(pictures.std((1, 2, 3)) < PICTURE_DEVIATION_MIN))
        frozen = float((pictures.max(0) - pictures.min(0)).max()) <= PICTURE_DEVIATION_MIN
        found = partial(Finding, kind="empty_pictures", number=empty)
        if 0 < empty <= EMPTY_FRAMES_MAX:
            text = f"is one colour in {100 * empty:.1f} % of the frames looked at"
            yield found(severity="hint", sentence=f"{source.store.name}: {view} {text}.")
        elif empty or frozen:
            text = "shows the same picture in every frame looked at: a frozen camera"
            if empty:
                text = f"is one colour in {100 * empty:.0f} % of the frames looked at: black, or covered"
            cure = "Leave the view out (data.sources.views)."
            yield found(severity="fault", sentence=f"{source.store.name}: {view} {text}.", cure=cure)
