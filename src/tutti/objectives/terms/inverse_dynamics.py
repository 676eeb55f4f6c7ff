"""The inverse dynamics term: which actions led from this picture to the one k actions later?"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.objectives.term import BaseTermConfig, Model, Offset, Term, TermValue
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import Batch, DataNeeds, Features, Future, Tokens, UserError, masked_mean


class InverseDynamicsConfig(BaseTermConfig):
    """`kind: inverse_dynamics`."""

    kind: Literal["inverse_dynamics"] = "inverse_dynamics"
    weight: Weight = WeightSchedule(start=0.1, end=0.0, schedule="cosine")
    offset: Offset = 4
    stop_future: bool = Field(
        default=False, description="the look at the later picture sends no gradient; cheaper by its backward"
    )
    channels: PositiveInt = Field(default=16, description="numbers kept of each place of both pictures")
    hidden: PositiveInt = Field(default=256, description="width of the head's hidden layer")

    def needs(self, name: str) -> DataNeeds:
        """The observation k actions later."""
        return DataNeeds(futures=(self.offset,))

    def build(self, model: Model, name: str) -> InverseDynamicsTerm:
        """The term for the vision encoder and actions of `model`. Raises UserError where sizes clash."""
        return InverseDynamicsTerm(self, model, name=name)


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

    def __init__(self, config: InverseDynamicsConfig, model: Model, *, name: str = "inverse") -> None:
        spec = model.spec
        super().__init__(name=name, stop_gradient=config.stop_gradient)
        if config.offset > spec.horizon:
            raise UserError(
                f"objective.{name}.offset is {config.offset}, but must lie in 1..{spec.horizon}, the "
                f"horizon: a batch holds no later actions. Lower it or raise data.horizon."
            )
        self.config = config
        places = len(spec.views) * model.vision.tokens_per_view
        self.num_actions, self.action_dim = config.offset, spec.action_dim
        # Every place is kept. In pictures of a bar that moves by the first action, learned queries attending
        # to all tokens are still at the baseline (0.56) after 100 updates; this head is at 0.05 or lower.
        self.narrow = nn.Linear(2 * model.vision.width, config.channels)
        self.head = nn.Sequential(
            nn.Linear(places * config.channels, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.offset * spec.action_dim),
        )

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The masked mean of absolute errors; metric `zero_baseline`, its value if every action were
        predicted as 0 in normalised units, below which something was seen."""
        k = self.config.offset
        future = self.future(batch, k)
        now, later = features.vision, self.encode_later(future, model)
        predicted = self.predict(now, later)
        seen = (now.mask & later.mask).any(dim=1)
        target, mask = batch.actions[:, :k], self.mask(batch) & seen[:, None, None]
        baseline = masked_mean(target.abs(), mask, of=self.mask)
        value = masked_mean((predicted - target).abs(), mask, of=self.mask)
        return TermValue(value=value, metrics={f"{self.name}/zero_baseline": baseline})

    def mask(self, batch: Batch) -> Bool[Tensor, "b k a"]:
        """m, by the batch: which actions are there between two looks of which a view is there at both."""
        future = self.future(batch, self.num_actions)
        both = batch.observation.image_mask & future.observation.image_mask & future.mask[:, None]
        return batch.action_mask[:, : self.num_actions] & both.any(dim=1)[:, None, None]

    def encode_later(self, future: Future, model: Model) -> Tokens:
        """The vision encoder's tokens of the later pictures; past the episode's end all are masked."""
        there = future.observation.image_mask & future.mask[:, None]
        stopped = self.config.stop_future or "vision" in self.stop_gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stopped):
            return model.vision(model.prepare(future.observation.images), there)

    def predict(self, now: Tokens, later: Tokens) -> Float[Tensor, "b k a"]:
        """The k normalised actions between two looks."""
        both = (now.mask & later.mask)[..., None]
        values = torch.cat([now.values, later.values], dim=-1).masked_fill(~both, 0)
        return self.head(self.narrow(values).flatten(1)).view(-1, self.num_actions, self.action_dim)
