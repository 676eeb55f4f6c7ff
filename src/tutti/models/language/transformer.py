"""The language encoder: a small text transformer, pooled to a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.masks import EVERY, Seen, readable, tell, told
from tutti.models.interfaces import LanguageEncoder
from tutti.models.language.writing import Written
from tutti.models.layers import TransformerConfig, attention_mask, join_heads, split_heads
from tutti.types import DataSpec, Tokens

Encode = Callable[[Tensor, Tensor], Tensor]


class TextTransformerConfig(TransformerConfig):
    """`kind: transformer`, trained from scratch on token ids."""

    kind: Literal["transformer"] = "transformer"
    width: PositiveInt = Field(default=128, description="Width of the text tokens.")
    depth: int = Field(default=2, ge=0, description="Transformer blocks.")
    num_tokens: int = Field(
        default=2, ge=0, description="learned queries that the text is pooled to; 0 keeps every token"
    )

    def build(self, spec: DataSpec) -> TextTransformer:
        """The encoder for texts of tokens out of `spec.vocab_size`, padded to `spec.text_length` or more."""
        return TextTransformer(self, spec)


class AttentionPooling(nn.Module):
    """`num_tokens` learned queries each read the whole text: (b, l, d) to (b, num_tokens, d)."""

    def __init__(self, width: int, heads: int, num_tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b 1 1 l"] | None
    ) -> Float[Tensor, "b n d"]:
        """Attention of the queries over x where `mask` is True."""
        key, value = split_heads(self.key_value(self.norm(x)), 2, self.heads)
        (query,) = split_heads(self.queries.expand(x.shape[0], -1, -1), 1, self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(join_heads(mixed))


class TextTransformer(LanguageEncoder):
    """Token + position embedding, masked blocks, attention pooling, layer norm.

    The windows of a batch share few instructions, so on a CPU each distinct text is encoded once and handed
    out to its windows; value and gradient are those of encoding every row. Elsewhere (GPU, compiled,
    exported) finding the distinct rows would wait for the device, so every row is encoded.

    Texts may be of any length. Places beyond `spec.text_length`, the room of the training texts, have no
    position of their own: there is nothing that they could have been learned from.
    """

    def __init__(self, config: TextTransformerConfig, spec: DataSpec) -> None:
        super().__init__()
        self.width = config.width
        self.num_tokens = config.num_tokens or spec.text_length  # at least, where it keeps every token
        self.token = nn.Embedding(spec.vocab_size, config.width)
        nn.init.normal_(self.token.weight, std=config.width**-0.5)
        self.position = nn.Parameter(torch.randn(spec.text_length, config.width) * 0.02)
        self.blocks = config.blocks()
        self.pool = (
            AttentionPooling(config.width, config.heads, config.num_tokens) if config.num_tokens else None
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, text: Int[Tensor, "b l"], text_mask: Bool[Tensor, "b l"]) -> Tokens:
        """Token ids to (b, num_tokens, width); a sample without text has all its tokens masked."""
        values = distinct_texts(self.encode, text, text_mask)
        return text_tokens(values, text_mask, pooled=self.pool is not None)

    def encode(self, text: Int[Tensor, "b l"], text_mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b n d"]:
        """Every row on its own, whether rows repeat or not."""
        # A softmax over nothing is NaN: an empty row looks at its padding, and is masked for its readers.
        mask = attention_mask(text_mask | ~text_mask.any(dim=1, keepdim=True))
        beyond = max(0, text.shape[1] - len(self.position))
        x = self.token(text) + F.pad(self.position[: text.shape[1]], (0, 0, 0, beyond))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x if self.pool is None else self.pool(x, mask))

    def require_writer(self, key: str) -> None:
        """It writes."""

    def write(
        self,
        before: Tokens,
        text: Int[Tensor, "b l"],
        text_mask: Bool[Tensor, "b l"],
        answer: Int[Tensor, "b k"],
        answer_mask: Bool[Tensor, "b k"],
    ) -> Float[Tensor, "b k c"]:
        """Its blocks and its norm once more, without the pooling: what is given is seen both ways, the answer
        causally, behind the text's positions; the embedding is the output layer."""
        room, steps = len(self.position), torch.arange(answer.shape[1], device=answer.device)
        places = text_mask.sum(dim=1, keepdim=True) + steps
        own = torch.where((places < room)[..., None], self.position[places.clamp(max=room - 1)], 0.0)
        words = self.token(text) + F.pad(
            self.position[: text.shape[1]], (0, 0, 0, max(0, text.shape[1] - room))
        )
        said = Tokens(values=self.token(answer) + own, mask=answer_mask)
        sequence = Written.of(before, Tokens(values=words, mask=text_mask), said)
        x, seen = sequence.values, sequence.seen()
        for block in self.blocks:
            x = block(x, seen)
        return self.norm(sequence.at_asked(x)) @ self.token.weight.T


def distinct_texts(encode: Encode, text: Int[Tensor, "b l"], text_mask: Bool[Tensor, "b l"]) -> Tensor:
    """`encode(text, text_mask)`, (b, n, d), where looking at the ids costs nothing each distinct row once."""
    if not readable(text):
        return encode(text, text_mask)
    rows = torch.cat([text, text_mask.to(text.dtype)], dim=1)
    distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    length = text.shape[1]
    return encode(distinct[:, :length], distinct[:, length:].bool())[inverse]


def text_tokens(values: Float[Tensor, "b n d"], text_mask: Bool[Tensor, "b l"], *, pooled: bool) -> Tokens:
    """The tokens of encoded texts: all of a text that was `pooled`, or those that it has."""
    if not pooled:
        return Tokens(values=values, mask=text_mask)
    present = text_mask.any(dim=1, keepdim=True).expand(-1, values.shape[1])
    return Tokens(values=values, mask=tell(present, EVERY if told(text_mask).each_row else Seen()))
