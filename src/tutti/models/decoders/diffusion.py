"""The diffusion decoder: a chunk of actions is denoised from noise, trained as a DDPM, sampled by DDIM."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from tutti.distributed.ranks import sample_whole_batch
from tutti.models.decoders.chunks import present_actions, ranges, require_fitted
from tutti.models.decoders.denoiser import Denoiser, DenoiserConfig, draw_noise
from tutti.models.decoders.trunk import Condition, Conditioning
from tutti.models.interfaces import ActionDecoder
from tutti.types import Batch, DataSpec, Features

Prediction = Literal["sample", "velocity", "noise"]
_OFFSET, _LARGEST_BETA = 0.008, 0.999


class DiffusionConfig(DenoiserConfig):
    """`kind: diffusion`."""

    kind: Literal["diffusion"] = "diffusion"
    prediction: Prediction = Field(default="sample", description="what the network predicts: a, v or eps")
    training_steps: PositiveInt = Field(default=100, description="noise levels K of the training")
    sampling_steps: int = Field(default=10, ge=1, le=1000, description="DDIM steps of a prediction")

    @model_validator(mode="after")
    def _no_more_steps_than_levels(self) -> Self:
        if self.sampling_steps > self.training_steps:
            raise ValueError(
                f"sampling_steps {self.sampling_steps} is more than training_steps {self.training_steps}"
            )
        return self

    def build(self, spec: DataSpec, width: int) -> DiffusionDecoder:
        """The decoder from features of `width` to chunks of (spec.horizon, spec.action_dim)."""
        return DiffusionDecoder(self, spec, width)


class DiffusionDecoder(ActionDecoder):
    """DDPM (2006.11239) with the cosine schedule (2102.09672) and DDIM (2010.02502), as in Diffusion Policy
    (2303.04137):

        x_k = sqrt(A_k) a + sqrt(1 - A_k) eps,   eps ~ N(0, I),   k uniform in 1 ... K
        e   = (network(x_k, k / K, c) - target)^2

    target: `sample` a; `velocity` sqrt(A_k) eps - sqrt(1 - A_k) a (2202.00512); `noise` eps. The default
    is `sample`: its target is bounded, and to get at the clean chunk nothing is divided by sqrt(A_k), which
    is nearly 0 at the noisy end, where ten-step sampling starts.

    A prediction starts from temperature * (a fixed noise) at k = K and goes down `sampling_steps` levels in
    equal strides. At each it estimates a^, clips it to the range of the training data in each dimension
    (`fit`), takes eps^ = (x - sqrt(A) a^) / sqrt(1 - A), and mixes both at the next level; the last gives a^.

    A masked action enters x_k as pure noise, so that it tells the others nothing.

    Differs: Diffusion Policy predicts eps, by a U-Net or a transformer of its own, draws one (k, eps) for
    each sample (here `draws`, and e is their mean), and clips to [-1, 1]. eps^ is that of the clipped a^.
    """

    needs_fit = True

    def __init__(self, config: DiffusionConfig, spec: DataSpec, width: int) -> None:
        super().__init__()
        self.prediction: Prediction = config.prediction
        self.draws, self.temperature = config.draws, config.temperature
        self.levels = config.training_steps
        self.visited = visited_levels(config.training_steps, config.sampling_steps)
        self.noise: Tensor
        self.share: Tensor
        self.low: Tensor
        self.high: Tensor
        self.fitted: Tensor
        self.register_buffer("noise", config.noise(spec))
        self.register_buffer("share", cosine_shares(config.training_steps), persistent=False)
        self.register_buffer("low", torch.full((spec.action_dim,), -1.0))
        self.register_buffer("high", torch.full((spec.action_dim,), 1.0))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.conditioning = Conditioning(config, width)
        self.denoiser = Denoiser(config, spec)

    def fit(self, actions: Float[Tensor, "n t a"], action_mask: Bool[Tensor, "n t a"]) -> None:
        """The range of each action dimension, which predictions never leave.

        Raises: UserError if an action that counts is not finite.
        """
        low, high = ranges(actions, action_mask)
        self.low.copy_(low)
        self.high.copy_(high)
        self.fitted.fill_(True)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """e, the mean of `draws` draws from torch's global generator.

        Raises: UserError before `fit`.
        """
        require_fitted(self, "diffusion")
        single, draws = present_actions(batch), self.draws
        actions = single.repeat(draws, 1, 1)
        mask = batch.action_mask.repeat(draws, 1, 1)
        k = sample_whole_batch(
            lambda rows: torch.randint(1, self.levels + 1, (draws, rows), device=single.device),
            len(single),
            dim=1,
        ).flatten()
        condition = self.conditioning(features).repeat(draws)
        error = self.error_at(condition, actions, mask, k, draw_noise(draws, single))
        return error.unflatten(0, (self.draws, -1)).mean(0)

    def error_at(
        self,
        condition: Condition,
        actions: Float[Tensor, "b t a"],
        mask: Bool[Tensor, "b t a"],
        k: Int[Tensor, " b"],
        noise: Float[Tensor, "b t a"],
    ) -> Float[Tensor, "b t a"]:
        """e at the given levels and eps."""
        share = self.share[k][:, None, None]
        clean, noisy = share.sqrt(), (1 - share).sqrt()
        chunk = torch.where(mask, clean * actions + noisy * noise, noise)
        target = {"sample": actions, "velocity": clean * noise - noisy * actions, "noise": noise}
        output = self.denoiser(chunk, k.to(chunk.dtype) / self.levels, condition)
        return (output - target[self.prediction]).square()

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised."""
        condition = self.conditioning(features)
        b = len(features.readout)
        chunk = (self.temperature * self.noise).expand(b, -1, -1)
        for k, below in zip(self.visited, [*self.visited[1:], 0], strict=True):
            level = torch.full((b,), k / self.levels, dtype=chunk.dtype, device=chunk.device)
            clean, noisy = self.share[k].sqrt(), (1 - self.share[k]).sqrt()
            output = self.denoiser(chunk, level, condition)
            actions = self._clean_chunk(chunk, output, clean, noisy).clamp(self.low, self.high)
            noise = (chunk - clean * actions) / noisy
            chunk = self.share[below].sqrt() * actions + (1 - self.share[below]).sqrt() * noise
        return chunk

    def _clean_chunk(self, chunk: Tensor, output: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
        match self.prediction:
            case "sample":
                return output
            case "velocity":
                return clean * chunk - noisy * output
            case "noise":
                return (chunk - noisy * output) / clean


def visited_levels(levels: int, steps: int) -> list[int]:
    """`steps` levels from `levels` down to 1 in equal strides, rounded; a single one is `levels`."""
    if steps == 1:
        return [levels]
    return [round(levels - step * (levels - 1) / (steps - 1)) for step in range(steps)]


def cosine_shares(levels: int) -> Float[Tensor, " k"]:
    """A_0 = 1 ... A_K, the share of signal left: A_k = prod_{j <= k} (1 - beta_j), beta_j = min(0.999,
    1 - f(j) / f(j - 1)), f(k) = cos^2((k / K + 0.008) / 1.008 * pi / 2)."""
    k = torch.arange(levels + 1, dtype=torch.float64)
    f = torch.cos((k / levels + _OFFSET) / (1 + _OFFSET) * math.pi / 2).square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=_LARGEST_BETA)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)]).float()
