"""What every part is built from: transformer blocks and their config, attention heads, a convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tutti.frozen_config import FrozenConfig, heads_divide
from tutti.masks import readable, told
from tutti.types import Robots, UserError

Activation = Literal["relu", "gelu"]


def present_pictures(
    images: Float[Tensor, "b v 3 h w"],
    image_mask: Bool[Tensor, "b v"],
    *,
    views: int,
    size: int,
    withhold: bool,
) -> tuple[Float[Tensor, "b v 3 h w"], Bool[Tensor, "b v"]]:
    """What a vision encoder of so many views of so many pixels sees: absent pictures are 0, and with
    `withhold` all are absent. Raises: UserError for pictures of another number or size."""
    _, v, _, h, w = images.shape
    if (v, h, w) != (views, size, size):
        raise UserError(
            f"the model was built for {views} views of {size} x {size} pixels, but got {v} of {h} x {w}; "
            "use the data section of its training."
        )
    if withhold:
        image_mask = torch.zeros_like(image_mask)
    # An absent view may hold anything, even NaN, and 0 * NaN in an attention would spread it.
    if not all_present(image_mask):
        images = images.masked_fill(~image_mask[:, :, None, None, None], 0)
    return images, image_mask


def to_floats(images: UInt8[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """x / 127.5 - 1."""
    return images.to(dtype).div_(127.5).sub_(1.0)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """ReLU, or GELU in its tanh form. May overwrite `x`: hand in the fresh output of a linear layer."""
    # In place is safe behind linear, convolution and layer norm: none of them needs its output to go back.
    # A view (a linear layer's output of three axes is one) would pay for it with copies on the way back.
    if activation == "relu":
        return F.relu(x, inplace=not torch.compiler.is_compiling() and not x._is_view())
    return F.gelu(x, approximate="tanh")


def all_present(mask: Tensor) -> bool:
    """True if `mask` is known to be all True, so that the work of masking can be saved: by a look at it, or
    where its values are not `readable` by what was told of it. Else the work is done; the result is the same.
    """
    return bool(mask.all()) if readable(mask) else told(mask).every


def attention_mask(*masks: Bool[Tensor, "b _"]) -> Bool[Tensor, "b 1 1 n"] | None:
    """The keys' mask for `scaled_dot_product_attention`, of keys whose `masks` stand side by side; None, for
    its fastest kernel, if all are seen."""
    if all(map(all_present, masks)):
        return None
    return (masks[0] if len(masks) == 1 else torch.cat(masks, dim=1))[:, None, None, :]


class TransformerBlock(nn.Module, ABC):
    """What repeats in depth: the unit in which a model is compiled and its activations are recomputed.

    With `recompute` a training forward keeps only the block's inputs; the backward pass computes the rest
    once more, from the same random numbers, to the same bits (1604.06174). `residual` is the dtype of the sum
    that runs through the blocks where products are cast automatically; None: that of what comes in.
    """

    recompute: bool = False
    residual: torch.dtype | None = None

    @abstractmethod
    def compute(self, *inputs: Any) -> Tensor:
        """The block's function."""

    def forward(self, *inputs: Any) -> Tensor:
        """`compute`, with or without its activations kept."""
        if self.residual is not None and torch.is_autocast_enabled(inputs[0].device.type):
            inputs = (inputs[0].to(self.residual), *inputs[1:])
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self.compute(*inputs)


class RepeatedBlock(nn.Module):
    """What repeats in depth in a network that others have written, given to a block by `make_repeated`.

    `recompute` is as in `TransformerBlock`; `residual` is taken and changes nothing.
    """

    recompute: bool = False
    residual: torch.dtype | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The block's function, with or without its activations kept."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, **named)
        return super().__call__(*inputs, **named)


def make_repeated(block: nn.Module) -> None:
    """Makes `block`, where it stands, one of `blocks_of`. It stays of its class, with its names."""
    own = type(block)
    block.__class__ = type(own.__name__, (RepeatedBlock, own), {"__module__": own.__module__})


def blocks_of(*roots: nn.Module) -> list[TransformerBlock | RepeatedBlock]:
    """The blocks that repeat in depth in these modules, in order of registration."""
    kinds = (TransformerBlock, RepeatedBlock)
    return [module for root in roots for module in root.modules() if isinstance(module, kinds)]


class TransformerConfig(FrozenConfig):
    """The keys that every part made of transformer blocks has."""

    kind: Any  # a literal in each subclass
    width: PositiveInt = Field(description="Width of the tokens.")
    depth: int = Field(ge=0, description="Transformer blocks.")
    heads: PositiveInt = Field(default=4, description="Attention heads; they must divide the width.")
    mlp_ratio: float = Field(
        default=4.0, gt=0, description="Hidden width of each MLP over the width of the tokens."
    )
    activation: Activation = Field(default="relu", description="Activation function of the MLPs.")
    bias: bool = Field(
        default=True, description="Whether the blocks' linear maps add a bias; without: 2 % faster on a GPU."
    )

    _heads_divide = model_validator(mode="after")(heads_divide)

    def blocks(self) -> nn.ModuleList:
        """`depth` fresh blocks."""
        return nn.ModuleList(
            Block(self.width, self.heads, self.mlp_ratio, self.activation, bias=self.bias)
            for _ in range(self.depth)
        )


class RobotLinear(nn.Linear):
    """A linear map of each robot's own: y_b = W_r x_b + c_r with r the robot of row b; 0 where there is none.

    They begin as copies of one map and lie one below the other in one matrix. All are taken of every row, and
    the row's own is kept: a gather would need a matrix for each row.
    """

    def __init__(self, like: nn.Linear, count: int) -> None:
        super().__init__(like.in_features, count * like.out_features, device=like.weight.device)
        self.count = count
        with torch.no_grad():
            self.weight.copy_(like.weight.repeat(count, 1))
            self.bias.copy_(like.bias.repeat(count))

    def reset_parameters(self) -> None:
        """Nothing: no random number is drawn for what is copied."""

    def of(self, x: Float[Tensor, "b *n d"], robots: Robots | None) -> Float[Tensor, "b *n e"]:
        """Raises: ValueError without robots, of which each row must tell its own."""
        if robots is None:
            raise ValueError("a projection for each robot needs observation.robots, and found none")
        own = robots.number[:, None] == torch.arange(self.count, device=x.device)
        every = super().forward(x).unflatten(-1, (self.count, -1))
        own = own.view(len(x), *(1,) * (x.ndim - 2), self.count, 1)
        return torch.where(own, every, 0.0).sum(-2)


def project(layer: nn.Linear, x: Float[Tensor, "b *n d"], robots: Robots | None) -> Float[Tensor, "b *n e"]:
    """`layer(x)`, or what it is of each row's own robot."""
    return layer.of(x, robots) if isinstance(layer, RobotLinear) else layer(x)


def split_heads(joined: Float[Tensor, "b n m"], parts: int, heads: int) -> tuple[Tensor, ...]:
    """The `parts` tensors (b, heads, n, e) that lie side by side in `joined`: query, key, value."""
    b, n, m = joined.shape
    return joined.view(b, n, parts, heads, m // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(mixed: Float[Tensor, "b k n e"]) -> Float[Tensor, "b n m"]:
    """What the heads found, side by side again."""
    return mixed.transpose(1, 2).flatten(2)


class Block(TransformerBlock):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)) (2002.04745).

    One matrix makes query, key and value. There is no dropout.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Activation = "relu",
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.heads = heads
        self.activation: Activation = activation
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.attention_out = nn.Linear(width, width, bias=bias)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, hidden, bias=bias)
        self.mlp_out = nn.Linear(hidden, width, bias=bias)

    def compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b 1 #n n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Every token looks at every token whose `mask` is True; None means all."""
        query, key, value = split_heads(self.query_key_value(self.attention_norm(x)), 3, self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attention_out(join_heads(mixed))
        return x + self.mlp_out(activate(self.mlp_in(self.mlp_norm(x)), self.activation))


class ConvLayer(nn.Module):
    """3 x 3 convolution, layer norm over the channels of each pixel, ReLU; all in channels-last memory.

    In channels-last memory the norm is an ordinary LayerNorm over the last axis, so nothing is copied.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
        self.norm = nn.LayerNorm(channels_out)
        self.conv.weight = nn.Parameter(self.conv.weight.detach().to(memory_format=torch.channels_last))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e p q"]:
        """The map, `stride` times smaller on each side."""
        normed = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return activate(normed, "relu").permute(0, 3, 1, 2)

    if TYPE_CHECKING:
        __call__ = forward


class Stem(nn.Sequential):
    """Convolutions that make a picture's tokens: cells of `unshuffle` x `unshuffle` pixels become channels,
    then one `ConvLayer` for each entry of `channels`. Compiled as one graph for each size of its input: what
    lies between two convolutions (a cast, the norm, ReLU) becomes one pass over memory.
    """

    def __init__(self, unshuffle: int, channels: Sequence[int], strides: Sequence[int]) -> None:
        widths = (3 * unshuffle**2, *channels)
        super().__init__(*(ConvLayer(widths[i], widths[i + 1], stride) for i, stride in enumerate(strides)))
        self.unshuffle = unshuffle

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b n c"]:
        """One token a cell, row by row."""
        return super().forward(space_to_depth(images, self.unshuffle)).permute(0, 2, 3, 1).flatten(1, 2)

    if TYPE_CHECKING:
        __call__ = forward


def space_to_depth(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b e p q"]:
    """`torch.nn.functional.pixel_unshuffle` with its result in channels-last memory: one copy, not two."""
    b, c, h, w = x.shape
    cells = x.view(b, c, h // factor, factor, w // factor, factor).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, h // factor, w // factor, c * factor * factor).permute(0, 3, 1, 2)
