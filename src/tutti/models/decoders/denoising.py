"""The decoders that make a chunk of actions out of noise: flow matching and diffusion, with one network."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int, Num
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.distributed.ranks import sample_whole_batch
from tutti.frozen_config import FrozenConfig
from tutti.models.decoders.chunks import own_dimensions, present_actions, ranges, require_fitted
from tutti.models.decoders.trunk import (
    ChunkNetwork,
    Condition,
    Conditioner,
    Conditioning,
    Denoiser,
    TrunkConfig,
)
from tutti.models.interfaces import ActionDecoder
from tutti.types import Batch, DataSpec, Features

_OFFSET, _LARGEST_BETA = 0.008, 0.999
LATEST = 0.999
"""No u of flow matching beyond this is drawn, so that x_u never is the action itself."""
Prediction = Literal["sample", "velocity", "noise"]


class NoiseConfig(FrozenConfig):
    """The keys of every decoder that makes a chunk out of noise."""

    draws: PositiveInt = Field(
        default=4, description="noise levels and noises drawn for each sample of a training batch"
    )
    noise_seed: int = Field(default=0, ge=0, description="seed of the one noise that predict starts from")
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="scale of the noise that predict starts from: 1 a true sample, 0 no noise at all",
    )


class DenoisingConfig(NoiseConfig, TrunkConfig):
    """The keys that flow and diffusion have in common."""


class DenoisingDecoder(ActionDecoder):
    """A decoder that learns to clean a noisy chunk, and predicts from one fixed noise, step by step.

    The noise belongs to the weights: equal features give equal actions, on any machine and after any
    training. A masked action enters the noisy chunk as pure noise, so that it tells the others nothing.
    """

    def __init__(
        self, config: NoiseConfig, shape: tuple[int, int], conditioning: Conditioner, denoiser: ChunkNetwork
    ) -> None:
        """`shape` is that of a chunk, (t, a)."""
        super().__init__()
        self.draws, self.temperature = config.draws, config.temperature
        random = torch.Generator().manual_seed(config.noise_seed)  # the global generator is left alone
        noise = torch.randn(shape, generator=random, device="cpu")
        self.noise = nn.Buffer(noise.to(torch.get_default_device()))
        self.conditioning, self.denoiser = conditioning, denoiser

    def separate_robots(self, count: int) -> None:
        """A first and a last layer of the network for each of `count` robots, begun alike."""
        assert isinstance(self.denoiser, Denoiser)
        self.denoiser.separate_robots(count)

    @abstractmethod
    def draw_levels(self, count: int, like: Tensor) -> Num[Tensor, " b"]:
        """Noise levels for the samples of a training batch, on the device of `like`."""

    @abstractmethod
    def error_at(
        self,
        condition: Condition,
        actions: Float[Tensor, "b t a"],
        mask: Bool[Tensor, "b t a"],
        levels: Num[Tensor, " b"],
        noise: Float[Tensor, "b t a"],
    ) -> Float[Tensor, "b t a"]:
        """e at the given levels and eps."""

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """e, the mean of `draws` draws from torch's global generator, as on one process with the whole batch.

        Raises: UserError before `fit`, if the decoder needs one.
        """
        actions, draws = present_actions(batch), self.draws
        levels = sample_whole_batch(
            lambda rows: self.draw_levels(draws * rows, actions).view(draws, rows), len(actions), dim=1
        ).flatten()
        condition = self.conditioning(features).repeat(draws)
        noise = sample_whole_batch(
            lambda rows: torch.randn(
                draws, rows, *actions.shape[1:], dtype=actions.dtype, device=actions.device
            ),
            len(actions),
            dim=1,
        ).flatten(0, 1)
        mask = batch.action_mask.repeat(draws, 1, 1)
        error = self.error_at(condition, actions.repeat(draws, 1, 1), mask, levels, noise)
        return error.unflatten(0, (draws, -1)).mean(0)

    def denoised(
        self, chunk: Float[Tensor, "b t a"], level: float, condition: Condition
    ) -> Float[Tensor, "b t a"]:
        """What the network says of chunks that all are at this level."""
        levels = torch.full((chunk.shape[0],), level, dtype=chunk.dtype, device=chunk.device)
        return self.denoiser(chunk, levels, condition)


class FlowConfig(DenoisingConfig):
    """`kind: flow`."""

    kind: Literal["flow"] = "flow"
    steps: int = Field(default=10, ge=1, le=1000, description="Euler steps of a prediction")

    def build(self, spec: DataSpec, width: int) -> FlowDecoder:
        """The decoder from features of `width` to chunks of (spec.horizon, spec.action_dim)."""
        parts = Conditioning(self, width), Denoiser(self, spec)
        return FlowDecoder(self, (spec.horizon, spec.action_dim), *parts, steps=self.steps)


class FlowDecoder(DenoisingDecoder):
    """Flow matching (2210.02747) with the straight path and the levels of pi0 (2410.24164):

        x_u = (1 - u) eps + u a,   eps ~ N(0, I),   u = 0.999 (1 - b),   b ~ Beta(1.5, 1)
        e   = (v(x_u, u, c) - (a - eps))^2

    u = 0 is noise, u = 1 the action. The density of u is 1.5 sqrt(1 - u / 0.999) / 0.999: it is highest at
    u = 0 and falls to 0 at 0.999, so the noisy end is seen most, where the choice between actions is made.

    A prediction follows dx/du = v from x_0 = temperature * (the fixed noise) to x_1 in `steps` Euler steps.

    Differs: pi0 draws one (u, eps) for each sample; here `draws`, since the decoder costs little beside the
    encoders, and e is their mean. pi0's expert attends to the tokens of its VLM (`kind: pi0`).
    """

    def __init__(
        self,
        config: NoiseConfig,
        shape: tuple[int, int],
        conditioning: Conditioner,
        denoiser: ChunkNetwork,
        *,
        steps: int,
    ) -> None:
        super().__init__(config, shape, conditioning, denoiser)
        self.steps = steps

    def draw_levels(self, count: int, like: Tensor) -> Float[Tensor, " b"]:
        """u = 0.999 (1 - b), b ~ Beta(1.5, 1), drawn as b = r^(2/3) with r uniform: P(b < x) = x^1.5."""
        uniform = torch.rand(count, dtype=like.dtype, device=like.device)
        return LATEST * (1 - uniform.pow(2 / 3))

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
        chunk = (self.temperature * self.noise).expand(features.readout.shape[0], -1, -1)
        for step in range(self.steps):
            chunk = chunk + self.denoised(chunk, step / self.steps, condition) / self.steps
        return chunk

    def predict_continuing(
        self,
        features: Features,
        target: Float[Tensor, "t a"],
        weights: Float[Tensor, " t"],
        guidance: float,
    ) -> Float[Tensor, "b t a"]:
        """Real-time chunking (2506.07339): each Euler step takes the velocity

            v + min(beta, (u^2 + (1 - u)^2) / (u (1 - u))) J^T (w * (target - x^)),   x^ = x + (1 - u) v

        with J the derivative of x^ by x, beta the `guidance`; at u = 0 the factor is beta. With weights of 0
        it is `predict`.
        """
        condition = self.conditioning(features)
        with torch.inference_mode(False), torch.enable_grad():
            condition = condition.apply(torch.clone)  # what inference mode made cannot be differentiated
            chunk = (self.temperature * self.noise).expand(features.readout.shape[0], -1, -1)
            for step in range(self.steps):
                u = step / self.steps
                chunk = chunk.detach().requires_grad_()
                velocity = self.denoised(chunk, u, condition)
                clean = chunk + (1 - u) * velocity
                wrong = own_dimensions(weights[:, None] * (target - clean).detach(), condition.robots)
                (pull,) = torch.autograd.grad(clean, chunk, wrong)
                factor = min(guidance, (u**2 + (1 - u) ** 2) / (u * (1 - u))) if u else guidance
                chunk = chunk + (velocity + factor * pull) / self.steps
            return chunk.detach()


class DiffusionConfig(DenoisingConfig):
    """`kind: diffusion`."""

    kind: Literal["diffusion"] = "diffusion"
    prediction: Prediction = Field(
        default="sample",
        description="What the network predicts: the clean actions (sample), the velocity, or the noise.",
    )
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


class DiffusionDecoder(DenoisingDecoder):
    """DDPM (2006.11239) with the cosine schedule (2102.09672) and DDIM (2010.02502), as in Diffusion Policy
    (2303.04137):

        x_k = sqrt(A_k) a + sqrt(1 - A_k) eps,   eps ~ N(0, I),   k uniform in 1 ... K
        e   = (network(x_k, k / K, c) - target)^2

    target: `sample` a; `velocity` sqrt(A_k) eps - sqrt(1 - A_k) a (2202.00512); `noise` eps. The default
    is `sample`: its target is bounded, and to get at the clean chunk nothing is divided by sqrt(A_k), which
    is nearly 0 at the noisy end, where ten-step sampling starts.

    A prediction starts from temperature * (the fixed noise) at k = K and goes down `sampling_steps` levels in
    equal strides. At each it estimates a^, clips it to the range of the training data in each dimension
    (`fit`), takes eps^ = (x - sqrt(A) a^) / sqrt(1 - A), and mixes both at the next level; the last gives a^.

    Differs: Diffusion Policy predicts eps, by a U-Net or a transformer of its own, draws one (k, eps) for
    each sample (here `draws`, and e is their mean), and clips to [-1, 1]. eps^ is that of the clipped a^.
    """

    needs_fit = True

    def __init__(self, config: DiffusionConfig, spec: DataSpec, width: int) -> None:
        parts = Conditioning(config, width), Denoiser(config, spec)
        super().__init__(config, (spec.horizon, spec.action_dim), *parts)
        self.prediction: Prediction = config.prediction
        self.levels = config.training_steps
        self.visited = visited_levels(config.training_steps, config.sampling_steps)
        self.share = nn.Buffer(cosine_shares(config.training_steps), persistent=False)
        self.low, self.high = (nn.Buffer(torch.full((spec.action_dim,), end)) for end in (-1.0, 1.0))
        self.fitted = nn.Buffer(torch.tensor(False))

    def fit(self, actions: Float[Tensor, "n t a"], action_mask: Bool[Tensor, "n t a"]) -> None:
        """The range of each action dimension, which predictions never leave.

        Raises: UserError if an action that counts is not finite.
        """
        low, high = ranges(actions, action_mask)
        self.low.copy_(low)
        self.high.copy_(high)
        self.fitted.fill_(True)

    def draw_levels(self, count: int, like: Tensor) -> Int[Tensor, " b"]:
        """k, uniform in 1 ... K. Raises: UserError before `fit`."""
        require_fitted(self, "diffusion")
        return torch.randint(1, self.levels + 1, (count,), device=like.device)

    def error_at(
        self,
        condition: Condition,
        actions: Float[Tensor, "b t a"],
        mask: Bool[Tensor, "b t a"],
        levels: Int[Tensor, " b"],
        noise: Float[Tensor, "b t a"],
    ) -> Float[Tensor, "b t a"]:
        """e at the given k and eps."""
        share = self.share[levels][:, None, None]
        clean, noisy = share.sqrt(), (1 - share).sqrt()
        chunk = torch.where(mask, clean * actions + noisy * noise, noise)
        target = {"sample": actions, "velocity": clean * noise - noisy * actions, "noise": noise}
        output = self.denoiser(chunk, levels.to(chunk.dtype) / self.levels, condition)
        return (output - target[self.prediction]).square()

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised."""
        condition = self.conditioning(features)
        chunk = (self.temperature * self.noise).expand(features.readout.shape[0], -1, -1)
        for k, below in zip(self.visited, [*self.visited[1:], 0], strict=True):
            clean, noisy = self.share[k].sqrt(), (1 - self.share[k]).sqrt()
            actions = self.denoised(chunk, k / self.levels, condition)
            if self.prediction == "velocity":
                actions = clean * chunk - noisy * actions
            elif self.prediction == "noise":
                actions = (chunk - noisy * actions) / clean
            actions = actions.clamp(self.low, self.high)
            noise = (chunk - clean * actions) / noisy
            chunk = self.share[below].sqrt() * actions + (1 - self.share[below]).sqrt() * noise
        return chunk


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
