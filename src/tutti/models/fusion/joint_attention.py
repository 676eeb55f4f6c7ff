"""The fusion: one transformer in which every token, whatever it comes from, attends to every other."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.distributed.ranks import sample_whole_batch
from tutti.frozen_config import FrozenConfig
from tutti.models.interfaces import Fusion
from tutti.models.layers import Block, Heads, MlpActivation, MlpRatio, attention_mask, require_divisible
from tutti.types import DataSpec, Tokens

SEGMENTS = ("readout", "state", "language", "vision")
"""The order of the sequence; also the index of each segment's type embedding."""


class JointAttentionConfig(FrozenConfig):
    """`kind: joint_attention`."""

    kind: Literal["joint_attention"] = "joint_attention"
    width: PositiveInt = Field(default=128, description="Width of the fused tokens.")
    depth: PositiveInt = Field(default=4, description="Transformer blocks over all tokens together.")
    heads: Heads = 4
    mlp_ratio: MlpRatio = 4.0
    activation: MlpActivation = "relu"
    state_dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="share of training samples whose state is withheld (0 in normalised units)",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        require_divisible(self.width, self.heads)
        return self

    def build(self, spec: DataSpec, vision_width: int, language_width: int) -> JointAttention:
        """The fusion of encoders with these widths and the state of `spec`."""
        return JointAttention(self, spec, vision_width, language_width)


class JointAttention(Fusion):
    """[readout, state, language, vision] plus a type embedding, `depth` blocks, layer norm.

    The readout token is learned and starts equal for all; the state becomes one token. Where an encoder's
    width differs from `width`, a linear map adapts it. A masked token is never attended to, so what it
    holds changes nothing; removing a view or the text is masking it.

    In training the state of a share `state_dropout` of the samples is 0, so that the policy cannot live on it
    alone: where the hand is betrays where the demonstrator was heading.
    """

    def __init__(
        self, config: JointAttentionConfig, spec: DataSpec, vision_width: int, language_width: int
    ) -> None:
        super().__init__()
        width = config.width
        self.width = width
        self.state_dropout = config.state_dropout
        self.vision_adapter = _adapter(vision_width, width)
        self.language_adapter = _adapter(language_width, width)
        self.state = nn.Linear(spec.state_dim, width)
        self.readout = nn.Parameter(torch.randn(width) * 0.02)
        self.type_embedding = nn.Embedding(len(SEGMENTS), width)
        nn.init.normal_(self.type_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.activation) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, vision: Tokens, language: Tokens, state: Float[Tensor, "b s"]
    ) -> tuple[Float[Tensor, "b d"], Tokens]:
        """The readout (b, d) and the fused vision tokens (b, n, d) in the order they came in."""
        b = len(state)
        if self.training and self.state_dropout > 0:
            kept = (
                sample_whole_batch(lambda rows: torch.rand(rows, 1, device=state.device), b)
                >= self.state_dropout
            )
            state = state * kept.to(state.dtype)
        readout_type, state_type, language_type, vision_type = self.type_embedding.weight.unbind(0)
        x = torch.cat(
            [
                (self.readout + readout_type).expand(b, 1, -1),
                (self.state(state) + state_type)[:, None],
                self.language_adapter(language.values) + language_type,
                self.vision_adapter(vision.values) + vision_type,
            ],
            dim=1,
        )
        always = language.mask.new_ones(b, 2)
        mask = attention_mask(torch.cat([always, language.mask, vision.mask], dim=1))
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        first = x.shape[1] - vision.values.shape[1]
        return x[:, 0], Tokens(values=x[:, first:], mask=vision.mask)


def _adapter(width_in: int, width_out: int) -> nn.Module:
    return nn.Identity() if width_in == width_out else nn.Linear(width_in, width_out)
