"""The split: exact in number, stratified by task, and little moved by an episode more or less."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_order import Store

from tutti.data.config import DataConfig
from tutti.data.episodes import Episode
from tutti.data.sources import Part
from tutti.data.split import are_held_out, split_episodes

Items = list[tuple[int, int]]
"""The task and the identity of each episode."""
items = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 2**64 - 1)),
    min_size=1,
    max_size=40,
    unique_by=lambda one: one[1],
)
fractions = st.floats(0, 0.99)


def held(given_items: Items, fraction: float, seed: int = 0) -> set[int]:
    episodes = [Episode(i, 10 * i, 10, f"task {task}") for i, (task, _) in enumerate(given_items)]
    identities = [identity for _, identity in given_items]
    training, validation = split_episodes(episodes, fraction, seed, identities=identities)
    assert sorted(e.index for e in training + validation) == list(range(len(episodes)))
    assert [list(part) for part in (training, validation)] == [
        sorted(part, key=lambda e: e.index) for part in (training, validation)
    ]
    return {identities[e.index] for e in validation}


def rounded(fraction: float, count: int) -> int:
    return math.floor(fraction * count + 0.5)


@given(items, fractions, st.integers(0, 3))
def test_at_most_the_fraction_is_held_out_and_of_each_task_its_share(
    some: Items, fraction: float, seed: int
) -> None:
    chosen = held(some, fraction, seed)
    if fraction == 0 or len(some) == 1:
        assert not chosen
    else:
        assert 1 <= len(chosen) <= max(1, rounded(fraction, len(some))) and len(chosen) < len(some)
    sizes = Counter(task for task, _ in some)
    taken = Counter(task for task, identity in some if identity in chosen)
    for task, size in sizes.items():
        assert size == 1 or taken[task] < size
    if fraction <= 0.5:
        assert len(chosen) == min(len(some) - 1, max(1, rounded(fraction, len(some)))) or fraction == 0
        for task, size in sizes.items():  # the threshold is 1/n away from the fraction at most, or 1/2n
            assert abs(taken[task] - fraction * size) < 1 + size / len(some) + 1e-9


@given(items, fractions, st.randoms(use_true_random=False))
def test_neither_order_nor_numbers_of_the_episodes_count(
    some: Items, fraction: float, shuffle: random.Random
) -> None:
    other = list(some)
    shuffle.shuffle(other)
    assert held(other, fraction) == held(some, fraction)


@given(items.filter(lambda some: len(some) > 2), fractions)
def test_one_episode_more_or_less_moves_at_most_two_others(some: Items, fraction: float) -> None:
    more, less = held(some, fraction), held(some[:-1], fraction)
    assert len((more - {some[-1][1]}) ^ less) <= 2


def test_most_of_what_is_held_out_stays_so_when_the_data_grow() -> None:
    draw = random.Random(0)
    some = [(draw.randrange(10), draw.getrandbits(64)) for _ in range(2000)]
    before, after = held(some[:1000], 0.05), held(some, 0.05)
    assert (len(before), len(after)) == (50, 100)
    assert len(before & after) > 40  # of 1,000 episodes more, none says anything about the first


@pytest.mark.parametrize(
    ("fraction", "sizes", "expected"),
    [
        (0.25, (12, 8, 4), [3, 2, 1]),
        (0.1, (10, 10, 10, 10), [1, 1, 1, 1]),
        (0.9, (10, 2), [9, 1]),  # never the last one
    ],
)
def test_each_task_gives_its_share(fraction: float, sizes: tuple[int, ...], expected: list[int]) -> None:
    some = [(task, 100 * task + number) for task, size in enumerate(sizes) for number in range(size)]
    taken = Counter(identity // 100 for identity in held(some, fraction))
    assert [taken[task] for task in range(len(sizes))] == expected


def test_with_more_texts_than_episodes_to_hold_out_some_texts_give_one() -> None:
    episodes = [Episode(i, 10 * i, 10, f"task {i // 2}") for i in range(1000)]
    chosen = []
    for seed in (0, 1):
        training, validation = split_episodes(episodes, 0.05, seed)
        assert (len(training), len(validation)) == (950, 50)
        texts = {episode.instruction for episode in validation}
        assert len(texts) == 50 and texts <= {episode.instruction for episode in training}
        chosen.append(texts)
    assert len(chosen[0] & chosen[1]) < 15  # 2.5 by chance


def test_spellings_and_wordings_of_a_task_are_one_group() -> None:
    wordings = [f"{('open', 'Shut ')[i % 2]} wording {i // 2}" for i in range(40)]
    episodes = [Episode(i, 10 * i, 10, text) for i, text in enumerate(wordings)]
    identities = list(range(40))
    by_task = are_held_out(episodes, identities, 0.1, 0, lambda text: text.split()[0])
    assert sorted(text[:4] for text, flag in zip(wordings, by_task, strict=True) if flag) == [
        *("Shut", "Shut"),
        *("open", "open"),
    ]
    spelled = [Episode(i, 10 * i, 10, ("Open it", " open  it")[i % 2]) for i in range(40)]
    plain = [Episode(i, 10 * i, 10, "open it") for i in range(40)]
    assert are_held_out(spelled, identities, 0.1, 0) == are_held_out(plain, identities, 0.1, 0)


def test_sources_are_split_as_one_by_what_the_episodes_hold() -> None:
    def sides(stores: list[Store], seed: int = 0) -> dict[float, bool]:
        config = DataConfig(validation_fraction=0.3, seed=seed)
        found = {}
        for part in config.split([Part(store=store) for store in stores]):
            for flag, episodes in enumerate((part.training, part.held_out)):
                found |= {float(part.store.actions[one.start, 0]): bool(flag) for one in episodes}
        return found

    stores = [Store("arm", (5, 1, 4), 0), Store("hand", (2, 6), 1000)]
    both = sides(stores)
    assert sum(both.values()) == 2 == rounded(0.3, 5) and sides(stores[::-1]) == both
    assert len({tuple(sides(stores, seed).values()) for seed in range(5)}) > 1


def test_demonstrations_of_every_source_are_drawn_by_a_seed_of_its_own() -> None:
    stores = [Store("arm", (3,) * 3, 0) for _ in range(2)]
    for store in stores:
        store.episodes = tuple(Episode(i, i % 9, 1, f"task {i % 2}") for i in range(40))

    def drawn(seed: int, stores: list[Store]) -> list[tuple[Episode, ...]]:
        config = DataConfig(validation_fraction=0, episodes_per_task=5, seed=seed)
        return [part.training for part in config.split([Part(store=store) for store in stores])]

    (first, second), (alone,) = drawn(7, stores), drawn(8, stores[:1])
    assert len(first) == len(second) == 10 and first != second == alone


def test_an_episode_is_known_by_its_states_and_actions_alone() -> None:
    one, other = Store("arm", (5, 1, 4), 0), Store("other", (5, 1, 4), 0)
    other.instructions = ("x", "y", "z")
    assert one.identities == other.identities and len(set(one.identities)) == 3
    for changed in (other.states, other.actions):
        before = Store("arm", (5, 1, 4), 0).identities
        changed[5] += 1
        del other.__dict__["number_digests"]
        assert [a == b for a, b in zip(before, other.identities, strict=True)] == [True, False, True]
