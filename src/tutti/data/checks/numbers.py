"""Checks of states and actions: dimensions that never move, heavy tails, clipped actions, other units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from tutti.data.checks.recordings import Recorded, Recordings, say, some
from tutti.data.episodes import Vector
from tutti.data.normalize import NormalizationKind
from tutti.findings import (
    CLIPPED_ACTIONS_MAX,
    DISCRETE_VALUES_MAX,
    LINK_MIN,
    NORMALIZED_MAX,
    SOURCE_DIMENSIONS_MIN,
    SOURCE_RATIO_MAX,
    TWO_VALUES_APART,
    Finding,
)


def constant_dimensions(data: Recordings) -> Iterator[Finding]:
    """Dimensions that never move; all of them are a fault."""
    for source in data.sources:
        for vector in source.vectors:
            dim = source.values(vector).shape[1]
            still = np.setdiff1d(np.arange(dim), source.moving(vector)).tolist()
            about: dict[str, Any] = {"source": source.name, "vector": vector}
            if len(still) == dim > 0:
                yield say("constant_vector", dim, **about)
            elif still:
                names = [source.dimension(vector, number) for number in still]
                listed = ", ".join(some(names))
                yield say("constant_dimensions", len(still), dimension=listed, **about)


def heavy_tails(data: Recordings) -> Iterator[Finding]:
    """Dimensions whose largest value lies far outside after normalization; not of those that are learned from
    the state at the start of their chunk, which a row alone does not tell."""
    for source in (source for source in data.sources if source.vectors):
        stats = data.normalizer.stats[source.store.spec.embodiment]
        for vector in source.vectors:
            of_vector = getattr(stats, vector)
            center, scale = of_vector.center_and_scale(data.normalizer.kind)
            largest = _largest(source, vector, center, scale)
            told = source.store.converted.conversion.relative if source.store.converted else None
            of_chunks = told.moved if told and vector == "action" else set[int]()
            for number in set(np.flatnonzero(largest > NORMALIZED_MAX).tolist()) - of_chunks:
                values = source.values(vector)[:, number]
                tops = [_furthest(values[span], center[number]) + span.start for span in source.spans]
                row = max(tops, key=lambda row, at=number, of=values: abs(of[row] - center[at]))
                beyond = sum(
                    int(np.sum(np.abs(values[span] - center[number]) > NORMALIZED_MAX * scale[number]))
                    for span in source.spans
                )
                other: NormalizationKind = "standard" if data.normalizer.kind == "quantile" else "quantile"
                there = float(_largest(source, vector, *of_vector.center_and_scale(other))[number])
                helps = f"data.normalization={other} (there it is {there:.3g}), or " * (
                    there < NORMALIZED_MAX
                )
                episode, frame = source.place(row)
                yield say(
                    "heavy_tails",
                    float(largest[number]),
                    source=source.name,
                    episode=episode.index,
                    frame=frame,
                    dimension=source.dimension(vector, number),
                    vector=vector,
                    value=f"{values[row]:.4g}",
                    low=f"{center[number] - scale[number]:.4g}",
                    high=f"{center[number] + scale[number]:.4g}",
                    beyond=f"{beyond} frame{'s lie' if beyond > 1 else ' lies'}",
                    limit=f"{NORMALIZED_MAX:g}",
                    helps=helps,
                )


def _largest(
    source: Recorded, vector: Vector, center: np.ndarray, scale: np.ndarray
) -> Float64[np.ndarray, " d"]:
    low, high = source.extremes[vector]
    return np.maximum(np.abs(low - center), np.abs(high - center)) / scale


def _furthest(values: np.ndarray, center: float) -> int:
    return int(np.argmax(np.abs(values - center)))


def clipped_actions(data: Recordings) -> Iterator[Finding]:
    """Share of actions exactly at the minimum or maximum; dimensions with few values are meant to be."""
    for source in data.sources:
        actions, clipped = source.store.actions[source.sample.rows], dict[str, float]()
        for number in source.moving("action").tolist() if len(actions) else ():
            column = actions[:, number]
            inside = column[(column > column.min()) & (column < column.max())]
            values, share = len(np.unique(inside)), 1 - len(inside) / len(column)
            continuous = values > min(DISCRETE_VALUES_MAX, len(inside) / 2)
            if share > CLIPPED_ACTIONS_MAX and continuous:
                clipped[source.dimension("action", number)] = share
        if clipped:
            where = some([f"{100 * share:.0f} % in dimension {name}" for name, share in clipped.items()])
            names = ", ".join(some([*clipped]))
            said: dict[str, Any] = {"dimension": names, "where": ", ".join(where)}
            yield say("clipped_actions", max(clipped.values()), source=source.name, **said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A dimension of a source over the sampled rows. `steps` are its two values, None where it has more."""

    low: float
    middle: float
    high: float
    steps: tuple[float, float] | None

    @property
    def spread(self) -> float:
        """From 1 % to 99 %; of a two-valued one, from value to value."""
        return self.steps[1] - self.steps[0] if self.steps else self.high - self.low


def gripper_dimensions_fit(data: Recordings) -> Iterator[Finding]:
    """Whether the dimensions that the config calls a gripper open and close."""
    for source in (source for source in data.sources if "action" in source.vectors):
        guess = source.two_valued
        dim = source.store.spec.action_dim
        for key, named in data.grippers:
            number = named % dim if -dim <= named < dim else named
            if number not in guess:
                others = [source.dimension("action", other) for other in guess]
                yield say(
                    "no_gripper",
                    number,
                    source=source.name,
                    dimension=source.dimension("action", number),
                    key=key,
                    others=", ".join(some(others)) or "no dimension",
                )


def sources_differ(data: Recordings) -> Iterator[Finding]:
    """Sources of one robot, whose statistics are pooled, against the first of them that has the same labels:
    units and signs."""
    first: dict[tuple[str, Vector], Recorded] = {}
    for source in (source for source in data.sources if len(source.sample.rows)):
        for vector in source.vectors:
            other = first.setdefault((source.store.spec.embodiment, vector), source)
            if other is not source:
                yield from _other_units(other, source, vector)
                if vector == "action" and other.vectors == source.vectors:
                    yield from _other_signs(other, source)


def _columns(source: Recorded, vector: Vector) -> dict[int, Column]:
    """The moving dimensions."""
    chosen, steps = source.moving(vector), source.two_valued if vector == "action" else {}
    exact = source.values(vector)[source.sample.rows][:, chosen].astype(np.float64)
    rows = np.quantile(exact, [0.01, 0.5, 0.99], axis=0).T.tolist()
    return {
        number: Column(low=low, middle=middle, high=high, steps=steps.get(number))
        for number, (low, middle, high) in zip(chosen.tolist(), rows, strict=True)
    }


def _other_units(a: Recorded, b: Recorded, vector: Vector) -> Iterator[Finding]:
    ours, theirs = _columns(a, vector), _columns(b, vector)
    said: list[tuple[int, float, str, bool]] = []
    for number in sorted(ours.keys() & theirs.keys()):
        x, y = ours[number], theirs[number]
        small, large = sorted((x.spread, y.spread))
        ratio, apart = large / small if small > 0 else 1.0, abs(x.middle - y.middle) / max(large, 1e-12)
        name = a.dimension(vector, number)
        if x.steps and y.steps:
            apart = max(abs(p - q) for p, q in zip(x.steps, y.steps, strict=True)) / max(large, 1e-12)
            if apart > TWO_VALUES_APART:
                pairs = [f"{one.steps[0]:.3g} and {one.steps[1]:.3g}" for one in (x, y) if one.steps]
                said.append((number, ratio, f"{name} is {pairs[0]} there and {pairs[1]} here", True))
        elif apart > SOURCE_RATIO_MAX:
            words = f"{name} lies about {x.middle:.3g} there and about {y.middle:.3g} here"
            said.append((number, apart, words, True))
        elif ratio > SOURCE_RATIO_MAX:
            words = f"{name} spreads over {x.spread:.3g} there and {y.spread:.3g} here"
            said.append((number, ratio, words, False))
    if said:
        certain = any(one[3] for one in said) or len(said) >= SOURCE_DIMENSIONS_MIN
        yield say(
            "other_units",
            max(one[1] for one in said),
            "warning" if certain else "hint",
            source=b.name,
            dimension=", ".join(some([a.dimension(vector, one[0]) for one in said])),
            other=a.name,
            vector=vector,
            robot=a.store.spec.embodiment,
            differences="; ".join(some([one[2] for one in said], 4)),
        )


def _other_signs(a: Recorded, b: Recorded) -> Iterator[Finding]:
    """Two-valued dimensions whose links with the state, or else with the time, are all of the other sign."""
    both = sorted(a.two_valued.keys() & b.two_valued.keys())
    if not both:
        return
    ours, theirs = _links(a, both), _links(b, both)
    state_dim = a.store.spec.state_dim
    for place, number in enumerate(both):
        x, y = ours[place], theirs[place]
        strong = (np.abs(x) >= LINK_MIN) & (np.abs(y) >= LINK_MIN)
        of_state = np.flatnonzero(strong[:state_dim])
        linked: Sequence[int] = of_state.tolist() or np.flatnonzero(strong).tolist()
        if linked and all(x[link] * y[link] < 0 for link in linked):
            link = max(linked, key=lambda link, x=x, y=y: min(abs(x[link]), abs(y[link])))
            yield say(
                "other_sign",
                float(y[link]),
                "warning" if link < state_dim else "hint",
                source=b.name,
                dimension=a.dimension("action", number),
                other=a.name,
                robot=a.store.spec.embodiment,
                link=f"state {a.dimension('state', link)}" if link < state_dim else "the time in the episode",
                there=f"{x[link]:+.2f}",
                here=f"{y[link]:+.2f}",
            )


def _links(source: Recorded, numbers: Sequence[int]) -> Float64[np.ndarray, "k l"]:
    """Correlations of these dimensions of the action with each of the state, and last with the time."""
    sample = source.sample
    starts = np.repeat(np.cumsum(sample.lengths) - sample.lengths, sample.lengths)
    time = (np.arange(len(starts)) - starts) / np.maximum(1, sample.ends - starts - 1)
    others = np.column_stack([source.store.states[sample.rows].astype(np.float64), time])
    commands = source.store.actions[sample.rows][:, list(numbers)].astype(np.float64)
    commands, others = commands - commands.mean(0), others - others.mean(0)
    sizes = np.linalg.norm(commands, axis=0)[:, None] * np.linalg.norm(others, axis=0)
    return commands.T @ others / np.where(sizes > 0, sizes, np.inf)
