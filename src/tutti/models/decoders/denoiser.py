"""The network of flow and diffusion: a noisy chunk and its level, given the features, to another chunk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.distributed.ranks import sample_whole_batch
from tutti.models.decoders.trunk import Condition, Trunk, TrunkConfig, shrink
from tutti.models.layers import activate
from tutti.types import DataSpec

_PERIODS = (4e-3, 4.0)


class DenoiserConfig(TrunkConfig):
    """The keys that flow and diffusion have in common."""

    draws: PositiveInt = Field(
        default=4, description="noise levels and noises drawn for each sample of a training batch"
    )
    noise_seed: int = Field(default=0, ge=0, description="seed of the one noise that predict starts from")
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="scale of the noise that predict starts from: 1 a true sample, 0 no noise at all",
    )

    def noise(self, spec: DataSpec) -> Float[Tensor, "t a"]:
        """The noise that every prediction starts from. Leaves torch's global generator alone."""
        random = torch.Generator().manual_seed(self.noise_seed)
        noise = torch.randn(spec.horizon, spec.action_dim, generator=random, device="cpu")
        return noise.to(torch.get_default_device())


class Denoiser(nn.Module):
    """One token a step of the chunk: a linear map in, the trunk, a linear map out.

    The level in [0, 1] enters the condition as sines and cosines, with periods from 0.004 to 4 in equal
    ratios, through two layers (as pi0, 2410.24164).
    """

    def __init__(self, config: TrunkConfig, spec: DataSpec) -> None:
        super().__init__()
        width = config.width
        self.width = width
        self.level_in = nn.Linear(width, width)
        self.level_out = nn.Linear(width, width)
        self.chunk_in = nn.Linear(spec.action_dim, width)
        self.trunk = Trunk(config, spec.horizon)
        self.out = shrink(nn.Linear(width, spec.action_dim))

    def forward(
        self, chunk: Float[Tensor, "b t a"], level: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b t a"]:
        """What the decoder wants to know about the chunk: a velocity, a noise, the clean chunk."""
        waves = level_waves(level, self.width)
        at_level = condition.plus(self.level_out(activate(self.level_in(waves), "relu")))
        return self.out(self.trunk(self.chunk_in(chunk), at_level))

    if TYPE_CHECKING:
        __call__ = forward


def draw_noise(draws: int, like: Float[Tensor, "b t a"]) -> Float[Tensor, "m t a"]:
    """eps for `draws` copies of the batch, one behind the other, as on one process with the whole batch."""

    def sample(rows: int) -> Tensor:
        return torch.randn(draws, rows, *like.shape[1:], dtype=like.dtype, device=like.device)

    return sample_whole_batch(sample, len(like), dim=1).flatten(0, 1)


def level_waves(level: Float[Tensor, " b"], width: int) -> Float[Tensor, "b w"]:
    """sin and cos of 2 pi level / period, `width` // 2 of each; an odd width ends with a 0."""
    count = width // 2
    places = torch.linspace(0, 1, count, dtype=level.dtype, device=level.device)
    shortest, longest = _PERIODS
    periods = shortest * (longest / shortest) ** places
    angles = 2 * math.pi * level[:, None] / periods
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return waves if width % 2 == 0 else torch.nn.functional.pad(waves, (0, 1))
