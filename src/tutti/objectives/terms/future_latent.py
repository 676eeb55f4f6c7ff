"""The future-latent term: predicts the features of an EMA copy of the vision encoder k actions later."""

from __future__ import annotations

from copy import deepcopy
from math import isqrt
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.distributed.ranks import mean_over_ranks, shared_mean
from tutti.objectives.term import Model, TermValue
from tutti.objectives.terms.patches import ChangeTerm, ChangeTermConfig, offset_vectors
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import Batch, Features, Future, UserError, at_least_float32, effective_rank, masked_mean

START_SCALE = 0.1
"""What the predictor's last layer is multiplied by at first: so the training begins close to copying."""


class FutureLatentConfig(ChangeTermConfig):
    """`kind: future_latent`."""

    kind: Literal["future_latent"] = "future_latent"
    share_by_default: ClassVar[Weight | None] = WeightSchedule(start=0.2, end=0.0, start_at=0.6)
    decay: float = Field(
        default=0.995, ge=0, le=1, description="rho: how much of the target encoder stays at each step"
    )
    hidden: PositiveInt = Field(default=256, description="width of the predictor's hidden layer")

    def build(self, model: Model, name: str) -> FutureLatentTerm:
        """The term for pictures and tokens as those of `model`; its target starts as the vision encoder that
        `model` has now. Raises UserError if an offset is beyond the horizon."""
        return FutureLatentTerm(self, model, name)


class FutureLatentTerm(ChangeTerm):
    """Future latents (FLARE, 2505.15659): L = sum r (1 - cos(z_t + h(f_t), z_{t+k})) / sum r, r as in
    `ChangeTerm`.

    f_t are the fused vision tokens, which know the instruction and the state; h is a network of two layers on
    each token. z = sg u(u(e) - mean u(e)), u(x) = x / |x|, the mean over the tokens of the same picture,
    e = e_xi(o) the tokens of the vision encoder with the weights xi. Token by token: each fused token
    predicts how the latent of its own cell changes. Several offsets share h: each adds a learned vector to
    the tokens.

    The target encoder `target` is a part of this term: it is in the checkpoint, no optimiser moves it and no
    gradient reaches it. After each optimizer step xi <- rho xi + (1 - rho) theta, theta the weights of the
    model's own encoder; buffers are copied. It stays in evaluation mode.

    Two things keep it from a cheap end. Of tokens as they are, what all of them share grows until any two
    are alike: without the subtracted mean `target_std` fell from 0.29 to 0.09 in 120 updates of a small
    world, and the value with it. And a head that must also repeat what stands still stays above the copy
    baseline for good; so it is given the present latent, and weighs what moves
    (docs/background/log.md, 2026-11-27).

    Differs: FLARE adds learned future tokens to a diffusion transformer, reads them inside it and predicts a
    compact, pre-trained embedding of picture and text at the end of the chunk; here the tokens that are there
    predict the change of the encoder's own tokens, trained from scratch.
    """

    def __init__(self, config: FutureLatentConfig, model: Model, name: str) -> None:
        # Change is seen in pixels, averaged where a cell allows it: single ones are noise.
        even = model.spec.image_size // max(1, isqrt(model.vision.tokens_per_view)) % 2 == 0
        super().__init__(config, model, name, downsample=2 if even else 1)
        if self.grid == 1:
            raise UserError(
                f"objective.{name} compares the cells of a picture, but the vision encoder gives one token a "
                f"picture. Use a finer one (model.vision.stem.strides), or set objective.{name} to null."
            )
        self.decay = config.decay
        self.predictor = nn.Sequential(
            nn.Linear(model.fusion.width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, model.vision.width),
        )
        with torch.no_grad():
            for parameter in self.predictor[-1].parameters():
                parameter.mul_(START_SCALE)
        self.offset = offset_vectors(self.offsets, model.fusion.width)
        self.target = deepcopy(_encoder_of(model)).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As any module's, but the target stays in evaluation mode: no dropout in what is predicted."""
        super().train(mode)
        self.target.eval()
        return self

    @torch.no_grad()
    def update_targets(self, model: Model) -> None:
        """xi <- rho xi + (1 - rho) theta; buffers, and parameters that are no floats, are copied."""
        online = _encoder_of(model)
        ours, theirs = dict(self.target.named_parameters()), dict(online.named_parameters())
        moving = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [ours[name] for name in moving], [theirs[name] for name in moving], 1.0 - self.decay
        )
        for name in ours.keys() - set(moving):
            ours[name].copy_(theirs[name])
        for buffer, source in zip(self.target.buffers(), online.buffers(), strict=True):
            buffer.copy_(source)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The weighted mean over tokens and offsets. Metrics: `copy_baseline`, the same mean of 1 - cos(z_t,
        z_{t+k}), the loss of predicting that nothing changes; `target_std`, the root mean squared distance of
        the unit targets u(e) from their mean over the batch at the same cell, in [0, 1]; 0: collapsed. Of
        several offsets also `value/<k>` and `copy_baseline/<k>`, the same at each. In evaluation mode only,
        since it costs: `target_rank`, the effective rank exp(-sum p log p) of these deviations, p the
        singular values divided by their sum."""
        fused, several = features.fused_vision, len(self.offsets)
        everyone = torch.ones_like(batch.window, dtype=torch.bool)
        present, here = self._latents(Future(observation=batch.observation, mask=everyone), model)
        later = [self._latents(self.future(batch, offset), model) for offset in self.offsets]
        latents, there = (torch.cat(parts) for parts in zip(*later, strict=True))
        mask = (fused.mask & here).repeat(several, 1) & there
        now, then = self._contrasted(present, here).repeat(several, 1, 1), self._contrasted(latents, there)
        # What does not count is blanked before it enters, so that a NaN there cannot come back in a gradient.
        told = fused.values.repeat(several, 1, 1).masked_fill(~mask[..., None], 0)
        if self.offset is not None:
            told = told + self.offset.repeat_interleave(len(fused.values), dim=0)[:, None]
        predicted = F.normalize(now + self.predictor(told).to(now.dtype), dim=-1)
        guesses = {"value": predicted, "copy_baseline": now}
        errors = {name: 1 - (guess * then).sum(dim=-1) for name, guess in guesses.items()}
        weight = self.weight(batch).masked_fill(~mask, 0)
        value = self.change_mean(errors["value"], weight)
        with torch.no_grad():
            deviations = _from_mean(latents, mask)
            spread = mean_over_ranks(masked_mean(deviations.square().sum(dim=-1), mask)).sqrt()
            baseline = self.change_mean(errors["copy_baseline"], weight)
            metrics = {"target_std": spread, "copy_baseline": baseline, **self.each_offset(errors, weight)}
            if not self.training:
                metrics["target_rank"] = effective_rank(deviations.flatten(0, 1))
        return TermValue(value=value, metrics={f"{self.name}/{key}": one for key, one in metrics.items()})

    @torch.no_grad()
    def _latents(self, at: Future, model: Model) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """The target encoder's tokens of an observation, of unit length, and which of them exist."""
        shown = at.observation.image_mask & at.mask[:, None]
        tokens = self.target(model.prepare(at.observation.images), shown)
        values = at_least_float32(tokens.values).masked_fill(~tokens.mask[..., None], 0)
        return F.normalize(values, dim=-1), tokens.mask

    def _contrasted(
        self, latents: Float[Tensor, "m n d"], mask: Bool[Tensor, "m n"]
    ) -> Float[Tensor, "m n d"]:
        """z = u(x - mean x), the mean over the tokens of the same picture."""
        pictures = latents.unflatten(1, (-1, self.grid**2))
        contrast = (pictures - pictures.mean(dim=2, keepdim=True)).flatten(1, 2)
        return F.normalize(contrast, dim=-1).masked_fill(~mask[..., None], 0)


def _encoder_of(model: Model) -> nn.Module:
    """The model's own vision encoder."""
    assert isinstance(model.vision, nn.Module), model.vision
    return model.vision


def _from_mean(values: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """values minus their masked mean over the whole batch, at each place n; 0 where the mask is False."""
    full = mask[..., None].expand_as(values)
    mean = mean_over_ranks(shared_mean(torch.where(full, values, 0.0).sum(dim=0), full.sum(dim=0)))
    return (values - mean).masked_fill(~mask[..., None], 0)
