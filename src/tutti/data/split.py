"""Splits episodes into training and held-out ones, stratified by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tutti.data.episodes import Episode
from tutti.data.tokenize import normalized_text
from tutti.errors import UserError

GroupOf = Callable[[str], str]
"""The group (a task) that an instruction belongs to."""


def split_episodes(
    episodes: Sequence[Episode],
    fraction: int | float,
    seed: int,
    group_of: GroupOf | None = None,
) -> tuple[tuple[Episode, ...], tuple[Episode, ...]]:
    """(training, validation) episodes, each in their first order; the same arguments give the same split.

    Episodes are grouped by `group_of(instruction)`, by the instruction itself where it is None. Each group
    gives round(fraction * size) of its episodes, drawn at random, but at least one and never its last.
    Groups of one episode cannot be on both sides: together they form one group. A fraction of 0 holds out
    nothing. With several wordings a task, pass `group_of` to name the task: else each wording gives one.
    """
    if fraction == 0:
        return tuple(episodes), ()
    groups = _grouped(episodes, group_of)
    single = [members[0] for members in groups.values() if len(members) == 1]
    strata = [groups[name] for name in sorted(groups) if len(groups[name]) > 1]
    strata += [sorted(single, key=lambda episode: episode.index)] if single else []
    random = np.random.default_rng([seed, 2])
    held: set[int] = set()
    for members in strata:
        order = random.permutation(len(members))
        wanted = math.floor(fraction * len(members) + 0.5)
        for place in order[: min(max(1, wanted), len(members) - 1)].tolist():
            held.add(members[place].index)
    training = tuple(episode for episode in episodes if episode.index not in held)
    validation = tuple(episode for episode in episodes if episode.index in held)
    return training, validation


def first_episodes(
    training: Sequence[Episode], count: int, seed: int, group_of: GroupOf | None = None
) -> tuple[Episode, ...]:
    """`count` of the training episodes of each group, in their first order.

    They are the first in a random order of the group's episodes that depends on `seed` and the group's name
    alone, so a smaller count is a part of a larger one, and held-out episodes stay what they are. Groups are
    those of `split_episodes`.

    Raises: UserError naming a group that has fewer.
    """
    chosen: set[int] = set()
    for name, members in _grouped(training, group_of).items():
        if len(members) < count:
            raise UserError(
                f"data.episodes_per_task is {count}, but of '{name}' only {len(members)} episodes can be "
                "trained on (those held out for validation do not count). Lower it, or record more."
            )
        random = np.random.default_rng([seed, 5, *name.encode()])
        chosen |= {members[place].index for place in random.permutation(len(members))[:count].tolist()}
    return tuple(episode for episode in training if episode.index in chosen)


def _grouped(episodes: Sequence[Episode], group_of: GroupOf | None) -> dict[str, list[Episode]]:
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        text = normalized_text(episode.instruction)
        groups.setdefault(group_of(text) if group_of else text, []).append(episode)
    return groups
