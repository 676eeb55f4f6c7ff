"""The occlusion maps as a picture: heat over the frames, from the pixels and from the tokens."""

from __future__ import annotations

import io
import textwrap
from math import ceil, isqrt

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageDraw

from tutti.evaluation.probes.occlusion import TINY, Maps

DRAWN, COLUMNS = 8, 2
TILE, LINE, GAP = 96, 12, 8
RED = np.array([255.0, 40.0, 0.0])
TITLE = (
    "Illustrative. The redder a patch, the more the action moves without it; each half has its own scale.\n"
    "Left half: its pixels replaced by their average (where the action comes from). "
    "Right half: its token removed."
)


def draw(maps: Maps, frames: int = DRAWN) -> bytes:
    """A PNG of `frames` of the frames, evenly spread, the instruction below each.

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
    """The picture in grey, TILE pixels wide, with red laid over patch p at `strength` p in [0, 1].

    The patches are a square grid, row by row; other tokens have no place in the picture and leave it grey.
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
