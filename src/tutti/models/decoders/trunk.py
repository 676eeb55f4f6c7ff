"""The network of the decoders that generate: a small transformer over the chunk, conditioned on the features.

Each block is modulated by the condition (adaptive layer norm with gates that start at 0: DiT, 2212.09748) and
may also attend to the fused vision tokens. What depends on the features alone is computed once for a chunk,
however many steps its generation takes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.masks import EVERY, tell
from tutti.models.decoders.chunks import own_dimensions
from tutti.models.layers import (
    Activation,
    RobotLinear,
    TransformerBlock,
    TransformerConfig,
    activate,
    attention_mask,
    join_heads,
    project,
    split_heads,
)
from tutti.types import DataSpec, Features, Movable, Robots, Tokens

PERIODS = (4e-3, 4.0)


class TrunkConfig(TransformerConfig):
    """The keys that every decoder with this network has."""

    width: PositiveInt = Field(default=96, description="width of the decoder's tokens")
    depth: PositiveInt = Field(default=2, description="Transformer blocks of the decoder.")
    mlp_ratio: float = Field(
        default=2.0, gt=0, description="Hidden width of each MLP over the width of the tokens."
    )
    cross_attention: bool | Literal["fused", "layers"] = Field(
        default=False,
        description="true or fused: also attend to the fused vision tokens, not only read the readout. "
        "layers: each block attends to pictures and text behind a block of model.vlm.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Movable):
    """Keys and values of the readout and the fused vision tokens, for one block."""

    keys: Float[Tensor, "b k n e"]
    values: Float[Tensor, "b k n e"]
    mask: Bool[Tensor, "b 1 1 n"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a chunk is made from: one vector that modulates, a memory for each block (or none), and whose
    chunk it is, where there are several robots."""

    vector: Float[Tensor, "b w"]
    memories: tuple[Memory | None, ...]
    robots: Robots | None = None

    def repeat(self, times: int) -> Condition:
        """`times` copies of the batch, one behind the other."""
        if times == 1:
            return self
        return self.apply(lambda value: value.repeat(times, *(1,) * (value.ndim - 1)))

    def apply(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The same condition with `function` applied to every tensor in it."""
        memories = tuple(None if memory is None else memory.apply(function) for memory in self.memories)
        robots = None if self.robots is None else self.robots.apply(function)
        return Condition(vector=function(self.vector), memories=memories, robots=robots)


class Conditioner(nn.Module, ABC):
    """What a decoder's network needs to know of the features, computed once for a chunk."""

    @abstractmethod
    def forward(self, features: Features) -> Condition:
        """The condition."""

    if TYPE_CHECKING:
        __call__ = forward


class Conditioning(Conditioner):
    """Features to the condition: a linear map of the readout and, with cross-attention, keys and values.

    The readout is the first token of the memory, so that there is one even where every view is absent. With
    `layers` block i of D reads what stands behind block ceil((i + 1) L / D) of the L of a VLM, through a
    layer norm, since its sums grow with depth: its width, heads and depth bind the decoder to nothing.
    """

    def __init__(self, config: TrunkConfig, readout_width: int) -> None:
        super().__init__()
        self.heads, self.depth = config.heads, config.depth
        self.readout = nn.Linear(readout_width, config.width)
        count = config.depth if config.cross_attention else 0
        self.keys_values = nn.ModuleList(nn.Linear(readout_width, 2 * config.width) for _ in range(count))
        norms = count if config.cross_attention == "layers" else 0
        self.norms = nn.ModuleList(nn.LayerNorm(readout_width) for _ in range(norms))

    def forward(self, features: Features) -> Condition:
        """The vector (b, w), and a memory for each block."""
        vector = self.readout(features.readout)
        if not self.keys_values:
            return Condition(vector=vector, memories=(None,) * self.depth, robots=features.robots)
        sources = [self._layer(features, number) for number in range(len(self.norms))]
        read = sources or [features.fused_vision] * self.depth
        always = tell(read[0].mask.new_ones(len(vector), 1), EVERY)
        mask = attention_mask(always, read[0].mask)
        memories: list[Memory] = []
        for source, linear in zip(read, self.keys_values, strict=True):
            tokens = torch.cat([features.readout[:, None], source.values], dim=1)
            keys, values = split_heads(linear(tokens), 2, self.heads)
            memories.append(Memory(keys=keys, values=values, mask=mask))
        return Condition(vector=vector, memories=tuple(memories), robots=features.robots)

    def _layer(self, features: Features, number: int) -> Tokens:
        """What block `number` reads of a VLM, behind its norm."""
        last = -(-(number + 1) * len(features.layers) // self.depth) - 1
        tokens = features.layers[last]
        return Tokens(values=self.norms[number](tokens.values), mask=tokens.mask)


class Cache:
    """Keys and values of the tokens that a causal block has seen so far."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None

    def extend(
        self, keys: Float[Tensor, "b k n e"], values: Float[Tensor, "b k n e"]
    ) -> tuple[Float[Tensor, "b k m e"], Float[Tensor, "b k m e"]]:
        """All keys and values up to and with these."""
        if self.seen is not None:
            keys, values = torch.cat([self.seen[0], keys], 2), torch.cat([self.seen[1], values], 2)
        self.seen = (keys, values)
        return self.seen


class ModulatedBlock(TransformerBlock):
    """x + g1 attention(norm(x) (1 + s1) + c1), then the memory, then x + g2 mlp(norm(x) (1 + s2) + c2).

    The six modulations are a linear map of silu(condition) that starts at 0: a fresh block does nothing.
    A causal block lets a token attend to itself and to those before it only.
    """

    def __init__(self, config: TrunkConfig, *, causal: bool = False) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.heads, self.causal = config.heads, causal
        self.activation: Activation = config.activation
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        if config.cross_attention:
            self.memory_norm = nn.LayerNorm(width)
            self.memory_query = nn.Linear(width, width)
            self.memory_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "b n w"],
        vector: Float[Tensor, "b w"],
        memory: Memory | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n w"]:
        """With a cache, `x` is what follows on the tokens in it: one token at a time."""
        modulation = self.modulation(F.silu(vector))[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        normed = self.attention_norm(x) * (1 + scale) + shift
        query, key, value = split_heads(self.query_key_value(normed), 3, self.heads)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal and cache is None)
        x = x + gate * self.attention_out(join_heads(mixed))
        if memory is not None:
            (query,) = split_heads(self.memory_query(self.memory_norm(x)), 1, self.heads)
            mixed = F.scaled_dot_product_attention(query, memory.keys, memory.values, attn_mask=memory.mask)
            x = x + self.memory_out(join_heads(mixed))
        normed = self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.mlp_out(activate(self.mlp_in(normed), self.activation))

    def __call__(
        self,
        x: Float[Tensor, "b n w"],
        vector: Float[Tensor, "b w"],
        memory: Memory | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n w"]:
        if cache is not None:  # it grows with every token: nothing to compile, but FSDP's hooks must run
            return self._call_impl(x, vector, memory, cache)  # pyright: ignore[reportReturnType]
        return super().__call__(x, vector, memory)


class Trunk(nn.Module):
    """Learned positions, `depth` modulated blocks, layer norm: (b, n, w) to (b, n, w)."""

    def __init__(self, config: TrunkConfig, length: int, *, causal: bool = False) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(length, config.width) * 0.02)
        self.blocks = nn.ModuleList(ModulatedBlock(config, causal=causal) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        condition: Condition,
        caches: list[Cache] | None = None,
        first: int = 0,
    ) -> Float[Tensor, "b n w"]:
        """`x` are the tokens at the places `first`, first + 1, ...; with caches, one token at a time."""
        x = x + self.position[first : first + x.shape[1]]
        for number, (block, memory) in enumerate(zip(self.blocks, condition.memories, strict=True)):
            x = block(x, condition.vector, memory, None if caches is None else caches[number])
        return self.norm(x)

    if TYPE_CHECKING:
        __call__ = forward


class ChunkNetwork(nn.Module, ABC):
    """The network of a decoder that cleans chunks."""

    @abstractmethod
    def forward(
        self, chunk: Float[Tensor, "b t a"], level: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b t a"]:
        """What the decoder wants to know about the chunk: a velocity, a noise, the clean chunk."""

    if TYPE_CHECKING:
        __call__ = forward


class Denoiser(ChunkNetwork):
    """One token a step of the chunk: a linear map in, the trunk, a linear map out.

    The level in [0, 1] enters the condition as sines and cosines, with periods from 0.004 to 4 in equal
    ratios, through two layers (as pi0, 2410.24164).
    """

    def __init__(self, config: TrunkConfig, spec: DataSpec) -> None:
        super().__init__()
        self.width = config.width
        self.level_in = nn.Linear(config.width, config.width)
        self.level_out = nn.Linear(config.width, config.width)
        self.chunk_in = nn.Linear(spec.action_dim, config.width)
        self.trunk = Trunk(config, spec.horizon)
        self.out = shrink(nn.Linear(config.width, spec.action_dim))

    def forward(
        self, chunk: Float[Tensor, "b t a"], level: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b t a"]:
        """By the trunk."""
        waves, robots = level_waves(level, self.width), condition.robots
        come = condition.vector + self.level_out(activate(self.level_in(waves), "relu"))
        chunk = own_dimensions(chunk, robots)  # what a robot lacks is noise that nothing cleans
        tokens = self.trunk(project(self.chunk_in, chunk, robots), replace(condition, vector=come))
        return project(self.out, tokens, robots)

    def separate_robots(self, count: int) -> None:
        """A first and a last layer for each of `count` robots, begun alike."""
        self.chunk_in, self.out = RobotLinear(self.chunk_in, count), RobotLinear(self.out, count)


def level_waves(
    level: Float[Tensor, " b"], width: int, periods: tuple[float, float] = PERIODS
) -> Float[Tensor, "b w"]:
    """sin and cos of 2 pi level / period, `width` // 2 of each; an odd width ends with a 0."""
    shortest, longest = periods
    places = torch.linspace(0, 1, width // 2, dtype=level.dtype, device=level.device)
    angles = 2 * math.pi * level[:, None] / (shortest * (longest / shortest) ** places)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return waves if width % 2 == 0 else torch.nn.functional.pad(waves, (0, 1))


def shrink(linear: nn.Linear, scale: float = 0.1) -> nn.Linear:
    """A last layer that starts small: an untrained decoder then hardly moves the robot."""
    with torch.no_grad():
        linear.weight.mul_(scale)
        linear.bias.zero_()
    return linear
