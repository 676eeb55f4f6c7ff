"""The gradient of each loss term by itself, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tutti.distributed.ranks import current_ranks, mean_over_ranks
from tutti.objectives.objective import PRIMARY, TermSize

Gradients = dict[str, list[Tensor | None]]
"""For each term the gradient of every parameter, in their order; None where the term does not reach it."""


def separate_gradients(
    losses: Mapping[str, Tensor],
    parameters: Sequence[Tensor],
    reach: Callable[[str], Sequence[int]],
    *,
    keep_graph: bool,
) -> Iterator[tuple[str, list[Tensor | None]]]:
    """d loss / d theta of one loss after the other, over the parameters whose numbers `reach(name)` gives.

    One pass a loss, which ends where these parameters end; the last pass frees the graph unless it is to be
    kept. A loss that reaches no parameter (its gradient is stopped, or there is nothing to learn) has only
    None. `.grad` is not touched.
    """
    numbers = {name: reach(name) if loss.requires_grad else () for name, loss in losses.items()}
    last = next((name for name in reversed(numbers) if numbers[name]), None)
    for name, loss in losses.items():
        found: list[Tensor | None] = [None] * len(parameters)
        if own := numbers[name]:
            inputs = [parameters[number] for number in own]
            keep = keep_graph or name != last  # freed as early as possible: it holds all activations
            taken = torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True)
            for number, gradient in zip(own, taken, strict=True):
                found[number] = gradient
        yield name, found


def term_gradients(values: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Gradients:
    """d L_i / d theta for each raw term; the graph is kept. On several ranks that of the whole batch."""
    learning = [number for number, parameter in enumerate(parameters) if parameter.requires_grad]
    found = separate_gradients(values, parameters, lambda _: learning, keep_graph=True)
    return averaged_gradients(dict(found))


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
def rank_means(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Their means over the ranks that share a batch, in one message for each type of number."""
    found = list(tensors)
    for dtype in dict.fromkeys(one.dtype for one in tensors):
        places = [place for place, one in enumerate(tensors) if one.dtype == dtype]
        # One flat vector: hundreds of small messages would each wait for the slowest rank.
        mean = mean_over_ranks(torch.cat([tensors[place].reshape(-1) for place in places]))
        for place, part in zip(places, mean.split([tensors[n].numel() for n in places]), strict=True):
            found[place] = part.view_as(tensors[place])
    return found


def averaged_gradients(gradients: Gradients) -> Gradients:
    """The mean over the ranks that share a batch of each term's gradient; alone the same objects."""
    if current_ranks().count == 1:
        return gradients
    found: Gradients = {}
    for name, own in gradients.items():
        means = iter(rank_means([gradient for gradient in own if gradient is not None]))
        found[name] = [None if gradient is None else next(means) for gradient in own]
    return found


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
    # One number a parameter, and all in one transfer. NaN is not 0: what is not finite moves.
    largest = torch.stack([gradient.abs().max().to(torch.float64) for gradient in there.values()])
    return {number for number, moves in zip(there, (largest != 0).tolist(), strict=True) if moves}


@torch.no_grad()
def term_sizes(
    vectors: Gradients, values: Mapping[str, float], primary: str = PRIMARY
) -> dict[str, TermSize]:
    """The sizes of the terms' gradients, or parts of an update, each beside the primary term's over the
    parameters that these two move; 0 without it. `values` are the raw terms."""
    places = [(name, n) for name, own in vectors.items() for n, one in enumerate(own) if one is not None]
    # In float64 no square of a float32 is lost: only zeros have a length of 0. One transfer for all.
    lengths = [torch.linalg.vector_norm(vectors[name][n], dtype=torch.float64) for name, n in places]
    squares = dict(zip(places, torch.stack(lengths).square().tolist() if lengths else (), strict=True))
    found: dict[str, TermSize] = {}
    for name, own in vectors.items():
        moved = [n for n in range(len(own)) if squares.get((name, n), 0.0) != 0]
        both = [n for n in moved if squares.get((primary, n), 0.0) != 0]
        found[name] = TermSize(
            own=sum(squares[name, n] for n in both) ** 0.5,
            primary=sum(squares[primary, n] for n in both) ** 0.5,
            anywhere=sum(squares[name, n] for n in moved) ** 0.5,
            value=values.get(name, 0.0),
        )
    return found
