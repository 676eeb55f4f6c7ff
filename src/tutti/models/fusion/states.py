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
    """A fusion with `state`, a linear map of states to tokens (None where they have no numbers or are
    withheld), and `prompt`, a learned vector of each robot and one for none."""

    state: nn.Linear | None
    prompt: nn.Embedding | None
    state_dropout: float

    @property
    def reads_state(self) -> bool:
        """Whether it has a map for it."""
        return self.state is not None

    def take_states(self, spec: DataSpec, *, dropout: float, withhold: bool) -> None:
        """Makes the map of the states of `spec` to tokens of its width, none with `withhold`.

        Raises: UserError if states are to be withheld from some samples, but there are none.
        """
        self.state_dropout = dropout
        if dropout > 0 and (withhold or spec.state_dim == 0):
            why = "model.fusion.withhold_state is true" if withhold else "data.sources.state is none"
            raise UserError(
                f"model.fusion.state_dropout is {dropout:g}, but there is no state to withhold: {why}. "
                "Set model.fusion.state_dropout=0."
            )
        self.state = nn.Linear(spec.state_dim, self.width) if spec.state_dim and not withhold else None

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
        """In training the states of a share `state_dropout` of the samples are 0, and always where it reads
        none, as a decoder may read what this gives."""
        if not self.reads_state:
            state = torch.zeros_like(state)
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
