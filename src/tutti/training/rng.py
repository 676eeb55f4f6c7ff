"""Saves and restores random states, buffers and modes of modules, so that a measurement changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """All random states, as plain values and tensors that `torch.save` keeps to the last bit. Of CUDA it is
    that of the present device, which is equal on all ranks."""
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(cached)),  # pyright: ignore[reportAttributeAccessIssue]
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def load_rng_state(state: dict[str, Any]) -> None:
    """Continue from saved random states."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


@contextmanager
def own_randomness(*seed: int) -> Iterator[None]:
    """Inside the block random numbers come from `seed`; afterwards they go on as if it had not happened.

    Several numbers are mixed into one seed, so that (1, 2) and (2, 1) are unrelated.
    """
    outside = rng_state()
    mixed = numpy.random.SeedSequence(seed).generate_state(1, numpy.uint64)[0]
    seed_everything(seed[0] if len(seed) == 1 else int(mixed))
    try:
        yield
    finally:
        load_rng_state(outside)


@contextmanager
def without_side_effects(*roots: nn.Module) -> Iterator[None]:
    """After the block buffers, training modes and `requires_grad` are those before it, to the last bit."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    learning = [(parameter, parameter.requires_grad) for root in roots for parameter in root.parameters()]
    restore_buffers = remember_buffers(*roots)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        restore_buffers()


def remember_buffers(*roots: nn.Module) -> Callable[[], None]:
    """A function that gives the buffers of some modules their present values.

    A forward pass in training mode may change buffers in place (a batch norm's), or assign new ones.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for root in roots
        for module in root.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    @torch.no_grad()
    def restore() -> None:
        for module, name, buffer, saved in buffers:
            buffer.copy_(saved)
            setattr(module, name, buffer)

    return restore
