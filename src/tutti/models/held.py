"""Modules that are used without sending a gradient to their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tutti.models.layers import blocks_of


@contextmanager
def held(*modules: nn.Module) -> Iterator[None]:
    """What is computed inside sends no gradient to the parameters of `modules`. Their blocks are not
    recomputed: in the backward pass, which comes behind, they would no longer be held."""
    moving = [one for module in modules for one in module.parameters() if one.requires_grad]
    again = [block for block in blocks_of(*modules) if block.recompute]
    for one in moving:
        one.requires_grad_(False)
    for block in again:
        block.recompute = False
    try:
        yield
    finally:
        for one in moving:
            one.requires_grad_(True)
        for block in again:
            block.recompute = True
