"""The future-latent term: predicts the features of an EMA copy of the vision encoder k actions later."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.distributed.ranks import mean_over_ranks, shared_mean
from tutti.objectives.term import Model, OffsetsTermConfig, Term, TermValue, at_each_offset, offset_vectors
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import Batch, Features, Future, at_least_float32, effective_rank, masked_mean


class FutureLatentConfig(OffsetsTermConfig):
    """`kind: future_latent`."""

    kind: Literal["future_latent"] = "future_latent"
    weight: Weight = WeightSchedule(start=0.2, end=0.0, schedule="cosine", start_at=0.6)
    decay: float = Field(
        default=0.995, ge=0, le=1, description="rho: how much of the target encoder stays at each step"
    )
    hidden: PositiveInt = Field(default=256, description="width of the predictor's hidden layer")

    def build(self, model: Model, name: str) -> FutureLatentTerm:
        """The term for pictures and tokens as those of `model`; its target starts as the vision encoder that
        `model` has now. Raises UserError if an offset is beyond the horizon."""
        return FutureLatentTerm(self, model, name)


class FutureLatentTerm(Term):
    """Future latents (FLARE, 2505.15659): L = sum m (1 - cos(h(f_t), sg e_xi(o_{t+k}))) / sum m.

    f_t are the fused vision tokens, which know the instruction and the state; h is a network of two layers on
    each token; e_xi is the vision encoder with the weights xi, on the picture at t + k. Token by token: each
    fused token predicts the latent of its own cell. m is 0 for views that are absent now or then and for all
    that lies past the episode's end. Several offsets share h: each adds a learned vector to the
    tokens, and the mean goes over all of them.

    The target encoder `target` is a part of this term: it is in the checkpoint, no optimiser moves it and no
    gradient reaches it. After each optimizer step xi <- rho xi + (1 - rho) theta, theta the weights of the
    model's own encoder; buffers are copied. It stays in evaluation mode. What keeps the latents from
    collapsing is the pair of predictor and slow target, as in BYOL (2006.07733), and the other terms. The
    metrics `target_std` and, on held-out data, `target_rank` would show a collapse.

    Differs: FLARE adds learned future tokens to a diffusion transformer, reads them inside it and predicts a
    compact, pre-trained embedding of picture and text at the end of the chunk; here the tokens that are there
    predict the encoder's own tokens, trained from scratch.
    """

    def __init__(self, config: FutureLatentConfig, model: Model, name: str) -> None:
        super().__init__(**config.arguments(name))
        config.require_in_chunk(model, name)
        self.config, self.offsets = config, config.steps_ahead()
        self.tokens_per_view = model.vision.tokens_per_view
        self.predictor = nn.Sequential(
            nn.Linear(model.fusion.width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, model.vision.width),
        )
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
            [ours[name] for name in moving], [theirs[name] for name in moving], 1.0 - self.config.decay
        )
        for name in ours.keys() - set(moving):
            ours[name].copy_(theirs[name])
        for buffer, source in zip(self.target.buffers(), online.buffers(), strict=True):
            buffer.copy_(source)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The masked mean over tokens and offsets. Metrics: `target_std`, the root mean squared distance of
        the unit targets from their mean over the batch at the same cell, in [0, 1]; 0: collapsed. In
        evaluation mode only, since they cost: `target_rank`, the effective rank exp(-sum p log p) of these
        deviations, p the singular values divided by their sum; and `copy_baseline`, the mean of 1 -
        cos(e_xi(o_t), e_xi(o_{t+k})), the loss of predicting that nothing changes. Of several offsets also
        `value/<k>` and `copy_baseline/<k>`, the same at each."""
        fused, several = features.fused_vision, len(self.offsets)
        latents = [self._latents(self.future(batch, offset), model) for offset in self.offsets]
        target, there = (torch.cat(parts) for parts in zip(*latents, strict=True))
        mask = fused.mask.repeat(several, 1) & there
        # What does not count is blanked before it enters, so that a NaN there cannot come back in a gradient.
        told = fused.values.repeat(several, 1, 1).masked_fill(~mask[..., None], 0)
        if self.offset is not None:
            told = told + self.offset.repeat_interleave(len(fused.values), dim=0)[:, None]
        predicted = F.normalize(self.predictor(told).to(target.dtype), dim=-1)
        losses = {"value": 1 - (predicted * target).sum(dim=-1)}
        value = masked_mean(losses["value"], mask, mask_of=self.mask)
        with torch.no_grad():
            deviations = _from_mean(target, mask)
            spread = mean_over_ranks(masked_mean(deviations.square().sum(dim=-1), mask)).sqrt()
            metrics = {"target_std": spread}
            if not self.training:
                everyone = torch.ones_like(batch.window, dtype=torch.bool)
                present, here = self._latents(Future(observation=batch.observation, mask=everyone), model)
                losses["copy_baseline"] = 1 - (present.repeat(several, 1, 1) * target).sum(dim=-1)
                mask = mask & here.repeat(several, 1)
                metrics["target_rank"] = effective_rank(deviations.flatten(0, 1))
                metrics["copy_baseline"] = masked_mean(losses["copy_baseline"], mask)
            metrics |= at_each_offset(self.offsets, losses, mask.to(value.dtype), self._mask_at)
        return TermValue(value=value, metrics={f"{self.name}/{key}": one for key, one in metrics.items()})

    def mask(self, batch: Batch) -> Bool[Tensor, "m n"]:
        """m, by the batch, one offset after the other: the tokens of views that are there now and then."""
        return torch.cat([self._mask_at(batch, offset) for offset in self.offsets])

    def _mask_at(self, batch: Batch, offset: int) -> Bool[Tensor, "b n"]:
        return self.views_in_both(batch, offset).repeat_interleave(self.tokens_per_view, dim=1)

    @torch.no_grad()
    def _latents(self, at: Future, model: Model) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """The target encoder's tokens of an observation, of unit length, and which of them exist."""
        shown = at.observation.image_mask & at.mask[:, None]
        tokens = self.target(model.prepare(at.observation.images), shown)
        values = at_least_float32(tokens.values).masked_fill(~tokens.mask[..., None], 0)
        return F.normalize(values, dim=-1), tokens.mask


def _encoder_of(model: Model) -> nn.Module:
    """The model's own vision encoder."""
    assert isinstance(model.vision, nn.Module), model.vision
    return model.vision


def _from_mean(values: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """values minus their masked mean over the whole batch, at each place n; 0 where the mask is False."""
    full = mask[..., None].expand_as(values)
    mean = mean_over_ranks(shared_mean(torch.where(full, values, 0.0).sum(dim=0), full.sum(dim=0)))
    return (values - mean).masked_fill(~mask[..., None], 0)
