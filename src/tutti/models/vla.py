"""The assembly: an observation goes through vision, language and fusion; the action decoder acts on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator
from torch import Tensor, nn

from tutti.models.decoders.bins import BinsConfig
from tutti.models.decoders.custom import CustomDecoderConfig
from tutti.models.decoders.diffusion import DiffusionConfig
from tutti.models.decoders.fast import FastConfig
from tutti.models.decoders.flow import FlowConfig
from tutti.models.decoders.regression import RegressionConfig
from tutti.models.fusion.joint_attention import JointAttentionConfig
from tutti.models.language.transformer import TextTransformerConfig
from tutti.models.sockets import ActionDecoder, Fusion, LanguageEncoder, VisionEncoder
from tutti.models.vision.vit import VisionTransformerConfig
from tutti.plugin import CUSTOM, tag_of
from tutti.types import DataSpec, Features, Observation

Size = Literal["tiny", "small", "base", "large"]

# Each socket's union of kinds: a further kind is one more member here, told apart by `kind`.
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


class ModelConfig(BaseModel):
    """The four sockets. Whatever is not given comes from the preset called `size`, key by key.

    `{size: small, fusion: {depth: 4}}` is `small` with a shallower fusion.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size = "tiny"
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    fusion: FusionConfig = FusionConfig()
    action: ActionDecoderConfig = RegressionConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = PRESETS.get(given.get("size", "tiny"))
        return given if preset is None else _merge(preset, given)

    @classmethod
    def preset(cls, size: Size) -> Self:
        """The preset of this size as it is."""
        return cls(size=size)

    def build(self, spec: DataSpec) -> VLA:
        """The model with fresh weights from torch's global generator. Raises UserError where sizes clash."""
        return VLA(self, spec)


def _merge(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `preset`, into nested mappings; another `kind` takes nothing from the preset."""
    merged = dict(preset)
    for key, value in given.items():
        below = preset.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            same_kind = value.get("kind", below.get("kind")) == below.get("kind")
            merged[key] = _merge(below, value) if same_kind else value
        else:
            merged[key] = value
    return merged


class VLA(nn.Module):
    """A vision-language-action model: four sockets, each replaceable on its own."""

    def __init__(self, config: ModelConfig, spec: DataSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision: VisionEncoder = config.vision.build(spec)
        self.language: LanguageEncoder = config.language.build(spec)
        self.fusion: Fusion = config.fusion.build(spec, self.vision.width, self.language.width)
        self.action: ActionDecoder = config.action.build(spec, self.fusion.width)

    def forward(self, observation: Observation) -> Features:
        """Everything a loss term or the action decoder may read. Bytes become x / 127.5 - 1 here."""
        images = self.prepare(observation.images)
        vision = self.vision(images, observation.image_mask)
        language = self.language(observation.text, observation.text_mask)
        readout, fused_vision = self.fusion(vision, language, observation.state)
        return Features(vision=vision, language=language, readout=readout, fused_vision=fused_vision)

    def __call__(self, observation: Observation) -> Features:
        return super().__call__(observation)

    def prepare(self, images: Tensor) -> Float[Tensor, "b v 3 h w"]:
        """Bytes in [0, 255] to x / 127.5 - 1 in the model's own precision; floats are taken as prepared."""
        if images.dtype != torch.uint8:
            return images
        return images.to(next(self.parameters()).dtype).div_(127.5).sub_(1.0)

    @torch.no_grad()
    def predict(self, observation: Observation) -> Float[Tensor, "b t a"]:
        """The chunk of normalised actions to execute from `observation` on."""
        return self.action.predict(self(observation))
