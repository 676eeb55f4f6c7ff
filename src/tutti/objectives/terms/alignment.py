"""The alignment terms: pictures and instructions that belong together get similar embeddings.

`contrastive` asks which instruction of the batch belongs to a picture; `sigmoid` asks it of every pair.
"""

from __future__ import annotations

from abc import ABC
from math import log
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.distributed.ranks import gathered
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue
from tutti.objectives.terms.states import binary_entropy
from tutti.objectives.weight_schedule import Weight
from tutti.types import Batch, Features, Label, at_least_float32

MAX_SCALE = 100.0
"""The largest exp(g), as in CLIP (2103.00020): beyond it, one wrong pair outweighs a batch."""


Temperature = Annotated[
    float,
    Field(
        ge=1 / MAX_SCALE,
        le=10,
        description="What similarities are divided by at the start: exp(-g), g is learned.",
    ),
]


class EmbeddingTermConfig(BaseTermConfig, ABC):
    """What the kinds that compare vision with language have in common."""

    required: ClassVar[tuple[Label, ...]] = ("text",)

    width: PositiveInt = Field(default=128, description="Width of the embeddings that are compared.")
    temperature: Temperature


class ContrastiveConfig(EmbeddingTermConfig):
    """`kind: contrastive`."""

    kind: Literal["contrastive"] = "contrastive"
    weight: Weight = 0.1
    temperature: Temperature = 0.07

    def build(self, model: Model, name: str) -> ContrastiveTerm:
        """The term for encoders as wide as those of `model`."""
        return ContrastiveTerm(self, model.vision.width, model.language.width, name)


class EmbeddingTerm(Term):
    """What compares vision with language: a linear head for each, and a learned scale of the similarities."""

    def __init__(
        self, config: EmbeddingTermConfig, vision_width: int, language_width: int, name: str
    ) -> None:
        super().__init__(**config.arguments(name))
        self.vision_head = nn.Linear(vision_width, config.width)
        self.language_head = nn.Linear(language_width, config.width)
        self.log_scale = nn.Parameter(torch.tensor(-log(config.temperature)))

    def embedded(
        self, features: Features, batch: Batch
    ) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b w"], Bool[Tensor, "b b"], Bool[Tensor, " b"]]:
        """Vision and language embedded, of the windows of all ranks (the masked means of the tokens, through
        the heads, L2-normalised); which windows share an instruction; which have a picture and text."""
        with torch.no_grad():  # clamped in place, as CLIP does: a clamp in the graph would lose its gradient
            self.log_scale.clamp_(max=log(MAX_SCALE))
        vision = gathered(F.normalize(self.vision_head(features.vision.mean()), dim=-1))
        language = gathered(F.normalize(self.language_head(features.language.mean()), dim=-1))
        present = gathered(features.vision.mask.any(dim=1) & features.language.mask.any(dim=1))
        instruction = gathered(batch.instruction_id)
        return vision, language, instruction[:, None] == instruction[None, :], present


class ContrastiveTerm(EmbeddingTerm):
    """Multi-positive InfoNCE: windows with the same instruction are positives (after SupCon, 2004.11362).

    z_i and w_j are the masked means of the vision and language tokens, each through a linear head and
    L2-normalised.
    s_ij = exp(g) z_i . w_j;  y_ij = 1[same instruction];  q_ij = y_ij / sum_k y_ik;
    L = mean_i CE(q_i, softmax_j s_ij), averaged over both directions.

    g is learned, exp(g) <= 100. The floor of L is mean_i log(sum_j y_ij), not 0; chance is log b. Windows
    without a picture or without text take no part. Below two distinct instructions nothing can be told
    apart: the value is then 0, with zero gradient, and the metric `skipped` is 1. On several ranks the
    windows are those of all; with accumulation they are those of a micro-batch, which counts by how many take
    part.
    """

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The loss over the pairs of the batch; the metrics are listed in docs/metrics.md."""
        vision, language, same, present = self.embedded(features, batch)
        scores = at_least_float32(self.log_scale.exp() * vision @ language.T)
        return self.compared(contrast(scores, same, present, self.log_scale), takes_part)


class SigmoidConfig(EmbeddingTermConfig):
    """`kind: sigmoid`."""

    kind: Literal["sigmoid"] = "sigmoid"
    weight: Weight = 0.02
    temperature: Temperature = 0.1
    bias: Annotated[float, Field(allow_inf_nan=False)] | Literal["positive_share"] = Field(
        default="positive_share",
        description="b at the start: a number (-10 in the paper), or the logit of the share of positive "
        "pairs in the first training batch",
    )

    def build(self, model: Model, name: str) -> SigmoidTerm:
        """The term for encoders as wide as those of `model`."""
        return SigmoidTerm(self, model.vision.width, model.language.width, name)


class SigmoidTerm(EmbeddingTerm):
    """Multi-positive sigmoid loss (SigLIP, 2303.15343): no softmax, so a pair does not depend on the others.

    s_ij and y_ij as in `ContrastiveTerm`;
    L = -(1/B) sum_ij log sigmoid((2 y_ij - 1)(s_ij + b)), B the number of windows that take part.

    g and b are learned, exp(g) <= 100, neither decays. Windows without a picture or without text take no
    part. Below two distinct instructions the value is 0, with zero gradient, and the metric `skipped` is 1.
    With accumulation the pairs are those of a micro-batch, which counts by the windows that take part.
    The least value is 0. A model that knows nothing answers the share of positives, pi, and has
    B (-pi log pi - (1 - pi) log(1 - pi)), the metric `chance`: about 20 at B = 64 and pi = 0.1, where
    `contrastive` has log 64 = 4. Hence the smaller default weight.

    Differs: their pairs have one positive a row and b starts at -10, the logit of next to none. Here windows
    share instructions, so by default b starts at logit(pi) of the first training batch that counts. b is the
    sum of this start, a buffer, and of the parameter `bias`, which starts at 0; the buffer `start_known` says
    whether the start is set. Both are in the checkpoint. Until then a batch that is only evaluated uses its
    own share and stores nothing.
    """

    def __init__(self, config: SigmoidConfig, vision_width: int, language_width: int, name: str) -> None:
        super().__init__(config, vision_width, language_width, name)
        self.bias = nn.Parameter(torch.tensor(0.0))
        given = config.bias if isinstance(config.bias, float) else 0.0
        self.bias_start = nn.Buffer(torch.tensor(given))
        self.start_known = nn.Buffer(torch.tensor(isinstance(config.bias, float)))

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The loss over the pairs of the batch; metrics `chance`, `accuracy`, `temperature`, `bias` and
        `skipped`."""
        vision, language, same, present = self.embedded(features, batch)
        pairs = present[:, None] & present[None, :]
        enough = (pairs & ~same).any()
        positive = (same & pairs).to(self.bias.dtype)
        share = positive.sum() / pairs.sum().clamp(min=1)

        scores = self.log_scale.exp() * (vision @ language.T).to(self.bias.dtype)
        offset = self._start(share, enough) + self.bias
        logits = scores + offset
        losses = -F.logsigmoid(torch.where(same, logits, -logits))
        count = present.sum().clamp(min=1)
        total = torch.where(pairs, losses, torch.zeros_like(losses)).sum() / count
        value = torch.where(enough, total, torch.zeros_like(total))
        with torch.no_grad():
            metrics = {
                "chance": torch.where(enough, count * binary_entropy(share), 0.0),
                "accuracy": match_accuracy(scores, same, present),
                "temperature": (-self.log_scale).exp(),
                "bias": offset.detach(),
                "skipped": (~enough).to(self.bias.dtype),
            }
        return self.compared(TermValue(value=value, metrics=metrics), takes_part)

    @torch.no_grad()
    def _start(self, share: Float[Tensor, ""], enough: Bool[Tensor, ""]) -> Float[Tensor, ""]:
        """Where b starts; stored at the first training batch that counts. Without a branch on the flag: to
        read it, the CPU would have to wait for the device."""
        own = torch.where(enough, torch.logit(share), 0.0)
        start = torch.where(self.start_known, self.bias_start, own)
        if self.training:
            self.bias_start.copy_(start)
            self.start_known.logical_or_(enough)
        return start


def takes_part(batch: Batch) -> Bool[Tensor, " b"]:
    """The windows with a picture and with text."""
    return batch.observation.image_mask.any(dim=1) & batch.labelled(("text",))


def contrast(
    scores: Float[Tensor, "b b"],
    same: Bool[Tensor, "b b"],
    present: Bool[Tensor, " b"],
    log_scale: Float[Tensor, ""],
) -> TermValue:
    """The multi-positive InfoNCE of `scores` (vision by language) over the windows in `present`; its metrics
    have no term's name yet."""
    pairs = present[:, None] & present[None, :]
    positive = (same & pairs).to(scores.dtype)
    num_positive = positive.sum(dim=1)  # `same` is symmetric: columns have the same sums
    target = positive / num_positive.clamp(min=1)[:, None]
    count = present.sum().clamp(min=1)
    by_vision, by_language = (only(side, present[None, :]) for side in (scores, scores.T))
    cross = (target * (F.log_softmax(by_vision, dim=1) + F.log_softmax(by_language, dim=1))).sum()
    enough = (pairs & ~same).any()
    value = torch.where(enough, -cross / (2 * count), torch.zeros_like(cross))
    with torch.no_grad():
        floor = torch.where(present, num_positive.clamp(min=1).log(), 0).sum() / count
        metrics = {
            "floor": floor,
            "above_floor": torch.where(enough, value.detach() - floor, 0),
            "chance": count.to(scores.dtype).log(),
            "accuracy": match_accuracy(scores, same, present),
            "temperature": (-log_scale.detach()).exp(),
            "skipped": (~enough).to(scores.dtype),
        }
    return TermValue(value=value, metrics=metrics)


def match_accuracy(
    scores: Float[Tensor, "b b"], same: Bool[Tensor, "b b"], present: Bool[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Share of the windows in `present` whose best match among them has the same instruction, 0 to 1, the
    mean of both directions; 0 where there is none."""
    right = (same & present[:, None] & present[None, :]).to(scores.dtype)
    count = present.sum().clamp(min=1)
    hits = [
        right.gather(1, only(side, present[None, :]).argmax(dim=1, keepdim=True)).sum() / count
        for side in (scores, scores.T)
    ]
    return (hits[0] + hits[1]) / 2


def only(scores: Float[Tensor, "b c"], candidates: Bool[Tensor, "*b c"]) -> Float[Tensor, "b c"]:
    """The scores of the candidates; the others leave a softmax over them. Theirs are half the lowest number,
    which stays finite in the softmax: 0 * inf in a loss would be NaN."""
    return scores.masked_fill(~candidates, torch.finfo(scores.dtype).min / 2)
