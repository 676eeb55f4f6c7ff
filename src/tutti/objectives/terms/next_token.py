"""The next-token term: the language encoder writes the answer about the picture, token by token."""

from __future__ import annotations

from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from tutti.masks import readable
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue
from tutti.types import Batch, Features, Tokens, UserError, at_least_float32


class NextTokenConfig(BaseTermConfig):
    """`kind: next_token`."""

    required = ("answer",)

    kind: Literal["next_token"] = "next_token"
    read: Literal["fused", "vision"] = Field(
        default="fused",
        description="What stands for the picture: the vision tokens behind the fusion, or before it.",
    )

    def build(self, model: Model, name: str) -> NextTokenTerm:
        """The term for the language encoder of `model`. Raises UserError if that writes no text."""
        return NextTokenTerm(self, model, name)


class NextTokenTerm(Term):
    """L = -sum m log p(w_i | w_<i, instruction, picture) / sum m, in nats, over all tokens of all answers.

    w_i are the tokens of the answer (`sources.answer`: a caption, the answer to a question) and the one that
    ends it, m its mask; rows without an answer do not count. p is that of the model's own language encoder
    with its embedding, or the output layer that it has besides, as the last matrix: it reads the vision
    tokens, brought to its width by a linear map that this term owns, then the instruction, then the answer
    up to w_{i-1}. A pre-trained decoder (Llama, Gemma, Qwen) sees everything causally, as it was trained;
    Tutti's own encoder sees picture and instruction both ways and the answer causally, by one set of weights
    (UniLM, 1905.03197).

    The answer is in no other sequence: neither readout nor fused tokens know it, so none of it leaks into
    the actions, and at the robot, where there is none, everything is as in training. The gradient reaches
    vision, fusion and language; through a frozen decoder it reaches the others all the same (Frozen,
    2106.13884). `stop_gradient: [language]` keeps it from the language encoder alone, [fused] from the
    fusion, also where that is the decoder which writes, a VLM's.

    Source: picture prefixes of a language model as LLaVA (2304.08485); beside actions in one training as RT-2
    (2307.15818) and pi0.5 (2504.16054). Differs: these have one sequence for actions and answers; here it is
    a second pass of the language encoder, in the same update.
    """

    def __init__(self, config: NextTokenConfig, model: Model, name: str) -> None:
        super().__init__(**config.arguments(name))
        model.language.require_writer(f"objective.{name}")
        self.config = config
        width = model.fusion.width if config.read == "fused" else model.vision.width
        self.prefix = nn.Linear(width, model.language.width)
        # So that the first word has a token before it, where there is neither picture nor instruction.
        self.begin = nn.Parameter(torch.randn(model.language.width) * 0.02)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The value; metrics `accuracy`, the share of tokens that were the likeliest, and `chance`, the value
        of one who knows nothing, log V; in evaluation mode `picture_gain`, by how much the value would rise
        without the picture."""
        _, mask = self.answer(batch)
        seen = features.fused_vision if self.config.read == "fused" else features.vision
        errors, right = self._errors(seen, batch, model)
        value = self.masked_mean(errors, mask, self.mask)
        with torch.no_grad():
            metrics = {
                f"{self.name}/accuracy": self.masked_mean(right, mask, self.mask),
                f"{self.name}/chance": value.new_full((), log(model.spec.vocab_size)),
            }
            if not self.training:
                dark = Tokens(values=seen.values, mask=torch.zeros_like(seen.mask))
                blind = self.masked_mean(self._errors(dark, batch, model)[0], mask, self.mask)
                metrics[f"{self.name}/picture_gain"] = blind - value.detach()
        return TermValue(value=value, metrics=metrics)

    def answer(self, batch: Batch) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"]]:
        """The answers and m. Raises: UserError if the batch was made without them."""
        if batch.answer is None or batch.answer_mask is None:
            raise UserError(
                f"objective.{self.name} needs answers, but the batch holds none; build the data with "
                "config.objective.needs(), and name their column by data.sources.answer."
            )
        return batch.answer, batch.answer_mask

    def mask(self, batch: Batch) -> Bool[Tensor, "b k"]:
        """m, by the batch."""
        return self.answer(batch)[1]

    def _errors(
        self, seen: Tokens, batch: Batch, model: Model
    ) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """-log p of each token, and 1 where it was the likeliest; anything finite where there is none."""
        (answer, mask), observation = self.answer(batch), batch.observation
        # Where a look costs nothing, rows without an answer are not computed; but one, which does not count,
        # where there is none: networks of others take no batch of 0 rows.
        rows = None
        if readable(mask):
            rows = mask.any(dim=1).nonzero()[:, 0]
            rows = rows if len(rows) else rows.new_zeros(1)

        def picked(part: Tensor) -> Tensor:
            return part if rows is None else part[rows]

        tokens, ids = seen.apply(picked), picked(answer)
        picture = self.prefix(tokens.values.masked_fill(~tokens.mask[..., None], 0))
        first = self.begin.to(picture.dtype).expand(len(picture), 1, -1)
        prefix = Tokens(
            values=torch.cat([first, picture], dim=1), mask=F.pad(tokens.mask, (1, 0), value=True)
        )
        given = (observation.text, observation.text_mask, answer, mask)
        with model.language.held(self.stop_gradient):
            logits = at_least_float32(model.language.write(prefix, *map(picked, given)))
        errors = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        right = (logits.detach().argmax(dim=-1) == ids).to(errors.dtype)
        if rows is None:
            return errors, right
        whole = errors.new_zeros(answer.shape)
        return whole.index_put((rows,), errors), whole.index_put((rows,), right)
