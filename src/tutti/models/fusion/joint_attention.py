"""The fusion: one transformer in which every token, whatever it comes from, attends to every other."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.masks import EVERY, tell, told
from tutti.models.fusion.states import StateFusion
from tutti.models.interfaces import Fused, Past
from tutti.models.layers import TransformerConfig, attention_mask, project
from tutti.types import DataSpec, Robots, Tokens

SEGMENTS = ("readout", "state", "language", "vision")
"""The order of the sequence; also the index of each segment's type embedding."""


class JointAttentionConfig(TransformerConfig):
    """`kind: joint_attention`."""

    kind: Literal["joint_attention"] = "joint_attention"
    width: PositiveInt = Field(default=128, description="Width of the fused tokens.")
    depth: PositiveInt = Field(default=4, description="Transformer blocks over all tokens together.")
    state_dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="share of training samples whose state is withheld (0 in normalised units)",
    )
    withhold_state: bool = Field(
        default=False,
        description="true: the state is withheld, in training and in use: a policy without proprioception",
    )

    def build(self, spec: DataSpec, vision_width: int, language_width: int) -> JointAttention:
        """The fusion of encoders with these widths and the state of `spec`."""
        return JointAttention(self, spec, vision_width, language_width)


class JointAttention(StateFusion):
    """[readout, state, language, vision] plus a type embedding, `depth` blocks, layer norm.

    With a history the states and the vision tokens of earlier moments stand behind the state; a learned
    embedding of the moment is added to them, and they are masked where the moment is not there.

    The readout token is learned and starts equal for all; the state becomes one token, and none where a state
    has no numbers or is withheld. Where an encoder's width differs from `width`, a linear map adapts it. A
    masked token is never attended to, so what it holds changes nothing; removing a view, the text or the
    state is masking it.

    In training the state of a share `state_dropout` of the samples is 0, so that the policy cannot live on it
    alone: where the hand is betrays where the demonstrator was heading.
    """

    def __init__(
        self, config: JointAttentionConfig, spec: DataSpec, vision_width: int, language_width: int
    ) -> None:
        super().__init__()
        width = config.width
        self.width = width
        self.vision_adapter, self.language_adapter = (
            nn.Identity() if given == width else nn.Linear(given, width)
            for given in (vision_width, language_width)
        )
        self.take_states(spec, dropout=config.state_dropout, withhold=config.withhold_state)
        self.prompt = None
        self.readout = nn.Parameter(torch.randn(width) * 0.02)
        self.type_embedding = nn.Embedding(len(SEGMENTS), width)
        nn.init.normal_(self.type_embedding.weight, std=0.02)
        self.blocks = config.blocks()
        self.norm = nn.LayerNorm(width)
        if moments := len(spec.history) - 1:
            self.time_embedding = nn.Parameter(torch.randn(moments, width) * 0.02)

    def forward(
        self,
        vision: Tokens,
        language: Tokens,
        state: Float[Tensor, "b s"],
        state_mask: Bool[Tensor, " b"],
        past: Past | None = None,
        *,
        robots: Robots | None = None,
    ) -> Fused:
        """The readout and the fused vision tokens.

        Raises: ValueError without `robots`, where it is told of them.
        """
        b = state.shape[0]
        state, past = self.withheld(state, past)
        readout_type, state_type, language_type, vision_type = self.type_embedding.weight.unbind(0)
        # The readout is always there, so that no softmax is over nothing where all else is absent.
        readout = self.prompted((self.readout + readout_type).expand(b, 1, -1), robots)
        first = [readout]
        present = [tell(torch.ones_like(state_mask[:, None]), EVERY)]
        if self.state is not None:
            # 0 where it is not known: a NaN in a masked token would still reach the gradient.
            known = project(self.state, torch.where(state_mask[:, None], state, 0.0), robots)
            first.append((known + state_type)[:, None])
            present.append(tell(state_mask[:, None], told(state_mask)))
        if past is not None:
            moments = self.time_embedding
            if self.state is not None:
                states = torch.where(past.state_mask[..., None], past.state, 0.0)
                first.append(project(self.state, states, robots) + state_type + moments)
                present.append(past.state_mask)
            tokens = past.vision.values.shape[1] // len(moments)
            times = moments.repeat_interleave(tokens, dim=0)
            first.append(self.vision_adapter(past.vision.values) + vision_type + times)
            present.append(past.vision.mask)
        x = torch.cat(
            [
                *first,
                self.language_adapter(language.values) + language_type,
                self.vision_adapter(vision.values) + vision_type,
            ],
            dim=1,
        )
        mask = attention_mask(*present, language.mask, vision.mask)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        # Vision stands last: counted from the end, its place does not depend on the length of the text.
        begin = x.shape[1] - vision.values.shape[1]
        return Fused(readout=x[:, 0], vision=Tokens(values=x[:, begin:], mask=vision.mask))
