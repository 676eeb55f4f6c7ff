"""Gripper dimensions of an action: where they are, and a check that they open and close."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tutti.types import UserError

CLOSE = 0.05
"""How near to one of the two values counts as being there, as a share of their distance."""
MAX_AWAY = 0.02
"""The share of the values of a gripper that may lie elsewhere."""


def share_away(values: Tensor, low: Tensor, high: Tensor) -> float:
    """The share of `values` that are near to neither `low` nor `high`, which broadcast to them."""
    distance = torch.minimum((values - low).abs(), (values - high).abs())
    return float((distance > CLOSE * (high - low)).double().mean())


def gripper_dimensions(
    dimensions: Sequence[int], action_dim: int, key: str, names: Sequence[str] = ()
) -> tuple[int, ...]:
    """The dimensions from 0 on, in rising order; `key` names them in the config, `names` in the data.

    Raises: UserError if one of them is none of an action's, or is named twice.
    """
    for dimension in dimensions:
        if not -action_dim <= dimension < action_dim:
            called = f" ({', '.join(f'{place} {name}' for place, name in enumerate(names))})" if names else ""
            raise UserError(
                f"{key} is {dimension}, but actions have {action_dim} dimensions{called}: choose from 0 to "
                f"{action_dim - 1}, or -1 for the last."
            )
    from_zero = tuple(sorted(dimension % action_dim for dimension in dimensions))
    if len(set(from_zero)) < len(from_zero):
        raise UserError(f"{key} names a dimension twice: {', '.join(map(str, dimensions))}. Keep one.")
    return from_zero
