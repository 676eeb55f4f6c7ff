"""Which text fits which picture, by the instructions and tasks of the windows; and what these labels allow.

A picture tells its task at best, never which of the task's wordings the episode was given. So what is
reachable is what one answer for all pictures of a task gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tutti.distributed.ranks import gathered
from tutti.precision import exact_product
from tutti.types import Batch, Movable

Positives = Literal["task", "instruction", "soft"]
BUCKETS = 4096
"""Places that a text's pieces are hashed to: sentences of 20 pieces hardly ever share one by chance."""
POWER = 4
"""Of the similarity of two texts: sentences that share no more than a "the" or a noun must hardly count."""
MOST_WINDOWS = 4096
"""Held-out windows that are compared at once: a table of 64 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said(Movable):
    """What each window was told: the numbers of its instruction and of its task, and for `soft` positives the
    pieces of the text (`text_pieces`)."""

    instruction: Int[Tensor, " b"]
    task: Int[Tensor, " b"]
    pieces: Float[Tensor, "b k"] | None = None

    @classmethod
    def of(cls, batch: Batch, positives: Positives, dtype: torch.dtype) -> Self:
        """What the windows of all ranks were told."""
        seen = batch.observation
        pieces = text_pieces(seen.text, seen.text_mask, dtype) if positives == "soft" else None
        return cls(instruction=batch.instruction_id, task=batch.tasks, pieces=pieces).apply(gathered)


def text_pieces(
    text: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"], dtype: torch.dtype
) -> Float[Tensor, "b k"]:
    """How often each token and each pair of neighbouring tokens stands in a text, hashed to `BUCKETS` places
    and of unit length: the product of two of them is the cosine of the texts' counts."""
    pairs = mask[:, 1:] & mask[:, :-1]
    hashed = text[:, :-1] * 1_000_003 + text[:, 1:] * 10_007 + 1
    places = torch.cat([text, hashed], dim=1) % BUCKETS
    counts = torch.zeros(len(text), BUCKETS, dtype=dtype, device=text.device)
    return F.normalize(counts.scatter_add(1, places, torch.cat([mask, pairs], dim=1).to(dtype)), dim=1)


def fit(positives: Positives, pictures: Said, texts: Said, dtype: torch.dtype) -> Float[Tensor, "b c"]:
    """u_ij, how well text j fits the picture of window i, 0 to 1: 1[same task], 1[same instruction], or for
    `soft` the texts' cos^4 (`text_pieces`), which is 1 for the same instruction."""
    if positives == "task":
        return (pictures.task[:, None] == texts.task[None, :]).to(dtype)
    same = pictures.instruction[:, None] == texts.instruction[None, :]
    if pictures.pieces is None or texts.pieces is None:
        return same.to(dtype)
    near = exact_product(pictures.pieces, texts.pieces.T).clamp(max=1) ** POWER
    return torch.where(same, torch.ones_like(near), near).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLabels:
    """The labels of all pairs of windows, picture by text. What takes no part is 0 or False everywhere.

    `enough`: two windows are of different tasks (`instruction`: instructions), else nothing can be learned.
    """

    positives: Positives
    fits: Float[Tensor, "b b"]
    same_task: Bool[Tensor, "b b"]
    present: Bool[Tensor, " b"]
    enough: Bool[Tensor, ""]

    @classmethod
    def of(
        cls, positives: Positives, said: Said, present: Bool[Tensor, " b"], dtype: torch.dtype
    ) -> PairLabels:
        """The labels of windows that were told this, of which those in `present` take part."""
        pairs = present[:, None] & present[None, :]
        known = said.instruction if positives == "instruction" else said.task
        return cls(
            positives=positives,
            fits=fit(positives, said, said, dtype) * pairs,
            same_task=(said.task[:, None] == said.task[None, :]) & pairs,
            present=present,
            enough=(pairs & (known[:, None] != known[None, :])).any(),
        )

    @property
    def pairs(self) -> Bool[Tensor, "b b"]:
        """Both windows take part."""
        return self.present[:, None] & self.present[None, :]

    @property
    def count(self) -> Int[Tensor, ""]:
        """How many windows take part, at least 1."""
        return self.present.sum().clamp(min=1)

    def by_task(self, x: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
        """Each row the mean of the rows of its task: all that a picture can tell of it."""
        share = self.same_task.to(x.dtype)
        return exact_product(share, x) / share.sum(dim=1, keepdim=True).clamp(min=1)


def retrieval(rows: Mapping[str, Tensor], positives: Positives) -> dict[str, float]:
    """Each picture's best text among all that were said, over the windows at hand: `retrieval`, the mean fit
    u of what was chosen (a share of hits, but for `soft`); `retrieval_ceiling`, what a perfect recogniser of
    tasks reaches, which answers a task's pictures by the text that fits most of them; `retrieval_chance`,
    what the best single text for all pictures does. None of them below two tasks.

    `rows` are the embeddings `vision` and `language` and the fields of `Said`. At most the first
    `MOST_WINDOWS` count.
    """
    kept = {name: value[rows["present"]][:MOST_WINDOWS] for name, value in rows.items()}
    said = Said(instruction=kept["instruction"], task=kept["task"], pieces=kept.get("pieces"))
    tasks, task = said.task.unique(return_inverse=True)
    if len(tasks) < 2:
        return {}
    numbers, place = said.instruction.unique(return_inverse=True)
    first = torch.full_like(numbers, len(place)).scatter_reduce(0, place, torch.arange(len(place)), "amin")
    fits = fit(positives, said, said.apply(lambda value: value[first]), torch.float64)
    best = (kept["vision"].double() @ kept["language"][first].double().T).argmax(dim=1)
    by_task = torch.zeros(len(tasks), len(first), dtype=fits.dtype).index_add(0, task, fits)
    return {
        "retrieval": float(fits.gather(1, best[:, None]).mean()),
        "retrieval_ceiling": float(by_task.amax(dim=1).sum() / len(fits)),
        "retrieval_chance": float(fits.mean(dim=0).amax()),
    }
