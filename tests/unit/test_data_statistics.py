"""Statistics of all rows in one pass: as NumPy gives them, from parts, without a copy of the numbers."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from fixtures import squares_data
from tutti.data import DataConfig, normalize
from tutti.data.cache import shared
from tutti.data.normalize import ActionStats
from tutti.data.sources import statistics
from tutti.types import DataNeeds


def plain(values: np.ndarray) -> dict[str, list[float]]:
    """The same by NumPy alone, with a copy in float64; sums by blocks, of which few are as good as one."""
    wide = values.astype(np.float64)
    low, high = np.array([np.quantile(column, [0.01, 0.99]) for column in wide.T]).reshape(-1, 2).T
    zero = np.zeros((1, wide.shape[1]))
    mean = np.concatenate([zero, wide]).sum(axis=0) / len(wide)
    std = np.sqrt(np.concatenate([zero, np.square(wide - mean)]).sum(axis=0) / len(wide))
    stats = {"q01": low, "q99": high, "mean": mean, "std": std}
    stats |= {"min": wide.min(axis=0), "max": wide.max(axis=0)}
    return {name: one.tolist() for name, one in stats.items()}


@given(
    seed=some.integers(0, 2**32),
    sizes=some.lists(some.integers(0, 60), min_size=1, max_size=5),
    dim=some.integers(1, 4),
    levels=some.sampled_from([2, 9, 10**6]),
)
def test_parts_give_the_bits_of_all_rows_at_once(seed: int, sizes: list[int], dim: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    sizes[0] += 1
    parts = [(random.integers(0, levels, (n, dim)) / 7).astype(np.float32) for n in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalize, "_ROWS", 16)
        found = ActionStats.fit(*parts)
    whole = np.concatenate(parts)
    expected, values = plain(whole), found.to_dict()
    np.testing.assert_allclose(values.pop("std"), expected["std"], rtol=1e-12, atol=1e-13)
    assert values == {name: one for name, one in expected.items() if name != "std"}
    # Those of one block are the same in all.
    assert ActionStats.fit(whole).to_dict() == expected


def test_parts_are_looked_at_once_and_far_from_0_a_spread_is_not_lost() -> None:
    random = np.random.default_rng(0)
    parts = [(1e6 + random.standard_normal((n, 3))).astype(np.float32) for n in (40_000, 0, 30_000, 1)]
    found = ActionStats.of(iter(parts), 10**6)  # of whatever more there might have been
    expected = plain(np.concatenate(parts))
    np.testing.assert_allclose(found.std, expected["std"], rtol=1e-12)
    assert [found.q01.tolist(), found.q99.tolist()] == [expected["q01"], expected["q99"]]


def test_a_fit_takes_far_less_than_the_numbers() -> None:
    values = np.random.default_rng(0).standard_normal((400_000, 8), dtype=np.float32)
    tracemalloc.start()
    ActionStats.fit(values[:100_000], values[150_000:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * values.nbytes  # 2.4 times as much with copies


def test_statistics_of_many_rows_are_kept_beside_the_frames_and_a_damaged_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(statistics, "KEPT_FROM", 1)
    squares_data.write(tmp_path / "data", squares_data.episodes(4))
    source = {"path": tmp_path / "data"}
    cache = {"folder": tmp_path / "cache"}
    config = DataConfig.model_validate({"sources": [source], "cache": cache, "image_size": 8, "horizon": 2})
    calls: list[int] = []
    of = ActionStats.of
    monkeypatch.setattr(ActionStats, "of", lambda parts, most: calls.append(most) or of(parts, most))

    def fitted(given: DataConfig = config) -> dict[str, Any]:
        return given.build(DataNeeds()).normalizer.to_dict()

    def warned() -> list[str]:
        """Where other tests have asked for them, what is only told is recorded too."""
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    first = fitted()
    files = sorted((tmp_path / "cache" / "statistics").iterdir())
    assert len(files) == len(calls) == 2  # of states and of actions
    assert fitted() == first and len(calls) == 2
    fewer = config.model_copy(update={"validation_fraction": 0.5})  # other rows to train on
    assert fitted(fewer) != first and len(calls) == 4
    assert not warned()
    whole = [file.read_text() for file in files]
    for damaged, why in (
        (whole[0].replace('"sum": "', '"sum": "0'), "not those that were written"),
        ("{", "JSON"),
    ):
        files[0].write_text(damaged)
        caplog.clear()
        assert fitted() == first
        (said,) = warned()
        assert str(files[0]) in said and why in said and "computed anew" in said
        assert files[0].read_text() == whole[0]


def test_large_numbers_are_shared_by_files_that_are_used_only_where_they_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutti.data.cache.sharing.LARGE", 1000)
    values = np.random.default_rng(0).normal(size=(10_000, 3)).astype(np.float32)
    assert shared(values[:10], tmp_path) is not None and not list(tmp_path.iterdir())  # small
    found = shared(values, tmp_path)
    np.testing.assert_array_equal(found, values)
    assert not found.flags.writeable and shared(found, tmp_path) is found
    (path,) = (tmp_path / "numbers").iterdir()
    other = values.copy()
    other[1, 1] += 1  # not in the sample that names the file
    np.testing.assert_array_equal(shared(other, tmp_path), other)
    np.testing.assert_array_equal(shared(values, tmp_path), values)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    np.testing.assert_array_equal(shared(values, tmp_path), values)
    path.write_bytes(b"")
    np.testing.assert_array_equal(shared(values, tmp_path), values)
