"""The reconstruction term: what will the picture look like k actions from now, given the instruction?"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from tutti.distributed.ranks import Counted, shared_mean
from tutti.objectives.term import Model, Offset, Term, TermValue
from tutti.objectives.terms.patches import (
    PatchTermConfig,
    decoder_blocks,
    grid_of,
    normalise_patches,
    numbers_of,
    to_patches,
)
from tutti.types import Batch, DataNeeds, Features, UserError, masked_mean, precise


class FuturePatchesConfig(PatchTermConfig):
    """`kind: future_patches`."""

    kind: Literal["future_patches"] = "future_patches"
    offset: Offset = 4
    weighting: Literal["uniform", "changed"] = Field(
        default="changed", description="uniform: all patches count alike; changed: those that change, more"
    )
    threshold: float = Field(
        default=0.04, gt=0, description="mean |change| above which a patch changed; pixels in [-1, 1]"
    )
    floor: float = Field(
        default=0.1, gt=0, description="weight of a patch that did not change; one that did has floor + 1"
    )

    def needs(self, name: str) -> DataNeeds:
        """The observation k actions later."""
        return DataNeeds(futures=(self.offset,))

    def build(self, model: Model, name: str) -> FuturePatchesTerm:
        """The term for pictures and tokens as those of `model`. Raises UserError where sizes clash."""
        return FuturePatchesTerm(self, model, name=name)


class ChangedPatchesConfig(FuturePatchesConfig):
    """`kind: changed_patches`: `future_patches` with another floor, after DreamVLA's regions (2507.04447).

    Where a share q of the patches changed, the others hold floor (1 - q) / (floor + q) of the weight: at
    q = 5 %, 63 % of it with the floor 0.1 of `future_patches`, 16 % with the 0.01 of this kind. It is not 0,
    so that a batch in which nothing moves still says something.
    """

    kind: Literal["changed_patches"] = "changed_patches"  # pyright: ignore[reportIncompatibleVariableOverride]
    weighting: Literal["changed"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="changed", description="changed: patches that change count more; the only value of this kind"
    )
    floor: float = Field(
        default=0.01, gt=0, description="weight of a patch that did not change; one that did has floor + 1"
    )


class FuturePatchesTerm(Term):
    """Language-conditioned future patches (GR-1, 2312.13139; targets as in MAE, 2111.06377).

    The fused vision tokens, which know the instruction and the state, go through a decoder of one or two
    transformer layers on each view and predict the patch they sit on in the picture at t + k:

    x~_p = (x_p - mean_p) / sqrt(var_p + 1e-6), mean and (population) variance over the patch's numbers;
    l_p = mean over the numbers of (x^_p - x~_p)^2;  L = sum_p r_p l_p / sum_p r_p,
    r_p = 1 (uniform), or floor + 1[mean |x_p(t + k) - x_p(t)| > threshold] (changed; after DreamVLA,
    2507.04447).

    Pixels are in [-1, 1], averaged over downsample^2 squares. Patches of views that are absent now or then,
    or past the episode's end, do not count. Differs: DreamVLA tracks its regions; ours assume a still camera.
    """

    def __init__(self, config: FuturePatchesConfig, model: Model, *, name: str = "recon") -> None:
        spec, tokens = model.spec, model.vision.tokens_per_view
        super().__init__(name=name, stop_gradient=config.stop_gradient)
        if config.offset > spec.horizon:
            raise UserError(
                f"objective.{name}.offset is {config.offset}, but must lie in 1..{spec.horizon}, the "
                f"horizon: what comes after the chunk is not the policy's. Lower it or raise data.horizon."
            )
        self.grid = grid_of(model, name)
        numbers = numbers_of(model, self.grid, config.downsample, name)
        self.config = config
        self.embed = nn.Linear(model.fusion.width, config.width)
        self.position = nn.Parameter(torch.randn(len(spec.views), tokens, config.width) * 0.02)
        self.blocks = decoder_blocks(config.width, config.heads, config.depth)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, numbers)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The weighted loss; metrics `changed_share` and `copy_baseline`, the loss of the
        present picture as the prediction, below which something was learned about the future."""
        tokens = features.fused_vision
        predicted = precise(self.predict(tokens.values))
        with torch.no_grad():
            mask = tokens.mask & self.mask(batch)
            now, later = self._both(batch, predicted.dtype)
            changed = self._changed(now, later)
            # Where nothing counts the target is blanked: a NaN there would come back in the gradient.
            target = normalise_patches(later).masked_fill(~mask[..., None], 0)
            weight = self._weight(changed, mask, now.dtype)
            copied = _weighted_mean(
                (normalise_patches(now) - target).square().mean(dim=-1), weight, self.weight
            )
        metrics = {
            f"{self.name}/changed_share": masked_mean(changed.to(now.dtype), mask, of=self.mask),
            f"{self.name}/copy_baseline": copied,
        }
        return TermValue(
            value=_weighted_mean((predicted - target).square().mean(dim=-1), weight, self.weight),
            metrics=metrics,
        )

    def mask(self, batch: Batch) -> Bool[Tensor, "b n"]:
        """Which patches count, by the batch: those of views that are there now and then."""
        future = self.future(batch, self.config.offset)
        there = batch.observation.image_mask & future.observation.image_mask & future.mask[:, None]
        return there.repeat_interleave(self.grid**2, dim=1)

    def weight(self, batch: Batch) -> Float[Tensor, "b n"]:
        """r_p, and 0 where a patch does not count."""
        dtype = precise(self.position).dtype
        return self._weight(self._changed(*self._both(batch, dtype)), self.mask(batch), dtype)

    def _both(
        self, batch: Batch, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b n p"]]:
        """The patches of the present and of the later picture."""
        later = self.future(batch, self.config.offset).observation.images
        return self.patches(batch.observation.images, dtype), self.patches(later, dtype)

    def _changed(self, now: Float[Tensor, "b n p"], later: Float[Tensor, "b n p"]) -> Bool[Tensor, "b n"]:
        return (later - now).abs().mean(dim=-1) > self.config.threshold

    def _weight(
        self, changed: Bool[Tensor, "b n"], mask: Bool[Tensor, "b n"], dtype: torch.dtype
    ) -> Float[Tensor, "b n"]:
        if self.config.weighting == "uniform":
            return mask.to(dtype)
        return (self.config.floor + changed).to(dtype) * mask

    def predict(self, fused: Float[Tensor, "b n d"]) -> Float[Tensor, "b n p"]:
        """The normalised future patch on which each fused vision token sits, p = 3 (patch / downsample)^2."""
        b, n, _ = fused.shape
        views, cells, width = self.position.shape
        x = (self.embed(fused).view(b, views, cells, width) + self.position).view(b * views, cells, width)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)).view(b, n, -1)

    def patches(self, images: Tensor, dtype: torch.dtype) -> Float[Tensor, "b n p"]:
        """Pictures (b, v, 3, h, w) to downsampled patches in [-1, 1], in the order of the vision tokens."""
        return to_patches(images, self.grid, self.config.downsample, dtype)


def _weighted_mean(
    values: Float[Tensor, "b n"], weight: Float[Tensor, "b n"], of: Counted
) -> Float[Tensor, ""]:
    """sum r l / sum r over all rows of the update; 0 where every weight is 0."""
    return shared_mean((weight * values).sum(), weight.sum(), of)
