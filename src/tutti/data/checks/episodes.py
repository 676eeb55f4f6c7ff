"""Checks of episodes and instructions: copies, spellings, what is held out, lengths against the horizon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Int64

from tutti.data.checks.recordings import Recorded, Recordings, say, some
from tutti.data.content import digest
from tutti.data.episodes import Episode, texts_of
from tutti.data.tokenize import normalized_text
from tutti.durations import every_pace, most_steps
from tutti.findings import MASKED_TARGETS_MAX, REACHED_OFFSET_MIN, Finding
from tutti.storage.reading import shown

SHOWN_TEXT = 60
Copy = tuple[Recorded, int, Recorded, int]
"""An episode of a source, and the one that it is a copy of."""


def spellings(data: Recordings) -> Iterator[Finding]:
    """Sentences that are written in several ways: Tutti reads them as one."""
    written: dict[str, tuple[Recorded, int]] = {}
    for source in data.sources:
        for episode in source.told:
            written.setdefault(episode.instruction, (source, episode.index))
    found: dict[str, dict[str, tuple[Recorded, int]]] = defaultdict(dict)
    for text, where in written.items():
        found[normalized_text(text)][text] = where
    several = [ways for ways in found.values() if len(ways) > 1]
    if several:
        ways = max(several, key=len)
        source, episode = [*ways.values()][1]
        yield say(
            "spellings",
            len(several),
            source=source.name,
            episode=episode,
            sentences="one sentence has" if len(several) == 1 else f"{len(several)} sentences have",
            ways=", ".join(some([shown(way, SHOWN_TEXT) for way in ways], 3)),
        )


def one_instruction(data: Recordings) -> Iterator[Finding]:
    """All training episodes have the same instruction or task, and a term would tell these apart."""
    told = [(one.store, {*one.training} & {*one.told}) for one in data.sources]
    texts = {normalized_text(episode.instruction) for _, episodes in told for episode in episodes}

    def idle_terms() -> list[str]:
        return [term for term, group_of in data.contrasting.items() if len(set(map(group_of, texts))) == 1]

    if idle_terms():  # rows may have other texts than their episode's first; to read them all takes longer
        texts = {text for store, episodes in told for text in texts_of(store, episodes)}
    if idle := idle_terms():
        cures = " and ".join(f"`objective.{term}` to null" for term in idle)
        what = "instruction" if len(texts) == 1 else f"task in {len(texts)} wordings"
        text = shown(min(texts), SHOWN_TEXT)
        yield say("nothing_to_contrast", 1, terms=" and ".join(idle), cures=cures, what=what, text=text)


def copies(data: Recordings) -> Iterator[Finding]:
    """The same data set twice, the same episode twice (states and actions), and copies across the split."""
    same = [
        (a, b)
        for a, b in combinations(range(len(data.sources)), 2)
        if data.sources[a].store is not data.sources[b].store
        and data.sources[a].store.fingerprint == data.sources[b].store.fingerprint
    ]
    for a, b in same:
        first, second = data.sources[a], data.sources[b]
        yield say("same_data_set", b, source=second.name, other=first.name, first=a, second=b)
    again = {b for _, b in same}  # said already
    parts = [source for number, source in enumerate(data.sources) if number not in again]
    twice, leaked, training = list[Copy](), list[Copy](), dict[int, tuple[Recorded, int]]()
    for side in ("training", "held_out"):
        first = training if side == "training" else {}
        for source in parts:
            for key, index in _keys(source, getattr(source, side)):
                known = first.setdefault(key, (source, index))
                if first is not training and key in training:
                    leaked.append((source, index, *training[key]))
                elif known != (source, index):
                    twice.append((source, index, *known))
    held_out = sum(len(source.held_out) for source in parts)
    for kind, found, total in (
        ("duplicates", twice, "episode" + "s" * (len(twice) > 1)),
        ("duplicates_across_split", leaked, f"of {held_out} held-out episodes"),
    ):
        if found:
            source, index, other, original = found[0]
            where = "" if other is source else f" of {other.name}"
            example = f"episode {index} is episode {original}{where}"
            count = f"{len(found)} {total} {'are' if len(found) > 1 else 'is'}"
            yield say(kind, len(found), source=source.name, episode=index, count=count, example=example)


def _keys(source: Recorded, episodes: Sequence[Episode]) -> Iterator[tuple[int, int]]:
    """What two episodes have in common if they are copies, their identity; and their numbers. A picture may
    have several texts: of pairs, these count too."""
    known = zip((episode.index for episode in source.store.episodes), source.store.identities, strict=True)
    identity, pairs = dict(known), source.store.is_pairs
    for episode in episodes:
        own = identity[episode.index]
        yield digest(own.to_bytes(8, "little"), episode.instruction.encode()) if pairs else own, episode.index


def lengths(data: Recordings) -> Iterator[Finding]:
    """Episodes that are short for the horizon, and offsets that few or none of them reach: in steps of the
    highest rate, of which a slower source has fewer."""
    future = max(data.needs.offsets, default=0)
    paces = every_pace([source.store.spec.fps for source in data.sources])
    each = [pair for pair in zip(data.sources, paces, strict=True) if not pair[0].store.is_pairs]
    for source, pace in each:
        longest = max((episode.length for episode in source.episodes), default=0)
        horizon = data.horizon if source.labels["actions"] else 0
        most = [most_steps(steps, pace) for steps in (longest, longest - 1)]
        if horizon > most[0] or future > most[1]:
            too_far = horizon <= most[0]
            key, value = ("The future offset", future) if too_far else ("data.horizon", horizon)
            words: dict[str, Any] = {"key": key, "longest": longest, "most": most[too_far]}
            yield say("too_long", value, source=source.name, **words)
    acting, long = (
        np.array(
            [
                most_steps(episode.length, pace)
                for source, pace in each
                if source.labels[label]
                for episode in source.training
            ],
            np.int64,
        )
        for label in ("actions", "state")
    )
    masked = _beyond(acting, data.horizon) / max(1, int(acting.sum()) * data.horizon)
    if masked > MASKED_TARGETS_MAX:
        said = {"share": f"{100 * masked:.0f} %", "median": int(np.median(acting))}
        yield say("horizon_masked", masked, horizon=data.horizon, **said)
    windows = int(long.sum())
    words = {"longest": int(long.max(initial=0)), "median": int(np.median(long)) if windows else 0}
    offsets = sorted(label for label in data.needs.states if isinstance(label, int)) if windows else []
    reached = {k: float(np.maximum(long - k, 0).sum() / max(1, windows)) for k in offsets}
    if never := [k for k in offsets if reached[k] == 0]:
        yield say("offset_never", never[0], offsets=", ".join(f"+{k}" for k in never), **words)
    if rarely := [k for k in offsets if 0 < reached[k] < REACHED_OFFSET_MIN]:
        said = ", ".join(f"+{k}: {100 * reached[k]:.1f} %" for k in rarely)
        yield say("offset_rarely", reached[rarely[-1]], offsets=said, **words)


def _beyond(long: Int64[np.ndarray, " e"], horizon: int) -> int:
    """Action targets past the end, over all windows of episodes of these lengths: window t of an episode of
    length L lacks max(0, t + horizon - L)."""
    short = np.minimum(long, horizon)
    # The last `short` windows lack horizon - 1, horizon - 2, ..., horizon - short.
    return int((short * horizon - short * (short + 1) // 2).sum())
