"""The data themselves: dimensions that never move, clipped commands, copies, pictures that show nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tutti.data.bundle import DataBundle
from tutti.data.episodes import Episode
from tutti.data.windows import Source
from tutti.debug.remarks import Remark, note, problem
from tutti.evaluation.probes.baselines import LEAK, Leak, state_leak
from tutti.evaluation.probes.samples import Sample, held_out, spread, training

PICTURES = 256
EMPTY = 2.0
"""A picture whose grey levels deviate by less than this shows one colour: black, or a lens cap."""
STOPPED = 0.5
STILL = 1e-6


def check_recordings(data: DataBundle) -> list[Remark]:
    """Everything that needs no model."""
    remarks: list[Remark] = []
    for source in data.windows.sources:
        store, name = source.store, source.store.name
        remarks += _still("state", store.states, name)
        remarks += _still("action", store.actions, name)
        remarks += _stopped(store.actions, name)
        remarks += _pictures(source)
    return [*remarks, *_copies(data)]


def check_leak(data: DataBundle, most: int = 2000) -> tuple[Leak, list[Remark]]:
    """Whether the state gives the action away. Without held-out episodes, half the training ones stand in."""
    seen = training(data, 2 * most)
    if len(data.validation.all_windows):
        met = held_out(data, most)
    else:
        odd = seen.episode % 2 == 1
        seen, met = _part(seen, ~odd), _part(seen, odd)
    leak = state_leak(seen, met)
    if leak.leaks:
        later = "" if leak.next is None else f", the action after it with {leak.next:.3f}"
        text = (
            f"a linear map from the state gives the next action with R2 {leak.now:.4f}{later}: the state "
            "leaks the action. A policy need not look then, and fails on the robot, whose state holds no "
            "command to come. Choose another data.sources.state_key, or take the command out of the state."
        )
        return leak, [problem("leak", text)]
    if leak.now > LEAK:
        text = (
            f"a linear map from the state gives the next action with R2 {leak.now:.3f}, as with absolute "
            "positions; a policy that copies its state will look good offline. Believe rollouts."
        )
        return leak, [note("leak", text)]
    if leak.dimensions:
        listed = ", ".join(map(str, leak.dimensions))
        return leak, [note("leak", f"the state alone gives dimension {listed} of the action (R2 > {LEAK}).")]
    return leak, []


def _part(sample: Sample, chosen: np.ndarray) -> Sample:
    return spread(sample.index, sample.rows[chosen], len(sample))


def _still(what: str, values: Float32[np.ndarray, "n d"], name: str) -> list[Remark]:
    span = values.max(0).astype(np.float64) - values.min(0)
    dead = np.flatnonzero(span <= STILL * np.maximum(1.0, np.abs(values).max(0)))
    if len(dead) == values.shape[1]:
        return [problem("data", f"{name}: the {what} never moves in any dimension: is it the right key?")]
    if len(dead):
        listed = ", ".join(map(str, dead.tolist()))
        return [note("data", f"{name}: dimension {listed} of the {what} never moves.")]
    return []


def _stopped(actions: Float32[np.ndarray, "n a"], name: str) -> list[Remark]:
    """Share of commands exactly at the smallest or largest one; two-valued dimensions are meant to be."""
    found: list[str] = []
    for number, column in enumerate(actions.T):
        share = float(np.mean((column == column.min()) | (column == column.max())))
        if share > STOPPED and len(np.unique(column)) > 2:
            found.append(f"{100 * share:.0f} % in dimension {number}")
    if not found:
        return []
    text = f"{name}: actions lie at their smallest or largest value in {', '.join(found)}: they are clipped."
    return [note("data", text)]


def _copies(data: DataBundle) -> list[Remark]:
    """Episodes with the same states and actions: in training a note, across the split a problem."""
    seen: dict[str, int] = {}
    for source, episodes in zip(data.windows.sources, data.training_episodes, strict=True):
        for key in _keys(source, episodes):
            seen[key] = seen.get(key, 0) + 1
    remarks: list[Remark] = []
    twice = sum(count - 1 for count in seen.values())
    if twice:
        remarks.append(note("data", f"{twice} training episodes are exact copies of others."))
    held = [
        key
        for source, episodes in zip(data.windows.sources, data.validation_episodes, strict=True)
        for key in _keys(source, episodes)
    ]
    known = sum(key in seen for key in held)
    if known:
        text = (
            f"{known} of {len(held)} held-out episodes are exact copies of training ones: the held-out error "
            "is too good. Remove the copies from the data set."
        )
        remarks.append(problem("data", text))
    return remarks


def _keys(source: Source, episodes: Sequence[Episode]) -> list[str]:
    store = source.store
    return [
        hashlib.sha256(
            store.states[e.start : e.end].tobytes() + store.actions[e.start : e.end].tobytes()
        ).hexdigest()
        for e in episodes
    ]


def _pictures(source: Source) -> list[Remark]:
    """Of `PICTURES` frames, evenly spread, in each view."""
    frames, name = source.frames, source.store.name
    rows = np.linspace(0, len(frames) - 1, min(PICTURES, len(frames))).round().astype(np.int64)
    remarks: list[Remark] = []
    for number, view in enumerate(source.store.spec.views):
        pictures = frames[rows, number].astype(np.float32)
        empty = float(np.mean(pictures.std((1, 2, 3)) < EMPTY))
        if empty > 0.5:
            share = f"{100 * empty:.0f} % of the frames looked at"
            text = (
                f"{name}: {view} is one colour in {share}: black, or covered. Leave it out (sources.views)."
            )
            remarks.append(problem("data", text))
        elif empty > 0:
            text = f"{name}: {view} is one colour in {100 * empty:.1f} % of the frames looked at."
            remarks.append(note("data", text))
        elif float((pictures.max(0) - pictures.min(0)).max()) <= EMPTY:
            text = (
                f"{name}: {view} shows the same picture in every frame looked at: a frozen camera. Leave it "
                "out (data.sources.views)."
            )
            remarks.append(problem("data", text))
    return remarks
