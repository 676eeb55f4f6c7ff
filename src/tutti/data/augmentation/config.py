"""Config of the augmentation: each operation with its own range and probability."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tutti.frozen_config import FrozenConfig

MAX_SIGMA = 3.0


def _rising(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError(f"the lower end comes first, found {values[0]:g} before {values[1]:g}")
    return values


Probability = Annotated[float, Field(ge=0, le=1)]
Sigmas = Annotated[
    tuple[Annotated[float, Field(gt=0, le=MAX_SIGMA)], Annotated[float, Field(gt=0, le=MAX_SIGMA)]],
    AfterValidator(_rising),
]
Scales = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]], AfterValidator(_rising)
]


class NoAugmentation(FrozenConfig):
    """Pictures as they are."""

    kind: Literal["none"] = Field(default="none", description="No augmentation.")


class ColourJitter(FrozenConfig):
    """Each strength r draws a factor uniformly from [1 - r, 1 + r], for each sample and view alone."""

    kind: Literal["colour"] = Field(default="colour", description="Colour jitter.")
    brightness: float = Field(default=0.2, ge=0, le=1, description="Factors lie in 1 - r to 1 + r.")
    contrast: float = Field(
        default=0.2, ge=0, le=1, description="Factors lie in 1 - r to 1 + r, about the picture's mean grey."
    )
    saturation: float = Field(
        default=0.2, ge=0, le=1, description="Factors lie in 1 - r to 1 + r, about each pixel's grey."
    )

    def full(self) -> PictureJitter:
        """The same with every operation named: these three always, the others never."""
        return PictureJitter(
            brightness=ColourFactor(strength=self.brightness),
            contrast=ColourFactor(strength=self.contrast),
            saturation=ColourFactor(strength=self.saturation),
            hue=Hue(probability=0),
            blur=Blur(probability=0),
        )


class ColourFactor(FrozenConfig):
    """A factor drawn uniformly from [1 - strength, 1 + strength]."""

    strength: float = Field(default=0.2, ge=0, le=1, description="Factors lie in 1 - r to 1 + r.")
    probability: Probability = Field(default=1.0, description="Share of the pictures that it is drawn for.")


class Hue(FrozenConfig):
    """A turn of the colours about grey, in the plane of I and Q (YIQ), which keeps the luminance."""

    degrees: float = Field(default=10.0, ge=0, le=180, description="Turns lie in -d to d.")
    probability: Probability = Field(default=1.0, description="Share of the pictures that it is drawn for.")


class Blur(FrozenConfig):
    """A Gaussian blur."""

    sigma: Sigmas = Field(default=(0.1, 1.0), description="Standard deviations from, to, in pixels.")
    probability: Probability = Field(default=0.2, description="Share of the pictures that it is drawn for.")


class Crop(FrozenConfig):
    """A part of the picture at a random place, resized to the whole (bilinear)."""

    scale: Scales = Field(default=(0.9, 1.0), description="The part's edge from, to, as share of the edge.")
    probability: Probability = Field(default=0.0, description="Share of the pictures that it is drawn for.")


class Rotation(FrozenConfig):
    """A rotation about the picture's middle; beyond its edge its outermost pixels are repeated."""

    degrees: float = Field(default=5.0, ge=0, le=45, description="Angles lie in -d to d.")
    probability: Probability = Field(default=0.0, description="Share of the pictures that it is drawn for.")


class Shift(FrozenConfig):
    """A shift across and down, drawn apart; beyond the edge the outermost pixels are repeated."""

    most: float = Field(default=0.05, ge=0, le=0.5, description="At most so much, as share of the edge.")
    probability: Probability = Field(default=0.0, description="Share of the pictures that it is drawn for.")


class ViewDrop(FrozenConfig):
    """A view is masked as if its camera were absent; one that is there always stays."""

    probability: Probability = Field(default=0.0, description="Share of the views that are masked.")


class PictureJitter(FrozenConfig):
    """Every operation on pictures. They are done in the order crop, rotation, shift, blur, brightness,
    contrast, saturation, hue.

    What moves the picture (crop, rotation, shift) is off unless its probability is set: where cameras are
    fixed the policy learns a map from pixels to places, which a moved picture contradicts.
    """

    kind: Literal["pictures"] = Field(default="pictures", description="Colours, blur, geometry, views.")
    brightness: ColourFactor = Field(default_factory=ColourFactor, description="Times a factor.")
    contrast: ColourFactor = Field(
        default_factory=ColourFactor, description="Times a factor about the picture's mean grey."
    )
    saturation: ColourFactor = Field(
        default_factory=ColourFactor, description="Times a factor about each pixel's grey."
    )
    hue: Hue = Field(default_factory=Hue, description="Colours are turned.")
    blur: Blur = Field(default_factory=Blur, description="Pictures out of focus.")
    crop: Crop = Field(default_factory=Crop, description="Moves the picture: a part of it, resized.")
    rotation: Rotation = Field(default_factory=Rotation, description="Moves the picture: a small rotation.")
    shift: Shift = Field(default_factory=Shift, description="Moves the picture: a small shift.")
    view_drop: ViewDrop = Field(default_factory=ViewDrop, description="Views that are masked.")

    def full(self) -> PictureJitter:
        """Itself."""
        return self


Augmentation = Annotated[NoAugmentation | ColourJitter | PictureJitter, Field(discriminator="kind")]
