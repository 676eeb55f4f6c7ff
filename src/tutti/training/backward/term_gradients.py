"""The gradient of each loss term by itself, from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tutti.distributed.ranks import current_ranks, mean_over_ranks
from tutti.types import UserError

PRIMARY = "action"
"""The term that the others are to help; what they share with it is where they compete."""

Gradients = dict[str, list[Tensor | None]]
"""For each term the gradient of every parameter, in their order; None where the term does not reach it."""


def term_gradients(values: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Gradients:
    """d L_i / d theta for each raw term; the graph is kept, `.grad` is not touched.

    A term that reaches no parameter (its gradient is stopped, or there is nothing to learn) has only None. On
    several ranks it is the gradient of the whole batch.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found: Gradients = {}
    for name, value in values.items():
        if not value.requires_grad or not wanted:
            found[name] = [None] * len(parameters)
            continue
        taken = iter(torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True))
        found[name] = [next(taken) if parameter.requires_grad else None for parameter in parameters]
    return averaged_gradients(found)


def added(one: Gradients, other: Gradients) -> Gradients:
    """The sum of each term's gradient; what only one of them has is as it is there."""
    found = dict(one)
    for name, own in other.items():
        before = one.get(name, [None] * len(own))
        found[name] = [
            a if b is None else b if a is None else a + b for a, b in zip(before, own, strict=True)
        ]
    return found


@torch.no_grad()
def averaged_gradients(gradients: Gradients) -> Gradients:
    """The mean over the ranks that share a batch of each term's gradient, in one message for each term and
    type of number; alone the same objects."""
    if current_ranks().count == 1:
        return gradients
    found: Gradients = {}
    for name, own in gradients.items():
        found[name] = list(own)
        there = [n for n, gradient in enumerate(own) if gradient is not None]
        for dtype in dict.fromkeys(g.dtype for g in own if g is not None):
            numbers = [n for n in there if (g := own[n]) is not None and g.dtype == dtype]
            parts = [g for n in numbers if (g := own[n]) is not None]
            mean = mean_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
            split = mean.split([part.numel() for part in parts])
            for n, part, values in zip(numbers, parts, split, strict=True):
                found[name][n] = values.view_as(part)
    return found


def norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of one term's gradient over all its parameters; 0 of nothing."""
    return torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])


def shared_numbers(gradients: Gradients, primary: str = PRIMARY) -> list[int]:
    """Numbers of the parameters that the primary term and at least one other move; none without it.

    Only there do terms compete: a term's own head, and the action decoder, are moved by no other. A gradient
    of exact zeros moves nothing: a compiled model gives those, where an eager one gives None.
    """
    if primary not in gradients:
        return []
    moved = {name: _moved(own) for name, own in gradients.items()}
    others = set().union(*(own for name, own in moved.items() if name != primary))
    return sorted(moved[primary] & others)


def _moved(own: Sequence[Tensor | None]) -> set[int]:
    """Numbers of the gradients that are not zero everywhere."""
    there = {number: g for number, g in enumerate(own) if g is not None and g.numel() > 0}
    if not there:
        return set()
    largest = torch.stack([gradient.abs().max().to(torch.float64) for gradient in there.values()])
    return {number for number, moves in zip(there, (largest != 0).tolist(), strict=True) if moves}


def shared_norms(gradients: Gradients, primary: str = PRIMARY) -> dict[str, float]:
    """Norm of each term's gradient over the shared parameters (see `shared_numbers`).

    Where the primary term is alone it is over all that it moves.

    Raises: UserError if the primary term is not computed, or reaches nothing.
    """
    moved = [number for number, gradient in enumerate(gradients.get(primary, [])) if gradient is not None]
    if not moved:
        raise UserError(
            f"balancing: it weighs the terms against '{primary}', but that term is not computed in this "
            "phase or moves no parameter. Use balancing.kind=fixed, or another strategy."
        )
    shared = shared_numbers(gradients, primary) or moved
    return {name: float(norm([own[number] for number in shared])) for name, own in gradients.items()}
