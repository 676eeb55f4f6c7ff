"""What the host knows of a mask that lies on a GPU: a look at it would wait for all that is queued there.

`Movable.to` looks at a mask before it moves it, and tells what it saw; whoever makes a mask of another one
tells it on. A mask of which nothing was told is one that may hide something.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Seen(NamedTuple):
    """`every`: all entries are True. `each_row`: every row (first axis) has a True."""

    every: bool = False
    each_row: bool = False


EVERY = Seen(every=True, each_row=True)


def readable(tensor: Tensor) -> bool:
    """True where a look at the values of `tensor` costs nothing: on a CPU.

    On a GPU the host would wait for all that is queued there; a graph being compiled, exported or counted
    with fake tensors has no values.
    """
    fake = isinstance(tensor, FakeTensor)
    return tensor.device.type == "cpu" and not fake and not torch.compiler.is_compiling()


def look(mask: Tensor) -> Seen:
    """What a mask on the host holds."""
    rows = mask if mask.ndim < 2 else mask.flatten(1).any(dim=1)
    return Seen(every=bool(mask.all()), each_row=bool(rows.all()))


def tell(mask: Tensor, seen: Seen) -> Tensor:
    """The same mask, of which this is known from now on."""
    # While a graph is compiled or exported the mask is no value of its own: nothing can be known of it.
    if not torch.compiler.is_compiling():
        mask.tutti_seen = seen  # pyright: ignore[reportAttributeAccessIssue]
    return mask


def told(mask: Tensor) -> Seen:
    """What is known of this mask."""
    return Seen() if torch.compiler.is_compiling() else getattr(mask, "tutti_seen", Seen())


def moved(here: Tensor, there: Tensor) -> Tensor:
    """`there`, a copy of `here` on another device. If it is a mask, what is seen here is known there."""
    looks = here.dtype == torch.bool and here.device.type == "cpu" != there.device.type
    return tell(there, look(here)) if looks else there
