"""What a language encoder reads while it writes an answer: a prefix, the instruction, the answer so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tutti.types import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One sequence a row, without holes: what is masked stands at its end, where no causal model meets it.

    `given` tokens of each row may be seen both ways, those behind them are the answer. Token i of the answer
    is to be predicted at the place `asked[i]`, where the token before it stands.
    """

    values: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    given: Int[Tensor, " b"]
    asked: Int[Tensor, "b k"]

    @classmethod
    def of(cls, before: Tokens, text: Tokens, answer: Tokens) -> Written:
        """Of embedded tokens; the first of `before` is there in every row."""
        mask = torch.cat([before.mask, text.mask, answer.mask], dim=1)
        values = torch.cat([before.values, text.values, answer.values], dim=1)
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        given = before.mask.sum(dim=1) + text.mask.sum(dim=1)
        last = mask.shape[1] - 1
        steps = torch.arange(answer.mask.shape[1], device=mask.device)
        return cls(
            values=values.gather(1, order[..., None].expand_as(values)),
            mask=mask.gather(1, order),
            given=given,
            asked=(given[:, None] + steps - 1).clamp(max=last),
        )

    def seen(self) -> Bool[Tensor, "b 1 n n"]:
        """Which token (last axis) each may look at: what is given, and of the answer what stands before."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        before = places[None, None] <= torch.maximum(places[None, :, None], self.given[:, None, None] - 1)
        return (before & self.mask[:, None])[:, None]

    def at_asked(self, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"]:
        """The rows of the hidden states that the answer is predicted from."""
        return hidden.gather(1, self.asked[..., None].expand(-1, -1, hidden.shape[2]))
