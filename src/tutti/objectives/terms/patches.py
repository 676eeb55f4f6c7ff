"""The terms that guess pictures patch by patch: how they cut them, and the future patches.

Patches lie on the grid of the vision tokens; each is normalised by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isqrt
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Num
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.distributed.ranks import shared_mean
from tutti.durations import RisingSteps
from tutti.frozen_config import heads_divide
from tutti.objectives.term import BaseTermConfig, Model, Term, TermValue, require_in_chunk
from tutti.objectives.weight_schedule import Weight, WeightSchedule
from tutti.types import Batch, DataNeeds, Features, UserError, at_least_float32, masked_mean


class PatchTermConfig(BaseTermConfig):
    """The keys of every term that reconstructs patches."""

    share_by_default: ClassVar[Weight | None] = WeightSchedule(start=0.2, end=0.0)
    downsample: PositiveInt = Field(
        default=2, description="the target is averaged over squares of this many pixels a side"
    )
    width: PositiveInt = Field(default=64, description="width of the decoder's tokens")
    depth: int = Field(default=1, ge=1, le=2, description="transformer layers of the decoder")
    heads: PositiveInt = Field(default=4, description="attention heads of the decoder")

    _heads_divide = model_validator(mode="after")(heads_divide)


class PatchTerm(Term):
    """A term that guesses the patches of pictures: their grid, and a small transformer on each view."""

    def __init__(self, config: BaseTermConfig, model: Model, name: str, downsample: int) -> None:
        """Raises: UserError unless the vision tokens form a square grid that divides the picture, and
        `downsample` divides a patch."""
        super().__init__(**config.arguments(name))
        tokens, size = model.vision.tokens_per_view, model.spec.image_size
        self.grid, self.downsample = isqrt(tokens), downsample
        if self.grid**2 != tokens or size % self.grid:
            raise UserError(
                f"objective.{name} needs vision tokens on a square grid that divides the picture; the "
                f"encoder gives {tokens} for {size} px. Set objective.{name} to null."
            )
        if (size // self.grid) % downsample:
            raise UserError(
                f"objective.{name}.downsample is {downsample}, but must divide the patch of "
                f"{size // self.grid} pixels (data.image_size {size} over {self.grid} tokens a side)."
            )

    def add_decoder(self, config: PatchTermConfig, model: Model) -> None:
        """The decoder, drawn behind what leads into it: positions, pre-norm layers without dropout, each four
        times as wide inside, and a linear map to the numbers of a patch, 3 (patch / downsample)^2."""
        spec, width = model.spec, config.width
        self.position = nn.Parameter(torch.randn(len(spec.views), self.grid**2, width) * 0.02)
        self.blocks = nn.ModuleList(  # torch's own: the objectives may not use the models' layers
            nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3 * (spec.image_size // self.grid // config.downsample) ** 2)

    def decode(self, x: Float[Tensor, "m c w"], first: int = 0) -> Float[Tensor, "m e p"]:
        """The normalised patches that the decoder sees at the places from `first` on, view by view."""
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, first:]))

    def patches(self, images: Tensor, dtype: torch.dtype) -> Float[Tensor, "b n p"]:
        """Pictures (b, v, 3, h, w) to downsampled patches in [-1, 1], in the order of the vision tokens."""
        return to_patches(images, self.grid, self.downsample, dtype)


@dataclass(frozen=True, slots=True)
class AtOffset:
    """What counts of a batch at one offset; equal to another of the same method and offset, as the key of
    the counts of an update must be."""

    counted: Callable[[Batch, int], Tensor]
    offset: int

    def __call__(self, batch: Batch) -> Tensor:
        return self.counted(batch, self.offset)


def offset_vectors(offsets: Sequence[int], width: int) -> nn.Parameter | None:
    """A vector for each of several offsets, which tells a decoder that they share which one is asked for."""
    return nn.Parameter(torch.randn(len(offsets), width) * 0.02) if len(offsets) > 1 else None


class ChangeTermConfig(BaseTermConfig):
    """The keys of the terms that predict later pictures patch by patch, at several offsets."""

    offsets: RisingSteps = Field(
        default=(4,),
        min_length=1,
        description="k: how many actions later the observations lie that one decoder predicts, or how long: "
        '["0.4s", "0.8s"].',
    )
    weighting: Literal["uniform", "changed"] = Field(
        default="changed", description="uniform: all patches count alike; changed: those that change, more"
    )
    threshold: float = Field(
        default=0.04, gt=0, description="mean |change| above which a patch changed; pixels in [-1, 1]"
    )
    floor: float = Field(
        default=0.01, gt=0, description="weight of a patch that did not change; one that did has floor + 1"
    )

    def needs(self, name: str) -> DataNeeds:
        """The observations at the offsets."""
        return DataNeeds(futures=self.offsets, labels=self.required)


class ChangeTerm(PatchTerm):
    """A term that predicts something of each patch at each offset k: m rows, the batch one offset after the
    other. Patches of views that are absent now or then, or past the episode's end, do not count; the others
    weigh r_p = 1 (uniform), or floor + 1[mean |x_p(t + k) - x_p(t)| > threshold] (changed; after DreamVLA,
    2507.04447). Differs: DreamVLA tracks its regions; ours assume a still camera.
    """

    def __init__(self, config: ChangeTermConfig, model: Model, name: str, downsample: int) -> None:
        super().__init__(config, model, name, downsample)
        require_in_chunk(max(config.offsets), model, f"objective.{name}.offsets")
        self.config, self.offsets = config, config.offsets

    def mask(self, batch: Batch) -> Bool[Tensor, "m n"]:
        """Which patches count, by the batch: those of views that are there now and then."""
        return torch.cat([self._mask_at(batch, offset) for offset in self.offsets])

    def weight(self, batch: Batch) -> Float[Tensor, "m n"]:
        """r_p, and 0 where a patch does not count."""
        return torch.cat([self._weight_at(batch, offset) for offset in self.offsets])

    def change_mean(self, errors: Float[Tensor, "m n"], weight: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
        """sum r l / sum r over all rows of the update; 0 where every weight is 0."""
        return self.weighted_mean(errors, weight, self.weight)

    def each_offset(
        self, errors: Mapping[str, Float[Tensor, "m n"]], weight: Float[Tensor, "m n"]
    ) -> dict[str, Tensor]:
        """That mean of each of the `errors` at each of several offsets, as in "copy_baseline/8"."""
        count = len(weight) // len(self.offsets)
        return {
            f"{name}/{k}": shared_mean((part * error).sum(), part.sum(), AtOffset(self._weight_at, k))
            for name, found in errors.items()
            for k, error, part in zip(self.offsets, found.split(count), weight.split(count), strict=True)
            if len(self.offsets) > 1
        }

    def _mask_at(self, batch: Batch, offset: int) -> Bool[Tensor, "b n"]:
        return self.views_in_both(batch, offset).repeat_interleave(self.grid**2, dim=1)

    def _weight_at(self, batch: Batch, offset: int) -> Float[Tensor, "b n"]:
        mask, dtype = self._mask_at(batch, offset), at_least_float32(next(self.parameters())).dtype
        later = self.patches(self.future(batch, offset).observation.images, dtype)
        return self.of_change(self.changed(self.patches(batch.observation.images, dtype), later), mask, dtype)

    def changed(self, now: Float[Tensor, "m n p"], later: Float[Tensor, "m n p"]) -> Bool[Tensor, "m n"]:
        """Which patches change by more than the threshold."""
        return (later - now).abs().mean(dim=-1) > self.config.threshold

    def of_change(
        self, changed: Bool[Tensor, "m n"], mask: Bool[Tensor, "m n"], dtype: torch.dtype
    ) -> Float[Tensor, "m n"]:
        """r_p of patches that changed or did not, 0 where `mask` is False."""
        if self.config.weighting == "uniform":
            return mask.to(dtype)
        return (self.config.floor + changed).to(dtype) * mask


class FuturePatchesConfig(PatchTermConfig, ChangeTermConfig):
    """`kind: future_patches`."""

    kind: Literal["future_patches"] = "future_patches"
    floor: float = Field(
        default=0.1, gt=0, description="weight of a patch that did not change; one that did has floor + 1"
    )

    def build(self, model: Model, name: str) -> FuturePatchesTerm:
        """The term for pictures and tokens as those of `model`. Raises UserError where sizes clash."""
        return FuturePatchesTerm(self, model, name)


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


class FuturePatchesTerm(ChangeTerm):
    """Language-conditioned future patches (GR-1, 2312.13139; targets as in MAE, 2111.06377).

    The fused vision tokens, which know the instruction and the state, go through a decoder of one or two
    transformer layers on each view and predict the patch they sit on in the picture at t + k:

    x~_p = (x_p - mean_p) / sqrt(var_p + 1e-6), mean and (population) variance over the patch's numbers;
    l_p = mean over the numbers of (x^_p - x~_p)^2;  L = sum_p r_p l_p / sum_p r_p, r_p as in `ChangeTerm`.

    Several offsets share the decoder: each is told by a learned vector that is added to all its tokens, and
    both sums go over all offsets. Pixels are in [-1, 1], averaged over downsample^2 squares.
    """

    def __init__(self, config: FuturePatchesConfig, model: Model, name: str) -> None:
        super().__init__(config, model, name, config.downsample)
        self.embed = nn.Linear(model.fusion.width, config.width)
        self.add_decoder(config, model)
        self.offset = offset_vectors(self.offsets, config.width)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The weighted loss; metrics `changed_share` and `copy_baseline`, the loss of the present picture as
        the prediction, below which something was learned about the future. Of several offsets also
        `value/<k>` and `copy_baseline/<k>`, the same at each."""
        tokens = features.fused_vision
        predicted = at_least_float32(self.predict(tokens.values))
        with torch.no_grad():
            mask = tokens.mask.repeat(len(self.offsets), 1) & self.mask(batch)
            now = self.patches(batch.observation.images, predicted.dtype).repeat(len(self.offsets), 1, 1)
            futures = [self.future(batch, offset).observation.images for offset in self.offsets]
            later = torch.cat([self.patches(images, now.dtype) for images in futures])
            changed = self.changed(now, later)
            # Where nothing counts both are blanked: a NaN there would come back, in the gradient as well.
            target, copy = (
                normalise_patches(patches).masked_fill(~mask[..., None], 0) for patches in (later, now)
            )
            weight = self.of_change(changed, mask, now.dtype)
        guesses = {"value": predicted, "copy_baseline": copy}
        errors = {name: (guess - target).square().mean(dim=-1) for name, guess in guesses.items()}
        value = self.change_mean(errors["value"], weight)
        with torch.no_grad():
            metrics = {
                "changed_share": masked_mean(changed.to(now.dtype), mask, mask_of=self.mask),
                "copy_baseline": self.change_mean(errors["copy_baseline"], weight),
                **self.each_offset(errors, weight),
            }
        return TermValue(value=value, metrics={f"{self.name}/{key}": one for key, one in metrics.items()})

    def predict(self, fused: Float[Tensor, "b n d"]) -> Float[Tensor, "m n p"]:
        """The normalised future patch on which each fused vision token sits, p = 3 (patch / downsample)^2,
        one offset after the other: m = number of offsets * b."""
        x = self.embed(fused).view(len(fused), *self.position.shape) + self.position
        if self.offset is not None:
            x = (x + self.offset[:, None, None, None]).flatten(0, 1)
        return self.decode(x.flatten(0, 1)).view(-1, fused.shape[1], self.out.out_features)


def to_patches(images: Tensor, grid: int, downsample: int, dtype: torch.dtype) -> Float[Tensor, "b n p"]:
    """Pictures (b, v, 3, h, w) to patches in [-1, 1], averaged over downsample^2 squares, in the order of the
    vision tokens: view by view, row by row. The numbers of a patch are row, column, colour."""
    b, v = images.shape[:2]
    x = averaged(images.flatten(0, 1), downsample, dtype)
    if images.dtype == torch.uint8:
        x = x / 127.5 - 1.0
    side = x.shape[-1] // grid
    cells = x.view(b, v, 3, grid, side, grid, side).permute(0, 1, 3, 5, 4, 6, 2)
    return cells.reshape(b, v * grid**2, 3 * side**2)


def averaged(x: Num[Tensor, "b c h w"], factor: int, dtype: torch.dtype) -> Float[Tensor, "b c p q"]:
    """The mean of each factor x factor square in `dtype`, as `torch.nn.functional.avg_pool2d` gives it.

    Adding whole rows first takes a third of its time on a CPU. Sums of bytes are exact in any order, and are
    taken as bytes come: a quarter of the memory that floats would move.
    """
    if factor == 1:
        return x.to(dtype)
    # 11^2 bytes are the most that int16 can add up.
    adding = torch.int16 if x.dtype == torch.uint8 and factor <= 11 else dtype
    for axis in (-2, -1):
        first, *others = x.unflatten(axis, (-1, factor)).unbind(axis)
        x = reduce(torch.add, others, first.to(adding))
    return x.to(dtype) / factor**2


def normalise_patches(patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n p"]:
    """(x - mean) / sqrt(var + 1e-6), each patch by itself."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
    return (patches - mean) / (variance + 1e-6).sqrt()
