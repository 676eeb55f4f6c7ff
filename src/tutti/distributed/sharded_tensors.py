"""Sharded tensors (DTensor): gather, shard, norms and clipping; nested states without their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

MARK = "tutti.tensor"
"""The key of the one-entry mapping that stands where a tensor was."""


def map_leaves(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """`change(path, leaf)` of each leaf of nested mappings, lists and tuples; paths begin with `name`."""
    if isinstance(value, Mapping):
        return {key: map_leaves(item, change, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(item, change, f"{name}/{place}") for place, item in enumerate(value))
    return change(name, value)


def gather(value: Any, *, keep: bool = True, copy: bool = False) -> Any:
    """Gathers every DTensor in nested values to the whole tensor on the CPU.

    All ranks must call it with the same structure. A rank that does not `keep` gets None for each of them, so
    that only one rank holds the whole of a large model. Plain tensors stay as they are; with `copy` they are
    copied to the CPU.
    """

    def whole(_: str, leaf: Any) -> Any:
        if isinstance(leaf, DTensor):
            # Every rank takes part in the gathering, also one that keeps nothing: it is a collective.
            full = gather_tensor(leaf.detach())  # pyright: ignore[reportArgumentType]
            return full.cpu() if keep else None
        if isinstance(leaf, Tensor) and copy:
            return leaf.detach().to("cpu", copy=True) if keep else None
        return leaf

    return map_leaves(value, whole)


def gather_tensor(sharded: DTensor) -> Tensor:
    """The whole of a tensor that is sharded along one dimension, on every rank; a collective.

    On CPUs this does not use `DTensor.full_tensor`, whose all-gather can end the process (segmentation fault,
    seen in torch 2.13): the two threads of a gloo group write the name of the operation that ended last into
    one string without a lock, and a name of more than 15 characters, as that one's, lies on the heap.
    """
    placement, *others = sharded.placements
    if others or sharded.device.type != "cpu" or not isinstance(placement, Shard):
        return sharded.full_tensor()
    # Every rank but the last ones has ceil(size / ranks) rows: filled up to as many, the pieces in a row are
    # the whole, then what was filled up.
    size, rows = sharded.shape[placement.dim], sharded.to_local().movedim(placement.dim, 0)
    count = sharded.device_mesh.size()
    filled = rows.new_zeros((-(-size // count), *rows.shape[1:]))
    filled[: len(rows)] = rows
    pieces = [torch.empty_like(filled) for _ in range(count)]
    dist.all_gather(pieces, filled, group=sharded.device_mesh.get_group())
    return torch.cat(pieces)[:size].movedim(0, placement.dim).contiguous()


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """Shards `value`, which every rank has whole, as `model` is sharded; itself if that is a plain tensor."""
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value
    there = value.to(device=model.device, dtype=value.dtype)
    return distribute_tensor(there, model.device_mesh, model.placements, src_data_rank=None)


def shard_like_all(values: Mapping[str, Tensor], models: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shards each value as the model of its name; a value without a model stays as it is."""
    return {
        name: shard_like(value, models[name]) if name in models else value for name, value in values.items()
    }


def shard_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimiser's state, just loaded, the sharding and the memory layout of its parameters.

    Fused optimisers pair the numbers of a parameter and of its moments as they lie in memory, so contiguous
    moments of a channels-last weight would be paired wrongly.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                state[name] = placed.copy_(shard_like(value, parameter))


def split_by_sharding(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Splits positions into those of plain tensors and of DTensors: torch's fused functions take one kind."""
    kinds: list[list[int]] = [[], []]
    for place, tensor in enumerate(tensors):
        kinds[isinstance(tensor, DTensor)].append(place)
    return [places for places in kinds if places]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors as one vector, sharded or not; 0 of none."""
    groups = [[tensors[n] for n in places] for places in split_by_sharding(tensors)]
    parts = [torch.nn.utils.get_total_norm(group) for group in groups]
    norms = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
    if len(norms) < 2:
        return norms[0] if norms else torch.nn.utils.get_total_norm([])
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_to(parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scales every `.grad` by min(1, limit / norm)."""
    for places in split_by_sharding(parameters):
        torch.nn.utils.clip_grads_with_norm_([parameters[n] for n in places], limit, norm)


def strip_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Moves each tensor of a nested value to `tensors`, named by its path of keys, and leaves a mark.

    {"state": {0: {"momentum": T}}} under the name "muon" becomes {"state": {0: {"momentum": {MARK:
    "muon/state/0/momentum"}}}} and T.
    """

    def strip(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors[path] = leaf
        return {MARK: path}

    return map_leaves(value, strip, name)


def restore_tensors(frame: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Puts the tensors back: the inverse of `strip_tensors`.

    Raises: KeyError if a tensor is missing.
    """
    if isinstance(frame, Mapping):
        if list(frame) == [MARK]:
            return tensors[frame[MARK]]
        return {key: restore_tensors(item, tensors) for key, item in frame.items()}
    if isinstance(frame, list | tuple):
        return type(frame)(restore_tensors(item, tensors) for item in frame)
    return frame
