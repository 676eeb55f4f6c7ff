"""Occlusion sensitivity: how far the action moves without one image patch or token, and heat maps of it.

Illustrative. A patch can move the action without improving it, and two patches with the same information hide
each other.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, isqrt

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from tutti.data.samples import Sample, spread
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.models.vla import VLA
from tutti.types import Batch, Tokens

FRAMES = 64
TOP = 0.1
COARSE = 4
TINY = float(np.finfo(np.float64).tiny)
SHOWN_FRAMES, COLUMNS = 8, 2
TILE, LINE, GAP = 96, 12, 8
RED = np.array([255.0, 40.0, 0.0])
TITLE = (
    "Illustrative. The redder a patch, the more the action moves without it; each half has its own scale.\n"
    "Left half: its pixels replaced by their average (where the action comes from). "
    "Right half: its token removed."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """s_p = masked mean |a(o) - a(o without patch p)| over the executed part, for each of `patches` patches
    of a frame (all views together).

    `top_share` is the share of sum_p s_p inside the `top_patches` most sensitive ones, a tenth of them: if
    all mattered alike it would be top_patches / patches. `views` is each view's share of sum_p s_p.
    """

    patches: int
    top_patches: int
    top_share: Estimate
    views: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Occlusion:
    """Two ways to remove a patch, over `frames` held-out frames.

    `pixels`: its pixels become their average over all frames, the empty scene of a fixed camera; this
    shows where the action comes from. `tokens`: its token is masked behind the vision encoder; this shows
    which tokens the fusion reads. These differ: an encoder with attention may gather the image in a few
    tokens of empty patches (registers, 2309.16588).
    """

    frames: int
    pixels: Sensitivity
    tokens: Sensitivity


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """Occlusion maps of some frames: their images and s_p of each patch, view after view."""

    images: UInt8[np.ndarray, "f v 3 h w"]
    pixels: Float64[np.ndarray, "f p"]
    tokens: Float64[np.ndarray, "f n"]
    captions: tuple[str, ...]


def occlude(
    model: VLA,
    sample: Sample,
    texts: Sequence[str],
    *,
    executed: int,
    frames: int = FRAMES,
    seed: int = 0,
) -> tuple[Occlusion, Maps]:
    """Removes every patch of `frames` windows of `sample`, evenly spread, one at a time."""
    chosen = spread(sample.index, sample.rows, frames)
    parts, captions = [], []
    for batch in chosen.batches():
        parts.append(batch.observation.images.numpy())
        captions += [texts[number] for number in batch.instruction_id.tolist()]
    images = np.concatenate(parts)
    average = torch.from_numpy(images.mean(0).round().astype(np.uint8))
    pixels = [_by_pixels(model, batch, executed, average) for batch in chosen.batches()]
    tokens = [_by_tokens(model, batch, executed) for batch in chosen.batches()]
    maps = Maps(
        images=images,
        pixels=np.concatenate(pixels),
        tokens=np.concatenate(tokens),
        captions=tuple(captions),
    )
    return Occlusion(
        frames=len(images),
        pixels=_summary(maps.pixels, chosen.episode, model.spec.views, seed),
        tokens=_summary(maps.tokens, chosen.episode, model.spec.views, seed),
    ), maps


def _summary(
    sensitivity: Float64[np.ndarray, "f p"], episode: np.ndarray, views: Sequence[str], seed: int
) -> Sensitivity:
    patches = sensitivity.shape[1]
    top = max(1, ceil(TOP * patches))
    best, total = np.sort(sensitivity, axis=1)[:, -top:].sum(1), sensitivity.sum(1)
    by_view = sensitivity.reshape(len(sensitivity), len(views), -1).sum((0, 2))
    whole = max(float(by_view.sum()), TINY)
    return Sensitivity(
        patches=patches,
        top_patches=top,
        top_share=ratio_of_sums(best, total, episode, seed=seed),
        views=tuple((view, float(share) / whole) for view, share in zip(views, by_view, strict=True)),
    )


def _by_pixels(
    model: VLA, batch: Batch, executed: int, average: UInt8[Tensor, "v 3 h w"]
) -> Float64[np.ndarray, "b p"]:
    """s_p with the patch's pixels replaced by `average`; patches as the tokens lie, or COARSE x COARSE."""
    tokens = model.vision.tokens_per_view
    side = isqrt(tokens) if isqrt(tokens) ** 2 == tokens else COARSE
    edges = np.linspace(0, model.spec.image_size, side + 1).round().astype(int).tolist()
    observation = batch.observation
    columns: list[Callable[[], Tensor]] = []

    def without(view: int, row: int, column: int) -> Tensor:
        images = observation.images.clone()
        cell = (slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1]))
        images[(slice(None), view, slice(None), *cell)] = average[(view, slice(None), *cell)]
        return _predict(model, replace(batch, observation=replace(observation, images=images)))

    for place in np.ndindex(observation.images.shape[1], side, side):
        columns.append(lambda place=place: without(*place))
    return _moved(_predict(model, batch), columns, batch, executed)


def _by_tokens(model: VLA, batch: Batch, executed: int) -> Float64[np.ndarray, "b n"]:
    """s_p with the patch's token removed by the mask, behind the vision encoder."""
    vision, language, state = _encode(model, batch)

    def without(token: int) -> Tensor:
        mask = vision.mask.clone()
        mask[:, token] = False
        return _act(model, replace(vision, mask=mask), language, state)

    columns = [lambda token=token: without(token) for token in range(vision.mask.shape[1])]
    return _moved(_act(model, vision, language, state), columns, batch, executed)


def _moved(
    unchanged: Float[Tensor, "b t a"],
    others: Sequence[Callable[[], Tensor]],
    batch: Batch,
    executed: int,
) -> Float64[np.ndarray, "b p"]:
    """The masked mean distance of each of `others` from `unchanged` over the executed part."""
    mask = batch.action_mask[:, :executed]
    count = mask.sum((1, 2)).clamp(min=1)
    columns = [
        torch.where(mask, (other() - unchanged)[:, :executed].abs(), 0.0).sum((1, 2)) / count
        for other in others
    ]
    return torch.stack(columns, dim=1).double().numpy()


@torch.no_grad()
def _encode(model: VLA, batch: Batch) -> tuple[Tokens, Tokens, Float[Tensor, "b s"]]:
    observation = batch.observation.to(next(model.parameters()).device)
    return *model.encode(observation), observation.state


@torch.no_grad()
def _act(model: VLA, vision: Tokens, language: Tokens, state: Float[Tensor, "b s"]) -> Float[Tensor, "b t a"]:
    return model.action.predict(model.fuse(vision, language, state)).float().cpu()


def _predict(model: VLA, batch: Batch) -> Float[Tensor, "b t a"]:
    return _act(model, *_encode(model, batch))


def draw_maps(maps: Maps, frames: int = SHOWN_FRAMES) -> bytes:
    """A PNG of heat maps over `frames` of the frames, evenly spread, the instruction below each.

    The reddest patch of each half has the largest s_p there; strength is s_p over that.
    """
    rows = np.linspace(0, len(maps.images) - 1, min(frames, len(maps.images))).round().astype(int)
    width, height = 2 * maps.images.shape[1] * TILE + GAP, TILE + 3 * LINE
    columns, head = min(COLUMNS, len(rows)), 3 * LINE
    size = (max(columns * (width + 2 * GAP), 640), head + ceil(len(rows) / columns) * height)
    sheet = Image.new("RGB", size, "white")
    brush = ImageDraw.Draw(sheet)
    brush.multiline_text((2, 2), TITLE, fill="black", spacing=0)
    for place, row in enumerate(rows.tolist()):
        left, top = (place % columns) * (width + 2 * GAP), head + (place // columns) * height
        for half, heat in enumerate((maps.pixels[row], maps.tokens[row])):
            strip = _strip(maps.images[row], heat)
            sheet.paste(strip, (left + half * (strip.width + GAP), top))
        caption = textwrap.wrap(maps.captions[row], max(8, width // 6))[:2]
        brush.multiline_text((left + 2, top + TILE), "\n".join(caption), fill="black", spacing=0)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()


def _strip(images: UInt8[np.ndarray, "v 3 h w"], heat: Float64[np.ndarray, " p"]) -> Image.Image:
    """The views of one frame side by side."""
    strength = (heat / max(float(heat.max()), TINY)).reshape(len(images), -1)
    strip = Image.new("RGB", (len(images) * TILE, TILE))
    for number, (image, part) in enumerate(zip(images, strength, strict=True)):
        strip.paste(overlay(image, part), (number * TILE, 0))
    return strip


def overlay(image: UInt8[np.ndarray, "3 h w"], strength: Float64[np.ndarray, " p"]) -> Image.Image:
    """The image in grey, TILE pixels wide, with red over patch p at `strength` p in [0, 1].

    The patches are a square grid, row by row; other tokens have no place in the image and leave it grey.
    """
    side = isqrt(len(strength))
    resized = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((TILE, TILE))
    grey = np.asarray(resized.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    if side**2 != len(strength):
        return Image.fromarray(grey.astype(np.uint8))
    cells = Image.fromarray((255 * strength.reshape(side, side)).round().astype(np.uint8))
    alpha = np.asarray(cells.resize((TILE, TILE), Image.Resampling.NEAREST), dtype=np.float64)[..., None]
    alpha *= 0.75 / 255
    return Image.fromarray(((1 - alpha) * grey + alpha * RED).round().clip(0, 255).astype(np.uint8))
