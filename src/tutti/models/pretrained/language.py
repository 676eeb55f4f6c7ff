"""A pre-trained text tower as the language encoder: its own tokens' hidden states, or a few pooled ones."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.masks import readable
from tutti.models.interfaces import LanguageEncoder
from tutti.models.language.transformer import AttentionPooling, distinct_texts, text_tokens
from tutti.models.language.writing import Written
from tutti.models.layers import attention_mask
from tutti.models.pretrained.config import TextsConfig, TowerConfig
from tutti.models.pretrained.facts import OUTPUT, Socket
from tutti.models.pretrained.networks import output_of
from tutti.models.pretrained.remembered import Remembered
from tutti.models.pretrained.tower import Tower, projection
from tutti.types import DataSpec, Tokens, UserError

WIDTHS = ("hidden_size", "d_model", "dim")
"""What configs call the width."""


class PretrainedTextConfig(TowerConfig, TextsConfig):
    """`kind: pretrained`, a text tower that others have trained, with its own tokenizer."""

    socket: ClassVar[Socket] = "language"

    kind: Literal["pretrained"]
    num_tokens: int = Field(
        default=4, ge=0, description="learned queries that the text is pooled to; 0 keeps every token"
    )
    heads: PositiveInt = Field(default=4, description="Attention heads of the pooling.")

    def build(self, spec: DataSpec) -> PretrainedText:
        """The encoder for texts of the tower's tokens, random until its tower is loaded.

        Raises: UserError if the tower cannot be built, or has no rows for all tokens.
        """
        return PretrainedText(self, spec)


class PretrainedText(LanguageEncoder):
    """The tower's hidden states; with `num_tokens` learned queries read them (then layer norm).

    As `TextTransformer` it encodes each distinct text once on a CPU. A text of no tokens is masked.
    """

    def __init__(self, config: PretrainedTextConfig, spec: DataSpec) -> None:
        super().__init__()
        self.tower, self.remembered = Tower(config), Remembered(config.remember)
        rows: int = self.tower.network.get_input_embeddings().weight.shape[0]  # pyright: ignore
        # Not that of the embeddings: ELECTRA's are narrower than its hidden states.
        self.width = int(next(self.tower.values[key] for key in WIDTHS if key in self.tower.values))
        if spec.vocab_size > rows:
            raise UserError(
                f"model.language: the tokenizer of {config.path} has {spec.vocab_size:,} tokens, its tower "
                f"embeds {rows:,}.\n  cure: put the tokenizer.json of this very tower beside its config.json"
            )
        self.num_tokens = config.num_tokens or spec.text_length  # at least, where it keeps every token
        self.project, self.whole = projection(config, self.width), config.layer == -1
        self.pool = self.norm = None
        if config.num_tokens:
            if self.width % config.heads:
                raise UserError(
                    f"model.language.heads is {config.heads}, which does not divide the tower's width "
                    f"{self.width}. Choose a number that does."
                )
            self.pool = AttentionPooling(self.width, config.heads, config.num_tokens)
            self.norm = nn.LayerNorm(self.width)

    def forward(self, text: Int[Tensor, "b l"], text_mask: Bool[Tensor, "b l"]) -> Tokens:
        """Token ids to (b, num_tokens, width); a sample without text has all its tokens masked."""
        values = distinct_texts(self.encode, text, text_mask)
        return text_tokens(values, text_mask, pooled=self.pool is not None)

    def encode(self, text: Int[Tensor, "b l"], text_mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b n d"]:
        """Every row on its own, whether rows repeat or not."""
        # A softmax over nothing is NaN: an empty row looks at its padding, and is masked for its readers.
        seen = text_mask | ~text_mask.any(dim=1, keepdim=True)
        with torch.no_grad() if self.tower.still else nullcontext():
            x = self._hidden(text, seen)
        x = x if self.project is None else self.project(x)
        return x if self.pool is None or self.norm is None else self.norm(self.pool(x, attention_mask(seen)))

    def _hidden(self, text: Int[Tensor, "b l"], seen: Bool[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """The tower's states; of remembered texts, each without its padding, whose states are then 0."""

        def compute(ids: Tensor, mask: Tensor) -> Tensor:
            return self.tower.hidden(input_ids=ids, attention_mask=mask.long(), **self._named())

        def alone(ids: Tensor) -> Tensor:
            return compute(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0]

        if not self.remembered.memory or not readable(text):
            return compute(text, seen)
        self.remembered.forget_others(self.tower.filled)
        rows = [ids[mask] for ids, mask in zip(text, seen, strict=True)]
        known = torch.cat([self.remembered.text(ids, partial(alone, ids)) for ids in rows])
        states = known.new_zeros(*text.shape, known.shape[-1])
        states[seen] = known
        return states

    def require_writer(self, key: str) -> None:
        """Raises: UserError unless it is a whole decoder, with its output layer."""
        tower = self.tower
        wrong = "is no decoder"
        if tower.facts.tail == "norm":
            apart = not tower.values.get("tie_word_embeddings") and OUTPUT not in tower.network._modules
            wrong = "has an output layer of its own" if apart else ""
            wrong = "is cut behind an earlier layer" if not self.whole else wrong
        if wrong:
            raise UserError(
                f"{key} lets the language encoder write, but the {tower.values['model_type']} of "
                f"{tower.config.path} {wrong}.\n  expected: layer -1 of a pre-trained decoder, of Llama and "
                "larger Qwen with model.language.output_layer=true, or model.language.kind=transformer"
            )

    def write(
        self,
        before: Tokens,
        text: Int[Tensor, "b l"],
        text_mask: Bool[Tensor, "b l"],
        answer: Int[Tensor, "b k"],
        answer_mask: Bool[Tensor, "b k"],
    ) -> Float[Tensor, "b k c"]:
        """The tower as it was trained, causally, on one sequence of all; a gradient passes it where it is
        frozen."""
        embed = self.tower.network.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        said = Tokens(values=embed(answer), mask=answer_mask)
        sequence = Written.of(before, Tokens(values=embed(text), mask=text_mask), said)
        hidden = self.tower.hidden(
            inputs_embeds=sequence.values, attention_mask=sequence.mask.long(), **self._named()
        )
        logits = sequence.at_asked(hidden) @ output_of(self.tower.network, embed).T
        cap = self.tower.values.get("final_logit_softcapping")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _named(self) -> dict[str, bool]:
        return {"use_cache": False} if self.tower.facts.tail == "norm" else {}
