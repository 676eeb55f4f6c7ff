"""Config of the model: a preset size, and a union of kinds for each of its four parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tutti.frozen_config import FrozenConfig
from tutti.models.decoders.bins import BinsConfig
from tutti.models.decoders.diffusion import DiffusionConfig
from tutti.models.decoders.fast import FastConfig
from tutti.models.decoders.flow import FlowConfig
from tutti.models.decoders.regression import RegressionConfig
from tutti.models.fusion.joint_attention import JointAttentionConfig
from tutti.models.interfaces import ActionDecoder
from tutti.models.language.transformer import TextTransformerConfig
from tutti.models.vision.vit import VisionTransformerConfig
from tutti.models.vla import VLA
from tutti.nested_dicts import merge
from tutti.plugin import CUSTOM, CustomConfig, tag_of
from tutti.types import DataSpec

Size = Literal["tiny", "small", "base", "large"]


class CustomDecoderConfig(CustomConfig[ActionDecoder]):
    """`kind: "package.module:Class"`, an `ActionDecoder`: `Class(spec, width, **options)`.

    `width` is the d of the readout and of the fused vision tokens.
    """

    base, key = ActionDecoder, "model.action.kind"


# The union of kinds of each part: a further kind is one more member here, told apart by `kind`.
VisionConfig = VisionTransformerConfig
LanguageConfig = TextTransformerConfig
FusionConfig = JointAttentionConfig
ActionDecoderConfig = Annotated[
    Annotated[RegressionConfig, Tag("regression")]
    | Annotated[FlowConfig, Tag("flow")]
    | Annotated[DiffusionConfig, Tag("diffusion")]
    | Annotated[BinsConfig, Tag("bins")]
    | Annotated[FastConfig, Tag("fast")]
    | Annotated[CustomDecoderConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]

PRESETS: dict[Size, dict[str, dict[str, Any]]] = {
    "tiny": {  # about 1.0 M parameters: learns from scratch on a CPU within minutes
        "vision": {"kind": "vit", "stem": {"channels": (64, 128, 128)}, "width": 128, "depth": 1, "heads": 4},
        "language": {"kind": "transformer", "width": 64, "depth": 2, "heads": 4, "num_tokens": 1},
        "fusion": {"kind": "joint_attention", "width": 128, "depth": 2, "heads": 4},
        "action": {"kind": "regression", "hidden": 256},
    },
    "small": {  # about 28 M
        "vision": {"kind": "vit", "stem": {"channels": (96, 192, 384)}, "width": 384, "depth": 6, "heads": 6},
        "language": {"kind": "transformer", "width": 256, "depth": 3, "heads": 4, "num_tokens": 4},
        "fusion": {"kind": "joint_attention", "width": 384, "depth": 8, "heads": 6},
        "action": {"kind": "regression", "hidden": 768},
    },
    "base": {  # about 100 M
        "vision": {
            "kind": "vit",
            "stem": {"channels": (192, 384, 768)},
            "width": 768,
            "depth": 4,
            "heads": 12,
        },
        "language": {"kind": "transformer", "width": 512, "depth": 3, "heads": 8, "num_tokens": 4},
        "fusion": {"kind": "joint_attention", "width": 768, "depth": 8, "heads": 12},
        "action": {"kind": "regression", "hidden": 1536},
    },
    "large": {  # about 500 M
        "vision": {
            "kind": "vit",
            "stem": {"channels": (320, 640, 1280)},
            "width": 1280,
            "depth": 8,
            "heads": 20,
        },
        "language": {"kind": "transformer", "width": 768, "depth": 4, "heads": 12, "num_tokens": 4},
        "fusion": {"kind": "joint_attention", "width": 1280, "depth": 15, "heads": 20},
        "action": {"kind": "regression", "hidden": 2560},
    },
}


class ModelConfig(FrozenConfig):
    """The four parts of the model. Whatever is not given comes from the preset called `size`, key by key.

    `{size: small, fusion: {depth: 4}}` is `small` with a shallower fusion.
    """

    size: Size = Field(default="tiny", description="The preset: about 1, 28, 100 or 500 M parameters.")
    vision: VisionConfig = Field(default=VisionConfig(), description="The vision encoder.")
    language: LanguageConfig = Field(default=LanguageConfig(), description="The language encoder.")
    fusion: FusionConfig = Field(default=FusionConfig(), description="Where both and the state meet.")
    action: ActionDecoderConfig = Field(default=RegressionConfig(), description="The action decoder.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = PRESETS.get(given.get("size", "tiny"))
        return given if preset is None else merge(preset, given)

    @classmethod
    def preset(cls, size: Size) -> Self:
        """The preset of this size as it is."""
        return cls(size=size)

    def build(self, spec: DataSpec) -> VLA:
        """The model with fresh weights from torch's global generator. Raises UserError where sizes clash."""
        vision = self.vision.build(spec)
        language = self.language.build(spec)
        fusion = self.fusion.build(spec, vision.width, language.width)
        return VLA(spec, vision, language, fusion, self.action.build(spec, fusion.width))
