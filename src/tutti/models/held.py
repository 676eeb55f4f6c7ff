"""Modules that are used without sending a gradient to their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tutti.models.layers import blocks_of


@contextmanager
def held(*modules: nn.Module) -> Iterator[None]:
    """What is computed inside sends no gradient to the parameters of `modules`.

    Their blocks are not recomputed: in the backward pass they would no longer be held. A block of FSDP has
    its whole parameters only while it runs, so each block holds those that it has then.
    """
    every = blocks_of(*modules)
    blocks = [block for block in every if block._compiled_call_impl is None]
    recompute, moving = [block.recompute for block in every], list[Tensor]()

    def hold(parameters: Iterable[Tensor]) -> list[Tensor]:
        found = [one for one in parameters if one.requires_grad]
        for one in found:
            one.requires_grad_(False)
        return found

    def release(parameters: list[Tensor]) -> None:
        while parameters:
            parameters.pop().requires_grad_(True)

    in_blocks = {one for block in blocks for one in block.parameters()}
    rest = hold(one for module in modules for one in module.parameters() if one not in in_blocks)
    hooks = [
        handle
        for block in blocks
        for handle in (
            block.register_forward_pre_hook(lambda own, _: moving.extend(hold(own.parameters()))),
            block.register_forward_hook(lambda *_: release(moving), prepend=True),
        )
    ]
    for block in every:
        block.recompute = False
    try:
        yield
    finally:
        release(moving)
        release(rest)
        for hook in hooks:
            hook.remove()
        for block, before in zip(every, recompute, strict=True):
            block.recompute = before
