"""The state-contrastive term: windows whose robot states are near get embeddings that are near."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from tutti.distributed.ranks import gathered, sample_whole_batch
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue, two_layers
from tutti.objectives.terms.alignment import only
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import Batch, Features, Tokens, at_least_float32


class StateContrastiveConfig(BaseTermConfig):
    """`kind: state_contrastive`."""

    required = ("state",)

    kind: Literal["state_contrastive"] = "state_contrastive"
    share_by_default: ClassVar[Weight | None] = WeightSchedule(start=0.1, end=0.0)
    read: Literal["readout", "vision"] = Field(
        default="readout", description="what is embedded: the fused readout, or the mean of the vision tokens"
    )
    drop_one_view: bool = Field(
        default=True,
        description="with read=vision: embed each window a second time, without one of its views",
    )
    width: PositiveInt = Field(default=128, description="Width of the embeddings that are compared.")
    temperature: float = Field(default=0.2, gt=0, description="tau: what similarities are divided by")
    state_scale: float = Field(
        default=0.5, gt=0, description="beta: what distances of normalised states are divided by"
    )

    def build(self, model: Model, name: str) -> StateContrastiveTerm:
        """The term for a readout or vision tokens as those of `model`."""
        width = model.fusion.width if self.read == "readout" else model.vision.width
        return StateContrastiveTerm(self, width, name)


class StateContrastiveTerm(Term):
    """Soft contrast by proprioception (after RS-CL, 2510.01711).

    q_ij = softmax_{j != i}(-|s_i - s_j| / beta);  p_ij = softmax_{j != i}(z_i . z_j / tau);
    L = -mean_i sum_j q_ij log p_ij.

    s is the normalised state and |.| the Euclidean norm; z is the readout, or the masked mean of the vision
    tokens, through a head of two layers and L2-normalised. j runs over windows of i's embodiment: states of
    different robots have no distance. Windows without a state take no part. A window with fewer than two such
    others has nothing to tell apart and is no i; without any i the value is 0, with zero gradient, and
    `skipped` is 1. The floor is the mean entropy of q, chance the mean of log(number of others).

    With accumulation j runs over the windows of a micro-batch, which counts by its embeddings.

    `drop_one_view` (with `read: vision`): of each window with at least two views, one view drawn at random is
    dropped and the mean over the tokens that are left is a second embedding of the same state. The formula
    then runs over both sets at once, so that a window's twin is its nearest neighbour, at distance 0. The
    draw is from torch's generator, which is in the checkpoint.

    Differs: the formula is ours in its details (the paper was seen through secondary sources): both sets
    stand in one softmax, pairs stay within one embodiment, and beta, tau and the head are our choice. The
    readout has the state as its input, so reading it asks the fusion to keep the state and asks little of the
    encoders; `vision` must find the robot in the picture.
    """

    def __init__(self, config: StateContrastiveConfig, width: int, name: str) -> None:
        super().__init__(**config.arguments(name))
        self.config = config
        self.head = two_layers(width, config.width, config.width)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The loss over the pairs of the batch; metrics `floor`, `above_floor`, `chance` and `skipped`."""
        states, embodiment, known = batch.observation.state, batch.embodiment, self.rows(batch)
        if self.config.read == "readout":
            read, present = features.readout, known
        else:
            sets = [features.vision]
            if self.config.drop_one_view:
                sets.append(without_one_view(features.vision, batch.observation.image_mask))
            read = torch.cat([tokens.mean() for tokens in sets])
            present = torch.cat([tokens.mask.any(dim=1) & known for tokens in sets])
            states, embodiment = states.repeat(len(sets), 1), embodiment.repeat(len(sets))
        z = gathered(F.normalize(self.head(read), dim=-1))
        states, embodiment, present = gathered(states), gathered(embodiment), gathered(present)
        similarity = at_least_float32(z @ z.T) / self.config.temperature
        found = soft_contrast(similarity, states, embodiment, present, self.config.state_scale)
        return self.compared(found, self.num_embeddings)

    def num_embeddings(self, batch: Batch) -> Int[Tensor, " b"]:
        """How many embeddings each window has: none without a state or a picture, two where a view can be
        dropped."""
        known, num_views = self.rows(batch).long(), batch.observation.image_mask.sum(dim=1)
        most = 2 if self.config.drop_one_view else 1
        return known if self.config.read == "readout" else known * num_views.clamp(max=most)


def without_one_view(tokens: Tokens, image_mask: Bool[Tensor, "b v"]) -> Tokens:
    """The same tokens with those of one present view masked, drawn for each window by itself; where there is
    only one view, all are masked."""
    b, v = image_mask.shape
    order = sample_whole_batch(lambda rows: torch.rand(rows, v, device=image_mask.device), b)
    dropped = order.masked_fill(~image_mask, -1.0).argmax(dim=1, keepdim=True)
    kept = image_mask & (torch.arange(v, device=image_mask.device) != dropped)
    per_view = tokens.mask.shape[1] // v
    return Tokens(values=tokens.values, mask=tokens.mask & kept.repeat_interleave(per_view, dim=1))


def soft_contrast(
    similarity: Float[Tensor, "m m"],
    states: Float[Tensor, "m s"],
    embodiment: Int[Tensor, " m"],
    present: Bool[Tensor, " m"],
    state_scale: float,
) -> TermValue:
    """The cross-entropy of softmax(similarity) against the neighbourhoods of `states`; its metrics have no
    term's name yet."""
    others = ~torch.eye(len(present), dtype=torch.bool, device=present.device)
    others &= (embodiment[:, None] == embodiment[None, :]) & present[:, None] & present[None, :]
    number = others.sum(dim=1)
    rows = number >= 2
    count = rows.sum().clamp(min=1)
    others &= rows[:, None]
    with torch.no_grad():
        # Without the matrix product, whose cancellation gives near states a wrong distance.
        distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
        near = only((-distance / state_scale).to(similarity.dtype), others)
        target = torch.where(others, near.softmax(dim=1), 0.0)
        floor = torch.special.entr(target).sum() / count
        chance = torch.where(rows, number.clamp(min=1).to(floor.dtype).log(), 0.0).sum() / count
    log_share = only(similarity, others).log_softmax(dim=1)
    value = -(target * log_share).sum() / count
    metrics = {
        "floor": floor,
        "above_floor": value.detach() - floor,
        "chance": chance,
        "skipped": (~rows.any()).to(floor.dtype),
    }
    return TermValue(value=value, metrics=metrics)
