"""Seeded colour augmentation of a batch: brightness, contrast, saturation. No shift: it moves the world.

A random shift by 4 pixels cost 23 points of closed-loop success in a prototype, because it destroys the
fixed map from pixels to positions that the policy must learn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict, Field

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32).reshape(3, 1, 1)


class NoAugmentation(BaseModel):
    """Pictures as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"

    def apply(
        self, images: UInt8[np.ndarray, "b v 3 h w"], random: np.random.Generator, first: int = 0, of: int = 0
    ) -> UInt8[np.ndarray, "b v 3 h w"]:
        """The same array."""
        del random, first, of
        return images


class ColourJitter(BaseModel):
    """Each strength r draws a factor uniformly from [1 - r, 1 + r], for each sample and view alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["colour"] = "colour"
    brightness: float = Field(default=0.2, ge=0, le=1)
    contrast: float = Field(default=0.2, ge=0, le=1)
    saturation: float = Field(default=0.2, ge=0, le=1)

    def apply(
        self, images: UInt8[np.ndarray, "b v 3 h w"], random: np.random.Generator, first: int = 0, of: int = 0
    ) -> UInt8[np.ndarray, "b v 3 h w"]:
        """x -> clip(g + s (c (b x - m) + m - g)): m mean grey of the picture, g grey of the pixel.

        b, c, s are the drawn factors of brightness, contrast and saturation; m and g are taken after the
        steps before. A function of `images` and the state of `random` alone.

        Where `images` are rows of a batch of `of`, from row `first` on, factors are drawn for all of it, so
        that they do not depend on how the batch is spread over ranks.
        """
        rows = slice(first, first + len(images))
        lead = (max(of, rows.stop), images.shape[1], 1, 1, 1)

        def factor(strength: float) -> np.ndarray:
            return random.uniform(1 - strength, 1 + strength, lead)[rows].astype(np.float32)

        brightness, contrast = factor(self.brightness), factor(self.contrast)
        saturation = factor(self.saturation)
        x = images * brightness
        mean = (x * _LUMINANCE).sum(2, keepdims=True).mean((3, 4), keepdims=True)
        x = (x - mean) * contrast + mean
        grey = (x * _LUMINANCE).sum(2, keepdims=True)
        x = (x - grey) * saturation + grey
        return np.clip(np.rint(x), 0, 255).astype(np.uint8)
