"""The flow decoder: a vector field carries noise to a chunk of actions, trained by flow matching."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from tutti.distributed.ranks import sample_whole_batch
from tutti.models.decoders.chunks import present_actions
from tutti.models.decoders.denoiser import Denoiser, DenoiserConfig, draw_noise
from tutti.models.decoders.trunk import Condition, Conditioning
from tutti.models.interfaces import ActionDecoder
from tutti.types import Batch, DataSpec, Features

LATEST = 0.999
"""No u beyond this is drawn, so that x_u never is the action itself."""


class FlowConfig(DenoiserConfig):
    """`kind: flow`."""

    kind: Literal["flow"] = "flow"
    steps: int = Field(default=10, ge=1, le=1000, description="Euler steps of a prediction")

    def build(self, spec: DataSpec, width: int) -> FlowDecoder:
        """The decoder from features of `width` to chunks of (spec.horizon, spec.action_dim)."""
        return FlowDecoder(self, spec, width)


class FlowDecoder(ActionDecoder):
    """Flow matching (2210.02747) with the straight path and the levels of pi0 (2410.24164):

        x_u = (1 - u) eps + u a,   eps ~ N(0, I),   u = 0.999 (1 - b),   b ~ Beta(1.5, 1)
        e   = (v(x_u, u, c) - (a - eps))^2

    u = 0 is noise, u = 1 the action. The density of u is 1.5 sqrt(1 - u / 0.999) / 0.999: it is highest at
    u = 0 and falls to 0 at 0.999, so the noisy end is seen most, where the choice between actions is made.

    A prediction follows dx/du = v from x_0 = temperature * (a fixed noise) to x_1 in `steps` Euler steps. The
    noise belongs to the weights: equal features give equal actions, on any machine and after any training.

    A masked action enters x_u as pure noise, whatever u is, so that it tells the others nothing.

    Differs: pi0 draws one (u, eps) for each sample; here `draws`, since the decoder costs little beside the
    encoders, and e is their mean. pi0's expert attends to the tokens of its VLM.
    """

    def __init__(self, config: FlowConfig, spec: DataSpec, width: int) -> None:
        super().__init__()
        self.draws, self.steps, self.temperature = config.draws, config.steps, config.temperature
        self.noise: Tensor
        self.register_buffer("noise", config.noise(spec))
        self.conditioning = Conditioning(config, width)
        self.denoiser = Denoiser(config, spec)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """e, the mean of `draws` draws from torch's global generator."""
        single, draws = present_actions(batch), self.draws
        actions = single.repeat(draws, 1, 1)
        mask = batch.action_mask.repeat(draws, 1, 1)
        levels = sample_whole_batch(
            lambda rows: draw_levels(draws * rows, single).view(draws, rows), len(single), dim=1
        ).flatten()
        condition = self.conditioning(features).repeat(draws)
        error = self.error_at(condition, actions, mask, levels, draw_noise(draws, single))
        return error.unflatten(0, (self.draws, -1)).mean(0)

    def error_at(
        self,
        condition: Condition,
        actions: Float[Tensor, "b t a"],
        mask: Bool[Tensor, "b t a"],
        levels: Float[Tensor, " b"],
        noise: Float[Tensor, "b t a"],
    ) -> Float[Tensor, "b t a"]:
        """e at the given u and eps."""
        u = levels[:, None, None]
        chunk = torch.where(mask, (1 - u) * noise + u * actions, noise)
        return (self.denoiser(chunk, levels, condition) - (actions - noise)).square()

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised."""
        condition = self.conditioning(features)
        b = len(features.readout)
        chunk = (self.temperature * self.noise).expand(b, -1, -1)
        for step in range(self.steps):
            level = torch.full((b,), step / self.steps, dtype=chunk.dtype, device=chunk.device)
            chunk = chunk + self.denoiser(chunk, level, condition) / self.steps
        return chunk


def draw_levels(count: int, like: Tensor) -> Float[Tensor, " b"]:
    """u = 0.999 (1 - b), b ~ Beta(1.5, 1), drawn as b = r^(2/3) with r uniform: P(b < x) = x^1.5."""
    uniform = torch.rand(count, dtype=like.dtype, device=like.device)
    return LATEST * (1 - uniform.pow(2 / 3))
