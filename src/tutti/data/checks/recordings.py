"""Checks of recorded data: constant dimensions, clipped actions, duplicates, empty pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tutti.data.bundle import DataBundle, evenly_spread
from tutti.data.episodes import Episode
from tutti.data.windows import Source
from tutti.findings import (
    CLIPPED_ACTIONS_MAX,
    EMPTY_FRAMES_MAX,
    PICTURE_DEVIATION_MIN,
    Finding,
)

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


def _constant_dimensions(what: str, values: Float32[np.ndarray, "n d"], name: str) -> list[Finding]:
    span = values.max(0).astype(np.float64) - values.min(0)
    constant = np.flatnonzero(span <= RELATIVE_RANGE_MIN * np.maximum(1.0, np.abs(values).max(0)))
    if not len(constant):
        return []
    everything = len(constant) == values.shape[1]
    dimensions = ", ".join(map(str, constant.tolist()))
    return [
        Finding(
            kind="constant_dimensions",
            severity="fault" if everything else "hint",
            sentence=f"{name}: the {what} never moves in any dimension."
            if everything
            else f"{name}: dimension {dimensions} of the {what} never moves.",
            number=len(constant),
            cure=f"Is data.sources.{what}_key the right key?" if everything else "",
        )
    ]


def _clipped_actions(actions: Float32[np.ndarray, "n a"], name: str) -> list[Finding]:
    """Share of actions exactly at the minimum or maximum; two-valued dimensions are meant to be."""
    shares = {
        number: float(np.mean((column == column.min()) | (column == column.max())))
        for number, column in enumerate(actions.T)
        if len(np.unique(column)) > 2
    }
    clipped = {number: share for number, share in shares.items() if share > CLIPPED_ACTIONS_MAX}
    if not clipped:
        return []
    where = ", ".join(f"{100 * share:.0f} % in dimension {number}" for number, share in clipped.items())
    return [
        Finding(
            kind="clipped_actions",
            severity="hint",
            sentence=f"{name}: actions lie at their minimum or maximum in {where}: they are clipped.",
            number=max(clipped.values()),
        )
    ]


def _duplicates(data: DataBundle) -> list[Finding]:
    """Episodes with the same states and actions: in training a hint, across the split a fault."""
    counts: dict[str, int] = {}
    for source, episodes in zip(data.windows.sources, data.training_episodes, strict=True):
        for key in _hashes(source, episodes):
            counts[key] = counts.get(key, 0) + 1
    findings: list[Finding] = []
    twice = sum(count - 1 for count in counts.values())
    if twice:
        text = f"{twice} training episodes are exact copies of others."
        findings.append(Finding(kind="duplicates", severity="hint", sentence=text, number=twice))
    held_out = [
        key
        for source, episodes in zip(data.windows.sources, data.validation_episodes, strict=True)
        for key in _hashes(source, episodes)
    ]
    copies = sum(key in counts for key in held_out)
    if copies:
        findings.append(
            Finding(
                kind="duplicates_across_split",
                severity="fault",
                sentence=f"{copies} of {len(held_out)} held-out episodes are exact copies of training ones: "
                "the held-out error is too good.",
                number=copies,
                cure="Remove the copies from the data set.",
            )
        )
    return findings


def _hashes(source: Source, episodes: Sequence[Episode]) -> list[str]:
    store = source.store
    return [
        hashlib.sha256(
            store.states[e.start : e.end].tobytes() + store.actions[e.start : e.end].tobytes()
        ).hexdigest()
        for e in episodes
    ]


def _empty_pictures(source: Source) -> list[Finding]:
    """Of `PICTURES` frames, evenly spread, in each view."""
    frames, name = source.frames, source.store.name
    rows = evenly_spread(np.arange(len(frames)), PICTURES)
    findings: list[Finding] = []
    for number, view in enumerate(source.store.spec.views):
        pictures = frames[rows, number].astype(np.float32)
        empty = float(np.mean(pictures.std((1, 2, 3)) < PICTURE_DEVIATION_MIN))
        if empty > EMPTY_FRAMES_MAX:
            text = f"{view} is one colour in {100 * empty:.0f} % of the frames looked at: black, or covered."
        elif empty > 0:
            text = f"{view} is one colour in {100 * empty:.1f} % of the frames looked at."
        elif float((pictures.max(0) - pictures.min(0)).max()) <= PICTURE_DEVIATION_MIN:
            text = f"{view} shows the same picture in every frame looked at: a frozen camera."
        else:
            continue
        useless = not 0 < empty <= EMPTY_FRAMES_MAX
        findings.append(
            Finding(
                kind="empty_pictures",
                severity="fault" if useless else "hint",
                sentence=f"{name}: {text}",
                number=empty,
                cure="Leave the view out (data.sources.views)." if useless else "",
            )
        )
    return findings
