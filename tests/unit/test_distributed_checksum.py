"""The checksum that tells whether ranks have the same weights: of any kind of number, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tutti.training.parallel.ddp import _checksum


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that an operation gives beside `values`, of which views are taken."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.place, self.bytes = values.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.place:
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_pieces_give_the_sum_of_the_whole_and_take_little_memory() -> None:
    values = torch.randn(1000, 7)
    bits = values.view(torch.int32).flatten().to(torch.int64)
    whole = (bits * torch.arange(1, 7001)).sum()
    assert all(_checksum(values, piece) == whole for piece in (1, 64, 6999, 7000, 10_000))
    with LargestResult(values) as largest:
        _checksum(values, piece=64)
    assert 0 < largest.bytes <= 64 * 8


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_one_changed_number_or_two_exchanged_ones_differ(dtype: torch.dtype) -> None:
    bits = torch.arange(12) % 2
    values = bits.to(dtype)
    for changed in (bits.roll(1), torch.cat([bits[:-1], bits[:1]])):
        assert _checksum(changed.to(dtype), 5) != _checksum(values, 5)
    assert _checksum(values[:0]) == 0
