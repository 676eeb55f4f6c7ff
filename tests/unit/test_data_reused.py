"""Memory of batches is used again once nobody holds it, and never before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutti.data.cache.frames import LEAST, Reused, gathered

SHAPE = (2, LEAST)
HOLDS = {
    "itself": lambda array: array,
    "a view of a view": lambda array: array[1][5:9].view(np.int8),
    "a tensor": torch.from_numpy,
    "a row of a tensor": lambda array: torch.from_numpy(array)[0, 3:4],
    "another type of a tensor": lambda array: torch.from_numpy(array).view(torch.int32),
    "an array of a tensor": lambda array: torch.from_numpy(array).numpy(),
}


@pytest.mark.parametrize("name", HOLDS)
def test_an_array_is_given_again_once_it_is_dropped_and_not_before(name: str) -> None:
    arrays = Reused()
    first = arrays.empty(SHAPE)
    place, held = first.ctypes.data, HOLDS[name](first)
    del first
    assert arrays.empty(SHAPE).ctypes.data != place
    del held
    assert arrays.empty(SHAPE).ctypes.data == place


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=30))
def test_no_two_arrays_that_live_overlap(steps: list[tuple[bool, int]]) -> None:
    arrays, alive = Reused(most=5 * LEAST), dict[int, torch.Tensor]()
    for number, (drop, size) in enumerate(steps):
        if drop and alive:
            del alive[next(iter(alive))]
        alive[number] = torch.from_numpy(arrays.empty((size * LEAST,)))
        alive[number][:] = number % 256
    assert all(bool((one == number % 256).all()) for number, one in alive.items())
    assert sum(one.size for one in arrays._kept) <= 5 * LEAST


def test_small_arrays_and_those_above_the_limit_are_not_kept() -> None:
    arrays = Reused(most=3 * LEAST)
    assert arrays.empty((LEAST - 1,)).size == LEAST - 1 and arrays.empty((4, LEAST)).shape == (4, LEAST)
    assert not arrays._kept


def test_batches_of_large_pictures_are_those_of_indexing_however_long_they_live() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 1, 3, 600, 600), np.uint8)
    rows = [np.array([5, 0]), np.array([2, 2, 1])]
    kept = [gathered(frames, rows) for _ in range(3)]
    for batch in kept:
        for found, wanted in zip(batch, rows, strict=True):
            np.testing.assert_array_equal(found, frames[wanted])
