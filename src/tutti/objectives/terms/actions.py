"""The terms whose target is the actions: the model's own decoder, and inverse dynamics."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.durations import Steps
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue, require_in_chunk, two_layers
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import Batch, DataNeeds, Features, Tokens, masked_mean


class ChunkConfig(BaseTermConfig):
    """`kind: chunk`."""

    required = ("actions",)

    kind: Literal["chunk"] = "chunk"
    share_by_default: ClassVar[Weight | None] = None

    def build(self, model: Model, name: str) -> ChunkTerm:
        """The term for the decoder of `model`."""
        return ChunkTerm(**self.arguments(name))


class ChunkTerm(Term):
    """sum m e / sum m, e the decoder's error of each action: for the regression decoder e = |a^ - a|.

    The decoder belongs to the model, because the robot needs it.
    """

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The masked mean of the decoder's error. Metrics, in evaluation mode only because a generative
        decoder samples for them: `first_l1`, the masked mean |a^_0 - a_0| of the first predicted action, and
        `chunk_l1`, that of the chunk, which compare decoders whose errors are of different kinds."""
        value = self.masked_mean(model.action(features, batch), batch.action_mask, _actions)
        if self.training:
            return TermValue(value=value, metrics={})
        with torch.no_grad():
            error = (model.action.predict(features) - batch.actions).abs()
            metrics = {
                f"{self.name}/first_l1": masked_mean(error[:, 0], batch.action_mask[:, 0]),
                f"{self.name}/chunk_l1": masked_mean(error, batch.action_mask),
            }
        return TermValue(value=value, metrics=metrics)


def _actions(batch: Batch) -> Bool[Tensor, "b t a"]:
    return batch.action_mask


class InverseDynamicsConfig(BaseTermConfig):
    """`kind: inverse_dynamics`."""

    required = ("actions",)

    kind: Literal["inverse_dynamics"] = "inverse_dynamics"
    share_by_default: ClassVar[Weight | None] = WeightSchedule(start=0.1, end=0.0)
    offset: Steps = Field(
        default=4, description='k: how many actions later the second picture lies, or how long: "0.4s".'
    )
    stop_future: bool = Field(
        default=False, description="the look at the later picture sends no gradient; cheaper by its backward"
    )
    channels: PositiveInt = Field(
        default=16, description="Features kept of each image patch of both pictures."
    )
    hidden: PositiveInt = Field(default=256, description="width of the head's hidden layer")

    def needs(self, name: str) -> DataNeeds:
        """The observation k actions later."""
        return DataNeeds(futures=(self.offset,), labels=self.required)

    def build(self, model: Model, name: str) -> InverseDynamicsTerm:
        """The term for the vision encoder and actions of `model`. Raises UserError where sizes clash."""
        return InverseDynamicsTerm(self, model, name)


class InverseDynamicsTerm(Term):
    """a^_t .. a^_{t+k-1} from vision(o_t) and vision(o_{t+k}); L = sum m |a^ - a| / sum m.

    The vision encoder looks a second time, at the later picture, and learns from both looks. At each place
    the two tokens, side by side, are mapped to a few `channels`; all places together go through one hidden
    layer to the k actions, normalised. A place that is absent in either picture counts as zeros. m is the
    action mask, and False for a whole window where t + k lies past the episode's end or where no view is
    there at both moments.

    Neither language nor the state takes part, so the only way to a low value is to see what the robot did:
    where hand and gripper are, now and then. What the robot does not move is not asked for.

    Source: inverse dynamics as a pre-training of representations for imitation, Brandfonbrener et al.
    (2305.16985); as the feature space of ICM (1705.05363). Differs: both take neighbouring frames and one
    action, here there are k actions; and it stands beside the action loss instead of before it. DynaMo
    (2409.12192) infers latent actions and predicts the next embedding; ours are the recorded actions.
    """

    def __init__(self, config: InverseDynamicsConfig, model: Model, name: str) -> None:
        super().__init__(**config.arguments(name))
        require_in_chunk(config.offset, model, f"objective.{name}.offset")
        self.config = config
        places = len(model.spec.views) * model.vision.tokens_per_view
        self.num_actions, self.action_dim = config.offset, model.spec.action_dim
        # Every place is kept. In pictures of a bar that moves by the first action, learned queries attending
        # to all tokens are still at the baseline (0.56) after 100 updates; this head is at 0.05 or lower.
        self.narrow = nn.Linear(2 * model.vision.width, config.channels)
        self.head = two_layers(places * config.channels, config.hidden, self.num_actions * self.action_dim)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The masked mean of absolute errors; metric `zero_baseline`, its value if every action were
        predicted as 0 in normalised units, below which something was seen."""
        future = self.future(batch, self.num_actions)
        now, later = features.vision, self.encode_later(future, model, stopped=self.config.stop_future)
        predicted = self.predict(now, later)
        seen = (now.mask & later.mask).any(dim=1)
        target, mask = batch.actions[:, : self.num_actions], self.mask(batch) & seen[:, None, None]
        baseline = masked_mean(target.abs(), mask, mask_of=self.mask)
        value = self.masked_mean((predicted - target).abs(), mask, self.mask)
        return TermValue(value=value, metrics={f"{self.name}/zero_baseline": baseline})

    def mask(self, batch: Batch) -> Bool[Tensor, "b k a"]:
        """m, by the batch: which actions are there between two looks of which a view is there at both."""
        seen = self.views_in_both(batch, self.num_actions).any(dim=1)
        return batch.action_mask[:, : self.num_actions] & seen[:, None, None]

    def predict(self, now: Tokens, later: Tokens) -> Float[Tensor, "b k a"]:
        """The k normalised actions between two looks."""
        both = (now.mask & later.mask)[..., None]
        values = torch.cat([now.values, later.values], dim=-1).masked_fill(~both, 0)
        return self.head(self.narrow(values).flatten(1)).view(-1, self.num_actions, self.action_dim)
