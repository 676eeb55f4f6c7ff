"""Forward and backward passes for a measurement, after which the modules are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def without_side_effects(*roots: nn.Module) -> Iterator[None]:
    """After the block buffers, training modes and `requires_grad` are those before it, to the last bit.

    A forward pass in training mode may change buffers in place (a batch norm's), or assign new ones.
    """
    modules = [module for root in roots for module in root.modules()]
    modes = [(module, module.training) for module in modules]
    learning = [(parameter, parameter.requires_grad) for root in roots for parameter in root.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                buffer.copy_(saved)
                setattr(module, name, buffer)
