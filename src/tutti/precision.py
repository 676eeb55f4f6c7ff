"""Products that keep their precision where the network around them computes in fewer bits."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


def exact_product(a: Float[Tensor, "... m k"], b: Float[Tensor, "... k n"]) -> Float[Tensor, "... m n"]:
    """a @ b in the precision of `a`, whatever is cast automatically around it."""
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        return a @ b.to(a.dtype)
