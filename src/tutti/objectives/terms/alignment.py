"""The alignment terms: pictures and instructions that belong together get similar embeddings.

`contrastive` asks which instruction of the batch belongs to a picture; `sigmoid` asks it of every pair.
What belongs together, `positives` says (`pair_labels.py`), and what is looked at, `pictures`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.distributed.ranks import gathered
from tutti.durations import Steps
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue
from tutti.objectives.terms.pair_labels import PairLabels, Positives, Said, retrieval
from tutti.objectives.terms.states import binary_entropy
from tutti.types import Batch, DataNeeds, Features, FutureLabel, at_least_float32

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

    required = ("text",)

    width: PositiveInt = Field(default=128, description="Width of the embeddings that are compared.")
    temperature: Temperature
    positives: Positives = Field(
        default="task",
        description="Which texts fit a picture: those of its task (where wordings are not grouped: its own "
        "text), its own text alone, or soft: texts by how much they share of its words.",
    )
    pictures: Literal["now", "change", "goal"] = Field(
        default="now",
        description="What is compared with the text: the present pictures, what changes until `offset` "
        "actions later, or the episode's last pictures. The latter two cost a second look.",
    )
    offset: Steps = Field(
        default=4,
        description='k of `pictures: change`: how many actions later the pictures lie, or how long: "0.4s".',
    )

    def needs(self, name: str) -> DataNeeds:
        """Text, and the later pictures that are looked at, if any."""
        later: dict[str, tuple[FutureLabel, ...]] = {"change": (self.offset,), "goal": ("last",)}
        return DataNeeds(futures=later.get(self.pictures, ()), labels=self.required)


class ContrastiveConfig(EmbeddingTermConfig):
    """`kind: contrastive`."""

    kind: Literal["contrastive"] = "contrastive"
    temperature: Temperature = 0.07

    def build(self, model: Model, name: str) -> ContrastiveTerm:
        """The term for encoders as wide as those of `model`."""
        return ContrastiveTerm(self, model.vision.width, model.language.width, name)


class EmbeddingTerm(Term):
    """What compares vision with language: a linear head for each, and a learned scale of the similarities.

    z_i = head(x_i) / |head(x_i)|, and x_i by `pictures`, f_t the masked mean of the vision tokens at t:

    now     x = f_t
    change  x = f_{t+k} - f_t, both over the tokens of views that are there at both times
    goal    x = f_last, the episode's last pictures

    The later pictures go through the model's own vision encoder, with gradient unless `stop_gradient` names
    vision: one more forward and backward pass of it a batch. Windows whose later pictures are masked take no
    part.
    """

    def __init__(
        self, config: EmbeddingTermConfig, vision_width: int, language_width: int, name: str
    ) -> None:
        super().__init__(**config.arguments(name))
        self.positives: Positives = config.positives
        self.pictures = config.pictures
        self.vision_head = nn.Linear(vision_width, config.width)
        self.language_head = nn.Linear(language_width, config.width)
        self.log_scale = nn.Parameter(torch.tensor(-log(config.temperature)))

    def embedded(
        self, features: Features, batch: Batch, model: Model
    ) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b w"], PairLabels, dict[str, Tensor]]:
        """Vision and language embedded, of the windows of all ranks (the masked means of the tokens, through
        the heads, L2-normalised); the labels of their pairs; and on held-out data the rows for `joined`."""
        with torch.no_grad():  # clamped in place, as CLIP does: a clamp in the graph would lose its gradient
            self.log_scale.clamp_(max=log(MAX_SCALE))
        seen, shown = self.look(features, batch, model)
        vision = gathered(F.normalize(self.vision_head(seen), dim=-1))
        language = gathered(F.normalize(self.language_head(features.language.mean()), dim=-1))
        present = gathered(shown & features.language.mask.any(dim=1))
        dtype = at_least_float32(vision).dtype
        with torch.no_grad():
            said = Said.of(batch, self.positives, dtype)
            labels = PairLabels.of(self.positives, said, present, dtype)
        rows = {"vision": vision, "language": language, "present": present}
        rows |= {"instruction": said.instruction, "task": said.task}
        rows |= {} if said.pieces is None else {"pieces": said.pieces}
        return vision, language, labels, {} if self.training else rows

    def look(
        self, features: Features, batch: Batch, model: Model
    ) -> tuple[Float[Tensor, "b d"], Bool[Tensor, " b"]]:
        """x, and which windows have one."""
        now = features.vision
        if self.pictures == "now":
            return now.mean(), now.mask.any(dim=1)
        (label,) = self.needed.futures
        later = self.encode_later(self.future(batch, label), model)
        if self.pictures == "goal":
            return later.mean(), later.mask.any(dim=1)
        both = now.mask & later.mask
        return replace(later, mask=both).mean() - replace(now, mask=both).mean(), both.any(dim=1)

    def rows(self, batch: Batch) -> Bool[Tensor, " b"]:
        """The windows with the pictures that are looked at and with text."""
        shown = batch.observation.image_mask
        for label in self.needed.futures:
            later = self.future(batch, label)
            there = later.observation.image_mask & later.mask[:, None]
            shown = there if self.pictures == "goal" else shown & there
        return shown.any(dim=1) & batch.labelled(self.needed.labels)

    def joined(self, per_window: Mapping[str, Tensor]) -> dict[str, float]:
        """`retrieval`, its ceiling and its chance over all held-out windows."""
        return retrieval(per_window, self.positives)


class ContrastiveTerm(EmbeddingTerm):
    """Multi-positive InfoNCE: windows whose text fits are positives (after SupCon, 2004.11362).

    z_i and w_j are the embeddings of the pictures (`EmbeddingTerm`) and of the masked mean of the language
    tokens, each through a linear head and L2-normalised.
    s_ij = exp(g) z_i . w_j;  u_ij in [0, 1] by `positives`;  q_ij = u_ij / sum_k u_ik;
    L = mean_i CE(q_i, softmax_j s_ij), averaged over both directions.

    task         u_ij = 1[same task]: wordings of one task are positives of each other
    instruction  u_ij = 1[same normalised text]
    soft         u_ij = cos(c_i, c_j)^4, 1 for the same text; c counts a text's tokens and pairs of
                 neighbouring tokens. Near in words is not near in meaning: of a token a word, "open the
                 drawer" and "close the drawer" have u = 0.13

    g is learned, exp(g) <= 100. The metric `floor` is the least value that any scores have, the mean entropy
    of q_i (mean_i log sum_j u_ij if u is 0 or 1), not 0; `reachable` the least for scores that do not tell
    the pictures of one task apart, as pictures cannot: with P_ij = 1[same task] / size of the task

    reachable = 1/2 mean_i [CE(q_i, (P q)_i) + CE(q_i, (q P)_i)],

    for `instruction` mean_i log(size of the task), for `task` the floor, so it is not recorded. Chance is
    log b. Windows without a picture or without text take no part. Below two distinct tasks (instructions)
    nothing can be told apart: the value is then 0, with zero gradient, and the metric `skipped` is 1. On
    several ranks the windows are those of all; with accumulation they are those of a micro-batch, which
    counts by how many take part.
    """

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The loss over the pairs of the batch; the metrics are listed in docs/reference/metrics.md."""
        vision, language, labels, rows = self.embedded(features, batch, model)
        scores = at_least_float32(self.log_scale.exp() * vision @ language.T)
        return self.compared(replace(contrast(scores, labels, self.log_scale), per_window=rows), self.rows)


class SigmoidConfig(EmbeddingTermConfig):
    """`kind: sigmoid`."""

    kind: Literal["sigmoid"] = "sigmoid"
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

    s_ij and u_ij as in `ContrastiveTerm`, B the number of windows that take part;
    L = -(1/B) sum_ij [u_ij log sigmoid(s_ij + b) + (1 - u_ij) log sigmoid(-s_ij - b)],
    for u of 0 and 1 that is -(1/B) sum_ij log sigmoid((2 u_ij - 1)(s_ij + b)).

    g and b are learned, exp(g) <= 100, neither decays. Windows without a picture or without text take no
    part. Below two distinct tasks (instructions) the value is 0, with zero gradient, and the metric `skipped`
    is 1. With accumulation the pairs are those of a micro-batch, which counts by the windows that take part.
    The least value is 0, for `soft` (1/B) sum_ij H(u_ij), the metric `floor`; `reachable`, as there, is
    (1/B) sum_ij H((P u)_ij), with H(u) = -u log u - (1 - u) log(1 - u). A model that knows nothing
    answers the share of positives, pi, and has B H(pi), the metric `chance`: about 20 at B = 64 and pi = 0.1,
    where `contrastive` has log 64 = 4.

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
        """The loss over the pairs of the batch; the metrics are listed in docs/reference/metrics.md."""
        vision, language, labels, rows = self.embedded(features, batch, model)
        pairs, enough, count = labels.pairs, labels.enough, labels.count
        fits = labels.fits.to(self.bias.dtype)
        share = fits.sum() / pairs.sum().clamp(min=1)

        scores = self.log_scale.exp() * (vision @ language.T).to(self.bias.dtype)
        offset = self._start(share, enough) + self.bias
        logits = scores + offset
        losses = -(fits * F.logsigmoid(logits) + (1 - fits) * F.logsigmoid(-logits))
        total = torch.where(pairs, losses, torch.zeros_like(losses)).sum() / count
        value = torch.where(enough, total, torch.zeros_like(total))
        with torch.no_grad():
            floor = binary_entropy(fits).sum() / count
            metrics = {
                "floor": floor,
                "above_floor": torch.where(enough, value.detach() - floor, 0),
                "chance": torch.where(enough, count * binary_entropy(share), 0.0),
                "accuracy": match_accuracy(scores, fits, labels.present),
                "temperature": (-self.log_scale).exp(),
                "bias": offset.detach(),
                "skipped": (~enough).to(self.bias.dtype),
            }
            if self.positives != "task":
                metrics["reachable"] = binary_entropy(labels.by_task(fits)).sum() / count
        return self.compared(TermValue(value=value, metrics=metrics, per_window=rows), self.rows)

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


def contrast(scores: Float[Tensor, "b b"], labels: PairLabels, log_scale: Float[Tensor, ""]) -> TermValue:
    """The multi-positive InfoNCE of `scores` (vision by language) over the windows that take part; its
    metrics have no term's name yet."""
    present, fits, count, enough = labels.present, labels.fits, labels.count, labels.enough
    weight = fits.sum(dim=1).clamp(min=1)  # u is symmetric: columns have the same sums
    target = fits / weight[:, None]
    by_vision, by_language = (only(side, present[None, :]) for side in (scores, scores.T))
    cross = (target * (F.log_softmax(by_vision, dim=1) + F.log_softmax(by_language, dim=1))).sum()
    value = torch.where(enough, -cross / (2 * count), torch.zeros_like(cross))
    with torch.no_grad():
        entropy = weight.log() + torch.special.entr(fits).sum(dim=1) / weight
        floor = torch.where(present, entropy, 0).sum() / count
        metrics = {
            "floor": floor,
            "above_floor": torch.where(enough, value.detach() - floor, 0),
            "chance": count.to(scores.dtype).log(),
            "accuracy": match_accuracy(scores, fits, present),
            "temperature": (-log_scale.detach()).exp(),
            "skipped": (~enough).to(scores.dtype),
        }
        if labels.positives != "task":
            told = sum(torch.xlogy(side, labels.by_task(side)).sum() for side in (target, target.T))
            metrics["reachable"] = -told / (2 * count)
    return TermValue(value=value, metrics=metrics)


def match_accuracy(
    scores: Float[Tensor, "b b"], fits: Float[Tensor, "b b"], present: Bool[Tensor, " b"]
) -> Float[Tensor, ""]:
    """How well the best match of the windows in `present` fits on average, the mean of both directions: the
    share of right matches where a pair fits or not; 0 where there is none."""
    count = present.sum().clamp(min=1)
    hits = [
        fits.gather(1, only(side, present[None, :]).argmax(dim=1, keepdim=True)).sum() / count
        for side in (scores, scores.T)
    ]
    return (hits[0] + hits[1]) / 2


def only(scores: Float[Tensor, "b c"], candidates: Bool[Tensor, "*b c"]) -> Float[Tensor, "b c"]:
    """The scores of the candidates; the others leave a softmax over them. Theirs are half the lowest number,
    which stays finite in the softmax: 0 * inf in a loss would be NaN."""
    return scores.masked_fill(~candidates, torch.finfo(scores.dtype).min / 2)
