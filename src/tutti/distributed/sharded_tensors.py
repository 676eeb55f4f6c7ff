"""Shares of tensors and whole ones: what a rank holds under FSDP, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Any, *, keep: bool = True, copy: bool = False) -> Any:
    """Nested values with every share (a DTensor) gathered to the whole tensor on the CPU.

    All ranks must call it with the same structure. Those that do not `keep` get None for each of them, so
    that only one of them holds the whole of a large model. What is no DTensor stays what it is, or becomes a
    `copy` on the CPU.
    """
    if isinstance(value, DTensor):
        full: Tensor = value.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        return full.cpu() if keep else None
    if isinstance(value, Tensor) and copy:
        return value.detach().to("cpu", copy=True) if keep else None
    if isinstance(value, Mapping):
        return {key: whole(item, keep=keep, copy=copy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep=keep, copy=copy) for item in value)
    return value


def like(value: Tensor, model: Tensor) -> Tensor:
    """`value`, which every rank has whole, in the form of `model`: this rank's share of it, or itself."""
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value
    there = value.to(device=model.device, dtype=value.dtype)
    return distribute_tensor(there, model.device_mesh, model.placements, src_data_rank=None)


def like_all(values: Mapping[str, Tensor], models: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each of `values` in the form of the one of that name; a name that is not there stays as it is."""
    return {name: like(value, models[name]) if name in models else value for name, value in values.items()}


def like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's state, just loaded, in the form of the parameters it is for: shares where they are
    shares, and laid out in memory as they are. Fused optimisers pair the numbers of a parameter and its
    moments as they lie there, so contiguous moments of a channels-last weight would be another's."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                state[name] = placed.copy_(like(value, parameter))


def apart(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the shares, and places of the others: torch's fused functions take only one kind at a
    time."""
    kinds: list[list[int]] = [[], []]
    for place, tensor in enumerate(tensors):
        kinds[isinstance(tensor, DTensor)].append(place)
    return [places for places in kinds if places]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all of them as one vector, shares and others; 0 of nothing."""
    parts = [torch.nn.utils.get_total_norm([tensors[n] for n in places]) for places in apart(tensors)]
    found = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
    if len(found) < 2:
        return found[0] if found else torch.nn.utils.get_total_norm([])
    return torch.linalg.vector_norm(torch.stack(found))


def clip_to(parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scales `.grad` of all by min(1, limit / norm)."""
    for places in apart(parameters):
        torch.nn.utils.clip_grads_with_norm_([parameters[n] for n in places], limit, norm)
