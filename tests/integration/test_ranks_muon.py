"""Muon on matrices of which each rank holds a share: the bits of one process, and the work divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fixtures.ranks import on_ranks
from tutti.distributed.sharded_tensors import gather, gather_tensor
from tutti.training.optim import muon
from tutti.training.optim.muon import Muon, orthogonalised

SHAPES = ((16, 8), (8, 16), (16, 48), (5, 16), (16, 48), (3, 4, 2, 2), (16, 16), (48, 16))


def matrices(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for shape in SHAPES]


def moved(shared: bool) -> dict[str, Any]:
    """The matrices after two updates, and how many of them this rank has iterated."""
    iterated = 0

    def counting(stacks: Any, rounds: int) -> list[Tensor]:
        nonlocal iterated
        iterated += sum(len(stack) for stack in stacks)
        return orthogonalised(stacks, rounds)

    parameters = [nn.Parameter(share(value, shared)) for value in matrices(0)]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    with pytest.MonkeyPatch.context() as patch, CommDebugMode() as calls:
        patch.setattr(muon, "orthogonalised", counting)
        for seed in (1, 2):
            for parameter, gradient in zip(parameters, matrices(seed), strict=True):
                parameter.grad = share(gradient, shared)
            if shared and seed > 1:  # as on a GPU, where directions come before the host has decided
                optimizer.step_prepared(optimizer.prepare())
            else:
                optimizer.step()
        whole = gather([parameter.detach() for parameter in parameters])
    return {"matrices": whole, "iterated": iterated, "calls": names_of(calls)}


def names_of(calls: CommDebugMode) -> set[str]:
    """Collectives of DTensor itself; on CPUs its all-gather can end the process (see `gather_tensor`)."""
    return {str(call) for call in calls.get_comm_counts() if "functional" in str(call)}


def gathered() -> list[tuple[bool, set[str]]]:
    """Whether tensors of every size and sharding are gathered as DTensor itself does it, and its calls."""
    mesh, found = init_device_mesh("cpu", (torch.distributed.get_world_size(),)), []
    for shape, dim in (((6, 2), 0), ((5, 2), 0), ((1,), 0), ((2, 5, 3), 1), ((4, 3, 2, 2), 0), ((0, 3), 0)):
        for layout in (torch.contiguous_format, torch.channels_last):
            value = torch.randn(shape)
            value = value.to(memory_format=layout) if value.ndim == 4 else value
            sharded = distribute_tensor(value, mesh, [Shard(dim)])
            with CommDebugMode() as calls:
                whole = gather_tensor(sharded)
            full = sharded.full_tensor()
            same = torch.equal(whole, full) and torch.equal(whole, value) and whole.stride() == full.stride()
            found.append((same, names_of(calls)))
    return found


def share(value: Tensor, shared: bool) -> Tensor:
    if not shared:
        return value
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return distribute_tensor(value, mesh, [Shard(0)])


@pytest.mark.parametrize("count", [2, 3])
def test_shares_move_to_the_same_bits_and_each_rank_iterates_its_portion(count: int) -> None:
    (alone,) = on_ranks(1, moved, False)
    assert alone["iterated"] == 2 * len(SHAPES)
    several = on_ranks(count, moved, True)
    for one in several:
        assert all(torch.equal(a, b) for a, b in zip(alone["matrices"], one["matrices"], strict=True))
    assert sum(one["iterated"] for one in several) == 2 * len(SHAPES)
    iterated = [one["iterated"] for one in several]
    assert max(iterated) - min(iterated) <= 2  # one matrix more than another in each update
    assert [one["calls"] for one in several] == [set()] * count


@pytest.mark.parametrize("count", [2, 3])
def test_what_is_sharded_is_gathered_without_dtensors_all_gather(count: int) -> None:
    assert on_ranks(count, gathered) == [[(True, set())] * 12] * count
