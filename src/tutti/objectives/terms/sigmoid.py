"""The sigmoid alignment term: every pair of a picture and an instruction is a yes-or-no question."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from tutti.objectives.term import Model, TermValue
from tutti.objectives.terms.contrastive import (
    EmbeddingTerm,
    EmbeddingTermConfig,
    Temperature,
    match_accuracy,
    takes_part,
)
from tutti.objectives.terms.progress import binary_entropy
from tutti.objectives.weight_schedule import Weight
from tutti.types import Batch, Features

POSITIVE_SHARE = "positive_share"


class SigmoidConfig(EmbeddingTermConfig):
    """`kind: sigmoid`."""

    kind: Literal["sigmoid"] = "sigmoid"
    weight: Weight = 0.02
    temperature: Temperature = 0.1
    bias: Annotated[float, Field(allow_inf_nan=False)] | Literal["positive_share"] = Field(
        default=POSITIVE_SHARE,
        description="b at the start: a number (-10 in the paper), or the logit of the share of positive "
        "pairs in the first training batch",
    )

    def build(self, model: Model, name: str) -> SigmoidTerm:
        """The term for encoders as wide as those of `model`."""
        return SigmoidTerm(self, model.vision.width, model.language.width, name=name)


class SigmoidTerm(EmbeddingTerm):
    """Multi-positive sigmoid loss (SigLIP, 2303.15343): no softmax, so a pair does not depend on the others.

    z_i and w_j are the masked means of the vision and language tokens, each through a linear head and
    L2-normalised.
    s_ij = exp(g) z_i . w_j;  y_ij = 1[same instruction];
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

    bias_start: Tensor
    start_known: Tensor

    def __init__(
        self,
        config: SigmoidConfig,
        vision_width: int,
        language_width: int,
        *,
        name: str = "align",
    ) -> None:
        super().__init__(config, vision_width, language_width, name=name)
        self.bias = nn.Parameter(torch.tensor(0.0))
        given = config.bias if isinstance(config.bias, float) else 0.0
        self.register_buffer("bias_start", torch.tensor(given))
        self.register_buffer("start_known", torch.tensor(isinstance(config.bias, float)))

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
