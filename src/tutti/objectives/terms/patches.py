"""Pictures as patches: cut along the vision tokens' grid and normalised one by one; what guesses them."""

from __future__ import annotations

from functools import reduce
from math import isqrt
from typing import Self

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.objectives.term import BaseTermConfig, Model
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import UserError


class PatchTermConfig(BaseTermConfig):
    """The keys of every term that reconstructs patches."""

    weight: Weight = WeightSchedule(start=0.1, end=0.0, schedule="cosine")
    downsample: PositiveInt = Field(
        default=2, description="the target is averaged over squares of this many pixels a side"
    )
    width: PositiveInt = Field(default=64, description="width of the decoder's tokens")
    depth: int = Field(default=1, ge=1, le=2, description="transformer layers of the decoder")
    heads: PositiveInt = Field(default=4, description="attention heads of the decoder")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; choose a width that is"
            )
        return self


def grid_of(model: Model, name: str) -> int:
    """Vision tokens on a side of each view.

    Raises: UserError unless they form a square grid that divides the picture; `name` is the term's.
    """
    tokens, size = model.vision.tokens_per_view, model.spec.image_size
    grid = isqrt(tokens)
    if grid**2 != tokens or size % grid:
        raise UserError(
            f"objective.{name} needs vision tokens on a square grid that divides the picture; the "
            f"encoder gives {tokens} for {size} px. Set objective.{name} to null."
        )
    return grid


def numbers_of(model: Model, grid: int, downsample: int, name: str) -> int:
    """How many numbers a patch has: 3 (patch / downsample)^2.

    Raises: UserError unless `downsample` divides the patch.
    """
    size = model.spec.image_size
    patch = size // grid
    if patch % downsample:
        raise UserError(
            f"objective.{name}.downsample is {downsample}, but must divide the patch of {patch} "
            f"pixels (data.image_size {size} over {grid} tokens a side)."
        )
    return 3 * (patch // downsample) ** 2


def decoder_blocks(width: int, heads: int, depth: int) -> nn.ModuleList:
    """Pre-norm transformer layers without dropout, each four times as wide inside.

    The objectives may not use the models' layers, so they are torch's own.
    """
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        for _ in range(depth)
    )


def to_patches(images: Tensor, grid: int, downsample: int, dtype: torch.dtype) -> Float[Tensor, "b n p"]:
    """Pictures (b, v, 3, h, w) to patches in [-1, 1], averaged over downsample^2 squares, in the order of the
    vision tokens: view by view, row by row. The numbers of a patch are row, column, colour."""
    b, v = images.shape[:2]
    x = images.flatten(0, 1).to(dtype)
    x = averaged(x, downsample) if downsample > 1 else x
    if images.dtype == torch.uint8:
        x = x / 127.5 - 1.0
    side = x.shape[-1] // grid
    cells = x.view(b, v, 3, grid, side, grid, side).permute(0, 1, 3, 5, 4, 6, 2)
    return cells.reshape(b, v * grid**2, 3 * side**2)


def averaged(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c p q"]:
    """The mean of each factor x factor square, as `torch.nn.functional.avg_pool2d` gives it.

    Adding whole rows first takes a third of its time on a CPU; sums of bytes are exact in any order.
    """
    rows = reduce(torch.add, [x[..., start::factor, :] for start in range(factor)])
    return reduce(torch.add, [rows[..., start::factor] for start in range(factor)]) / factor**2


def normalise_patches(patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n p"]:
    """(x - mean) / sqrt(var + 1e-6), each patch by itself."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
    return (patches - mean) / (variance + 1e-6).sqrt()
