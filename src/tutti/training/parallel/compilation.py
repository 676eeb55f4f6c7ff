"""How the model's transformer blocks run: compiled or not, their activations kept or computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from torch import nn

from tutti.models.layers import blocks_of


def _mode(value: Any) -> Any:
    return ("blocks" if value else "off") if isinstance(value, bool) else value


CompileMode = Annotated[Literal["off", "model", "blocks"], BeforeValidator(_mode)]
"""`true` means blocks, `false` off."""

VARIANTS = 64
"""Versions of a block that may be compiled. They share one function, and each width, mask and mode (learning,
judging) is a version of its own: more than torch's default of 8, behind which it would stop to compile."""


def compiled(model: nn.Module, mode: Literal["off", "model", "blocks"], **options: Any) -> Callable[..., Any]:
    """The forward pass of `model`, compiled whole or block by block; `options` are those of `torch.compile`.

    A block is compiled as one graph: what would break it is an error, not a slow training. Blocks of the same
    sizes share what was compiled, so a deep model takes no longer than a shallow one; between the blocks the
    model runs as ever. The whole model is one graph too, unless it holds what cannot be compiled: then it is
    several.

    The graph is walked more than once (K gradients, diagnostics), so the compiled backward must not give away
    its buffers at the first pass, as it would by default.
    """
    if mode == "off":
        return model
    import torch._dynamo.config  # submodules that `import torch` does not load, and that take a while
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    if mode == "model":
        return torch.compile(model, **options)
    for block in blocks_of(model):
        block.compile(fullgraph=True, **options)
    return model
