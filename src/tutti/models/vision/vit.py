"""The vision encoder: a convolutional stem, then a vision transformer over each view."""

from __future__ import annotations

from math import prod
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.masks import tell, told
from tutti.models.interfaces import VisionEncoder
from tutti.models.layers import Stem, TransformerConfig, present_pictures
from tutti.types import DataSpec, Tokens, UserError


class StemConfig(FrozenConfig):
    """Space-to-depth by `unshuffle`, then one 3 x 3 convolution for each entry of `channels`."""

    unshuffle: PositiveInt = Field(
        default=4, description="pixels of an unshuffle x unshuffle cell become channels"
    )
    channels: tuple[PositiveInt, ...] = Field(
        default=(64, 128, 128), min_length=1, description="Output channels of each convolution."
    )
    strides: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 2), min_length=1, description="Stride of each convolution."
    )

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.channels) != len(self.strides):
            raise ValueError(
                f"stem: {len(self.channels)} channels but {len(self.strides)} strides; give as many"
            )
        return self


class VisionTransformerConfig(TransformerConfig):
    """`kind: vit`, a vision transformer with a convolutional stem (2106.14881) instead of patches."""

    kind: Literal["vit"] = "vit"
    stem: StemConfig = Field(default=StemConfig(), description="The convolutions that make the tokens.")
    width: PositiveInt = Field(default=128, description="Width of the vision tokens.")
    depth: int = Field(
        default=1, ge=0, description="transformer blocks on each view alone; 0 leaves it to the fusion"
    )

    withhold: bool = Field(
        default=False,
        description="true: all views are withheld, in training and in use: the control that never sees.",
    )

    def build(self, spec: DataSpec) -> VisionTransformer:
        """The encoder for pictures of `spec`. Raises UserError if their size does not fit the stem."""
        return VisionTransformer(self, spec)


class VisionTransformer(VisionEncoder):
    """Stem, linear map to `width`, a learned embedding of view and cell, `depth` blocks on each view.

    A picture of s x s pixels gives (s / stride)^2 tokens, row by row, the stride that of the stem; views
    follow one another. The views are encoded apart, folded into the batch: the fusion is where they meet.
    """

    def __init__(self, config: VisionTransformerConfig, spec: DataSpec) -> None:
        super().__init__()
        stride, size = config.stem.unshuffle * prod(config.stem.strides), spec.image_size
        if size % stride or size < stride:
            near = sorted({max(1, size // stride) * stride, (size // stride + 1) * stride})
            raise UserError(
                f"data.image_size is {size}, but model.vision.stem (unshuffle x strides) needs a multiple of "
                f"{stride}. Set data.image_size to {' or '.join(map(str, near))}, or change the stem."
            )
        self.width = config.width
        self.tokens_per_view = (size // stride) ** 2
        self.image_size = size
        self.withhold = config.withhold
        self.stem = Stem(config.stem.unshuffle, config.stem.channels, config.stem.strides)
        self.embed = nn.Linear(config.stem.channels[-1], config.width)
        self.position = nn.Parameter(torch.randn(len(spec.views), self.tokens_per_view, config.width) * 0.02)
        self.blocks = config.blocks()

    def forward(self, images: Float[Tensor, "b v 3 h w"], image_mask: Bool[Tensor, "b v"]) -> Tokens:
        """Pictures in [-1, 1] to (b, v * tokens_per_view, width); an absent view's tokens are masked."""
        images, image_mask = present_pictures(
            images, image_mask, views=len(self.position), size=self.image_size, withhold=self.withhold
        )
        b, v = image_mask.shape
        x = self.embed(self.stem(images.flatten(0, 1)))
        x = (x.view(b, v, -1, self.width) + self.position).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        n = self.tokens_per_view
        mask = tell(image_mask[:, :, None].expand(b, v, n).reshape(b, v * n), told(image_mask))
        return Tokens(values=x.view(b, v * n, self.width), mask=mask)
