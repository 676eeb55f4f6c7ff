"""What all fusions do with states: a projection for each robot, a prompt, states that are withheld."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tutti.distributed.ranks import sample_whole_batch
from tutti.models.interfaces import Fusion, Past, RobotKind
from tutti.models.layers import RobotLinear
from tutti.types import DataSpec, Robots, UserError


class StateFusion(Fusion):
    """A fusion with `state`, a linear map of states to tokens (None where they have no numbers), and
    `prompt`, a learned vector of each robot and one for none."""

    state: nn.Linear | None
    prompt: nn.Embedding | None
    state_dropout: float

    def tell_robots(self, count: int, how: RobotKind) -> None:
        """A projection of the state for each, begun alike; or one vector for each and one for none, which is
        added to the readout token."""
        if how == "prompt":
            self.prompt = nn.Embedding(count + 1, self.width)
            nn.init.normal_(self.prompt.weight, std=0.02)
        elif self.state is not None:
            self.state = RobotLinear(self.state, count)

    def withheld(
        self, state: Float[Tensor, "b s"], past: Past | None
    ) -> tuple[Float[Tensor, "b s"], Past | None]:
        """In training the states of a share `state_dropout` of the samples are 0."""
        if self.training and self.state_dropout > 0:
            # Drawn for the whole batch on every rank, so that a run on more ranks withholds the same states.
            draw = sample_whole_batch(lambda rows: torch.rand(rows, 1, device=state.device), len(state))
            kept = (draw >= self.state_dropout).to(state.dtype)
            state = state * kept
            past = past and replace(past, state=past.state * kept[:, None])
        return state, past

    def prompted(self, readout: Float[Tensor, "b 1 d"], robots: Robots | None) -> Float[Tensor, "b 1 d"]:
        """The readout token with the prompt of each row's robot.

        Raises: ValueError without `robots`, where it is told of them.
        """
        if self.prompt is None:
            return readout
        if robots is None:
            raise ValueError("model.embodiment is prompt, which needs observation.robots, and found none")
        # The last vector is that of no robot, -1.
        return readout + self.prompt(robots.number % self.prompt.num_embeddings)[:, None]


def require_state(spec: DataSpec, dropout: float) -> None:
    """Raises: UserError if states are to be withheld, but there are none."""
    if spec.state_dim == 0 and dropout > 0:
        raise UserError(
            f"model.fusion.state_dropout is {dropout:g}, but there is no state to withhold: "
            "data.sources.state is none. Set model.fusion.state_dropout=0."
        )
