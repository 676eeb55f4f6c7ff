"""The gradient of each loss term by itself, from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tutti.types import UserError

Gradients = dict[str, list[Tensor | None]]
"""For each term the gradient of every parameter, in their order; None where the term does not reach it."""


def term_gradients(values: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Gradients:
    """d L_i / d theta for each raw term; the graph is kept, `.grad` is not touched.

    A term that reaches no parameter (its gradient is stopped, or there is nothing to learn) has only None.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found: Gradients = {}
    for name, value in values.items():
        if not value.requires_grad or not wanted:
            found[name] = [None] * len(parameters)
            continue
        taken = iter(torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True))
        found[name] = [next(taken) if parameter.requires_grad else None for parameter in parameters]
    return found


def norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of one term's gradient over all its parameters; 0 of nothing."""
    present = [gradient for gradient in gradients if gradient is not None]
    return torch.nn.utils.get_total_norm(present)


def shared_norms(gradients: Gradients, primary: str = "action") -> dict[str, float]:
    """Norm of each term's gradient over the parameters that the primary term moves too.

    Only there do terms compete: a term's own head is moved by no other.

    Raises: UserError if the primary term is not computed, or reaches nothing.
    """
    main = gradients.get(primary, [])
    shared = [number for number, gradient in enumerate(main) if gradient is not None]
    if not shared:
        raise UserError(
            f"balancing: it weighs the terms against '{primary}', but that term is not computed in this "
            "phase or moves no parameter. Use balancing.kind=fixed, or another strategy."
        )
    return {name: float(norm([own[number] for number in shared])) for name, own in gradients.items()}
