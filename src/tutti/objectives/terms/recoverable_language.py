"""The recoverable-language term: classifies the instruction from the picture and the action."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.distributed.ranks import gathered
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue, two_layers
from tutti.objectives.terms.alignment import only
from tutti.types import Batch, DataNeeds, Features, at_least_float32


class RecoverableLanguageConfig(BaseTermConfig):
    """`kind: recoverable_language`."""

    kind: Literal["recoverable_language"] = "recoverable_language"
    action: Literal["data", "readout"] = Field(
        default="data",
        description="what stands for the action: the chunk of the data, or the readout that actions are "
        "decoded from (it has seen the instruction, so it can simply repeat it)",
    )
    width: PositiveInt = Field(default=128, description="Width of the embeddings that are compared.")

    def needs(self, name: str) -> DataNeeds:
        """Rows with text and, unless the readout stands for the action, actions."""
        return DataNeeds(labels=("actions", "text") if self.action == "data" else ("text",))

    def build(self, model: Model, name: str) -> RecoverableLanguageTerm:
        """The term for encoders and chunks as those of `model`."""
        return RecoverableLanguageTerm(self, model, name)


class RecoverableLanguageTerm(Term):
    """L = -mean_i [log p(l_i | v_i, a_i) - sg log p(l_i | v_i)] (LangForce, 2601.15197).

    l runs over the distinct instructions of the batch. With v and w the masked means of the vision and
    language tokens, a the masked chunk laid end to end (or the readout), f and g networks of two layers to
    width d:

    p(l | v, a) = softmax_l(f(v, a) . W w_l / sqrt(d));  p(l | v) = softmax_l(g(sg v) . U sg w_l / sqrt(d)).

    The value is what the action adds to the picture, in nats with its sign turned: 0 if nothing (the scene
    betrays the instruction, or nobody has learned anything), -log K at best with K instructions that the
    picture does not tell apart. The subtracted part has no gradient. Its head, g and U, learns from its own
    cross-entropy on detached features, which is added as CE - sg CE: gradient, but no value. So d L moves the
    model and f by the cross-entropy of p(l | v, a) alone, and no part of the model by p(l | v).

    Windows without a picture, text or (with `action: data`) actions take no part. Below two distinct
    instructions the value is 0, with zero gradient, and `skipped` is 1. With accumulation the instructions
    are those of a micro-batch, which counts by the windows that take part. The value may be negative: the
    balancings `uncertainty` and `dwa` do not fit, and `famo` needs a bound well below -log K.

    Differs: LangForce scores the instruction's tokens with a language model, from learned action queries that
    see the picture alone, and its p(l | v) is that same model's; ours has no language model, so p is over the
    instructions at hand, with two small heads. As the action we take the demonstrated one by default: it is
    the only one that cannot have copied the instruction inside the model.
    """

    def __init__(self, config: RecoverableLanguageConfig, model: Model, name: str) -> None:
        super().__init__(**config.arguments(name))
        vision, language, width = model.vision.width, model.language.width, config.width
        chunk = model.spec.horizon * model.spec.action_dim
        self.config = config
        action = chunk if config.action == "data" else model.fusion.width
        self.joint = two_layers(vision + action, width, width)
        self.joint_language = nn.Linear(language, width, bias=False)
        self.vision_only = two_layers(vision, width, width)
        self.vision_only_language = nn.Linear(language, width, bias=False)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The value and gradient above; metrics `floor`, `chance`, `cross_entropy`, `accuracy` and
        `skipped`, and of the picture alone `vision_only_cross_entropy` and `vision_only_accuracy`."""
        vision, language = features.vision.mean(), features.language.mean()
        shown = features.vision.mask.any(dim=1) & features.language.mask.any(dim=1)
        present = gathered(shown & self.rows(batch))
        candidates, answer = distinct(gathered(batch.instruction_id), present)
        enough = candidates.sum() > 1

        joint = gathered(self.joint(torch.cat([vision, self._action(features, batch)], dim=-1)))
        by_both = _log_shares(joint, gathered(self.joint_language(language)), candidates)
        alone = gathered(self.vision_only(vision.detach()))
        by_vision = _log_shares(alone, gathered(self.vision_only_language(language.detach())), candidates)

        count = present.sum().clamp(min=1)
        right, right_alone = (
            torch.where(present, found.gather(1, answer[:, None])[:, 0], 0.0).sum() / count
            for found in (by_both, by_vision)
        )
        gain = right - right_alone.detach()
        own = right_alone - right_alone.detach()
        value = torch.where(enough, -gain - own, torch.zeros_like(gain))
        with torch.no_grad():
            metrics = {
                "floor": right_alone,
                "chance": candidates.sum().clamp(min=1).to(right.dtype).log(),
                "cross_entropy": -right,
                "accuracy": _accuracy(by_both, answer, present),
                "vision_only_cross_entropy": -right_alone,
                "vision_only_accuracy": _accuracy(by_vision, answer, present),
                "skipped": (~enough).to(right.dtype),
            }
        return self.compared(TermValue(value=value, metrics=metrics), self.rows)

    def rows(self, batch: Batch) -> Bool[Tensor, " b"]:
        """The windows with a picture, with text and with what stands for the action."""
        return batch.observation.image_mask.any(dim=1) & super().rows(batch)

    def _action(self, features: Features, batch: Batch) -> Float[Tensor, "b c"]:
        """What stands for the action; masked steps of a chunk are 0."""
        if self.config.action == "readout":
            return features.readout
        kept = torch.where(batch.action_mask, batch.actions, torch.zeros_like(batch.actions))
        return kept.flatten(1).to(features.readout.dtype)


def distinct(
    instruction_id: Int[Tensor, " b"], present: Bool[Tensor, " b"]
) -> tuple[Bool[Tensor, " b"], Int[Tensor, " b"]]:
    """Which windows stand for an instruction, the first in `present` of each; and for every window the place
    of the one that stands for its own (0 where there is none)."""
    same = (instruction_id[:, None] == instruction_id[None, :]) & present[None, :]
    earlier = torch.ones_like(same).tril(-1)
    first = present & ~(same & earlier).any(dim=1)
    return first, (same & first[None, :]).to(torch.uint8).argmax(dim=1)


def _log_shares(
    guess: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], candidates: Bool[Tensor, " b"]
) -> Float[Tensor, "b b"]:
    """log softmax over the candidates' columns of guess . texts / sqrt(d)."""
    scores = at_least_float32(guess @ texts.T) / guess.shape[1] ** 0.5
    return only(scores, candidates[None, :]).log_softmax(dim=1)


def _accuracy(
    log_shares: Float[Tensor, "b b"], answer: Int[Tensor, " b"], present: Bool[Tensor, " b"]
) -> Float[Tensor, ""]:
    hits = (log_shares.argmax(dim=1) == answer) & present
    return hits.sum().to(log_shares.dtype) / present.sum().clamp(min=1)
