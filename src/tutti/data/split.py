"""Splits episodes into training and held-out ones, stratified by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from tutti.data.content import digest
from tutti.data.episodes import Episode, Episodes
from tutti.data.tokenize import normalized_text
from tutti.errors import UserError, near_miss

GroupOf = Callable[[str], str]
"""The group (a task) that a normalised instruction belongs to."""


def check_tasks(given: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Raises: ValueError if two tasks name one instruction."""
    owner: dict[str, str] = {}
    for task, text in ((task, text) for task, texts in given.items() for text in texts):
        if (other := owner.setdefault(normalized_text(text), task)) != task:
            raise ValueError(
                f"expected each instruction in one task, found {text!r:.60} in {other!r:.60} and {task!r:.60}"
            )
    return given


Tasks = Annotated[dict[str, tuple[str, ...]], AfterValidator(check_tasks)]
"""Tasks and the instructions that are wordings of them."""


def grouped(tasks: Mapping[str, Sequence[str]], known: GroupOf | None) -> GroupOf | None:
    """The task of a normalised instruction by `tasks`; of one that they do not name, by `known`."""
    named = {normalized_text(text): task for task, texts in tasks.items() for text in texts}
    if not named:
        return known
    return lambda text: named[text] if text in named else (known(text) if known else text)


def check_wordings(tasks: Mapping[str, Sequence[str]], instructions: Sequence[str]) -> None:
    """Raises: UserError if `tasks` names what is none of the (normalised) instructions."""
    for task, texts in tasks.items():
        if missing := [text for text in texts if normalized_text(text) not in instructions]:
            raise UserError(
                f"data.tasks.{task} names {missing[0]!r}, which is no instruction of the data."
                f"{near_miss(normalized_text(missing[0]), instructions)}\n"
                "  cure: write it as the data set does, or take it out."
            )


def split_episodes(
    episodes: Sequence[Episode],
    fraction: float,
    seed: int,
    group_of: GroupOf | None = None,
    identities: Sequence[int] | None = None,
) -> tuple[tuple[Episode, ...], tuple[Episode, ...]]:
    """(training, validation) episodes, each in their first order; `are_held_out` says which.

    `identities` are numbers that tell the episodes apart, such as digests; left out: their indices.
    """
    numbers = [episode.index for episode in episodes] if identities is None else identities
    held = are_held_out(episodes, numbers, fraction, seed, group_of)
    training, validation = (
        tuple(one for one, flag in zip(episodes, held, strict=True) if flag == side) for side in (False, True)
    )
    return training, validation


def are_held_out(
    episodes: Sequence[Episode],
    identities: Sequence[int],
    fraction: float,
    seed: int,
    group_of: GroupOf | None = None,
) -> list[bool]:
    """Which of n episodes are held out: round(fraction n) of them, at least one of two or more.

    Stratified by `group_of(instruction)`, the normalised instruction itself where it is None: of a group of m
    as many as fraction m says, rounded up or down, and never the last of several. So where there are more
    groups than episodes to hold out, some groups, chosen at random, give one.

    An episode's place in its group is a hash of its identity and `seed`, so neither order nor numbering
    counts, and one episode more or less changes the side of at most two others. Systematic sampling: the
    r-th of a group of m has the place (r + u) / m, u a hash of the group's name, and the lowest are held out.
    """
    ranked: list[tuple[float, int]] = []
    for name, members in _grouped(episodes, group_of).items():
        order = sorted(members, key=lambda place: _hash(seed, str(identities[place])))
        offset = _hash(seed, name)
        eligible = order[: max(1, len(order) - 1)]
        ranked += [((rank + offset) / len(order), place) for rank, place in enumerate(eligible)]
    total = len(episodes)
    wanted = min(max(1, math.floor(fraction * total + 0.5)), total - 1) if fraction > 0 else 0
    chosen = {place for _, place in sorted(ranked)[:wanted]}
    return [place in chosen for place in range(total)]


def pair_is_held_out(identity: int, fraction: float, seed: int) -> bool:
    """Whether a picture with this identity is held out, with all its texts; of many about a `fraction` is.
    A hash of the two numbers alone: no other pair counts."""
    return _hash(seed, str(identity)) < fraction


def episodes_at(
    training: Sequence[Episode], places: slice, seed: int, group_of: GroupOf | None = None, said: str = ""
) -> Episodes:
    """Those of the training episodes of each group at `places`, such as the first ten, in their first order.

    The places are those in a random order of the group's episodes that depends on `seed` and the group's name
    alone, so a smaller count is a part of a larger one, and held-out episodes stay what they are. Groups are
    those of `are_held_out`.

    Raises: UserError naming a group that has fewer, and what the config has `said`.
    """
    needed = places.start + 1 if places.stop is None else places.stop
    chosen: set[int] = set()
    for name, members in _grouped(training, group_of).items():
        if len(members) < needed:
            raise UserError(
                f"{said}, but of '{name}' only {len(members)} episodes can be "
                "trained on (those held out for validation do not count). Lower it, or record more."
            )
        random = np.random.default_rng([seed, 5, *name.encode()])
        chosen |= {members[place] for place in random.permutation(len(members))[places].tolist()}
    return Episodes.of(training).where(np.array(sorted(chosen), np.int64))


def _grouped(episodes: Sequence[Episode], group_of: GroupOf | None) -> dict[str, list[int]]:
    """The places of the episodes of each group."""
    many = Episodes.of(episodes)
    used: list[int] = np.unique(many.texts).tolist()
    spoken = {number: normalized_text(many.instructions[number]) for number in used}
    named = {number: group_of(own) if group_of else own for number, own in spoken.items()}
    groups: dict[str, list[int]] = {}
    for place, number in enumerate(many.texts.tolist()):
        groups.setdefault(named[number], []).append(place)
    return groups


def _hash(seed: int, text: str) -> float:
    """A number in [0, 1) that looks random."""
    return digest(str(seed).encode(), text.encode()) / 2**64
