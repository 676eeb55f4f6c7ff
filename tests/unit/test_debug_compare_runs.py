"""The comparison of two runs sees a single bit, and says where."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tutti.debug.compare_runs import Comparison, compare_records, windows_of
from tutti.training.records import MetricsWriter


def compared(one: Any, other: Any) -> Comparison:
    found = Comparison()
    found.add("x", one, other)
    return found


def test_equal_structures_have_no_difference_and_every_number_counts() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    nested = {"a": tensor, "b": [1, 2.5, {"c": "text", "d": None}], "e": torch.ones(())}
    found = compared(nested, {**nested, "a": tensor.clone()})
    assert (found.num_values, found.num_differing, found.first) == (6 + 4 + 1, 0, None)


def test_one_unit_in_the_last_place_is_found_with_index_values_and_count() -> None:
    one = torch.ones(2, 3)
    other = one.clone()
    other[1, 0] = 1.0 + 2**-23
    other[1, 2] = 2.0
    first = compared({"w": one}, {"w": other}).first
    assert first is not None
    assert (first.name, first.index, first.count, first.size) == ("x/w", (1, 0), 2, 6)
    assert str(first) == "x/w[1, 0]: 1.0 and 1.0000001192092896; 2 of its 6 values differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_signs_of_zero_differ_and_equal_nans_do_not(dtype: torch.dtype) -> None:
    assert compared(torch.zeros(2, dtype=dtype), -torch.zeros(2, dtype=dtype)).num_differing == 2
    nan = torch.full((3,), float("nan"), dtype=dtype)
    assert compared(nan, nan.clone()).num_differing == 0
    assert compared(0.0, -0.0).num_differing == 1 and compared(math.nan, math.nan).num_differing == 0


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"a": 1}, {}, "x/a: 1 and '(absent)'"),
        ({}, {"a": 1}, "x/a: '(absent)' and 1"),
        (torch.ones(2), torch.ones(3), "x: 'torch.float32 (2,)' and 'torch.float32 (3,)'"),
        (torch.ones(2), torch.ones(2).int(), "x: 'torch.float32 (2,)' and 'torch.int32 (2,)'"),
        (torch.ones(2), 1.0, "x: 'tensor (2,)' and 1.0"),
        (1, True, "x: 1 and True"),
        ([1, 2], [1], "x/1: 2 and '(absent)'"),
    ],
)
def test_what_is_missing_or_of_another_kind_differs(one: Any, other: Any, said: str) -> None:
    found = compared(one, other)
    assert str(found.first) == said and found.num_differing == 1


def test_records_are_compared_without_times_and_events(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1.0, 0.5), ("b", 2.0, 0.5), ("c", 1.0, 0.25)):
        with MetricsWriter(tmp_path / name) as writer:
            if name == "b":
                writer.write(0, "event", {"fault/damaged_checkpoints": 1.0})
            writer.write(1, "train", {"loss/total": loss, "time/seconds": seconds})
    found = Comparison()
    compare_records(found, tmp_path / "a", tmp_path / "b")
    assert found.num_differing == 0 and found.values == {"records.jsonl": 3, "records.jsonl, order": 1}
    compare_records(found, tmp_path / "a", tmp_path / "c")
    assert str(found.first) == "records.jsonl/step 1 train/loss/total: 0.5 and 0.25"


def test_batches_made_twice_must_be_the_same_and_those_ahead_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    lines = [[0, [5, 6]], [1, [7, 8]], [1, [7, 8]], [2, [9, 1]], [2, [9, 2]], [3, [0, 0]]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[4, [1")
    order, changed = windows_of(path, 3)
    assert order == {"0": [5, 6], "1": [7, 8], "2": [9, 2]} and changed == ["2"]
