"""The keys of a whole vision-language model, and of the three parts that it fills."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from tutti.frozen_config import FrozenConfig
from tutti.models.pretrained.config import PicturesConfig, TextsConfig
from tutti.models.pretrained.facts import Socket


class VlmConfig(PicturesConfig, TextsConfig):
    """`model.vlm`: the folder of a vision-language model, which is vision, language and fusion at once."""

    socket: ClassVar[Socket] = "vlm"

    layers: PositiveInt | Literal["all"] = Field(
        default="all",
        description="So many of the first blocks of its language model; the rest is removed.",
    )
    mask: Literal["prefix", "causal"] = Field(
        default="prefix",
        description="prefix: pictures and text all see each other; causal: each token sees those before it.",
    )


class VlmVisionConfig(FrozenConfig):
    """`kind: vlm`, the vision tower and the connector of `model.vlm`."""

    kind: Literal["vlm"]
    withhold: bool = Field(
        default=False,
        description="true: all views are withheld, in training and in use: the control that never sees.",
    )


class VlmLanguageConfig(FrozenConfig):
    """`kind: vlm`, the word embedding of `model.vlm`: every token of the text."""

    kind: Literal["vlm"]


class VlmFusionConfig(FrozenConfig):
    """`kind: vlm`, the decoder blocks of `model.vlm`, in which the state and the readout are more tokens."""

    kind: Literal["vlm"]
    state_dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="share of training samples whose state is withheld (0 in normalised units)",
    )
    withhold_state: bool = Field(
        default=False,
        description="true: the state is withheld, in training and in use: a policy without proprioception",
    )
