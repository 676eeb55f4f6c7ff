"""Config of the model: a preset size, and a union of kinds for each of its four parts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from tutti.frozen_config import FrozenConfig
from tutti.models.decoders.bins import BinsConfig
from tutti.models.decoders.denoising import DiffusionConfig, FlowConfig
from tutti.models.decoders.fast import FastConfig, VlmFastDecoder
from tutti.models.decoders.pi0 import Pi0Config, Pi0Decoder
from tutti.models.decoders.regression import RegressionConfig
from tutti.models.fusion.joint_attention import JointAttentionConfig
from tutti.models.interfaces import ActionDecoder, Fusion, LanguageEncoder, RobotKind, VisionEncoder
from tutti.models.language.transformer import TextTransformerConfig
from tutti.models.pretrained.config import FolderConfig, PicturesConfig, TextsConfig
from tutti.models.pretrained.language import PretrainedText, PretrainedTextConfig
from tutti.models.pretrained.lora import merged
from tutti.models.pretrained.tower import Loaded, Read
from tutti.models.pretrained.vision import PretrainedVision, PretrainedVisionConfig
from tutti.models.pretrained.vlm import VlmFusion, VlmLanguage, build_vlm
from tutti.models.pretrained.vlm_config import (
    VlmConfig,
    VlmFusionConfig,
    VlmLanguageConfig,
    VlmVisionConfig,
)
from tutti.models.pretrained.vlm_vision import VlmVision
from tutti.models.vision.vit import VisionTransformerConfig
from tutti.models.vla import VLA
from tutti.nested_dicts import merge
from tutti.plugin import CUSTOM, CustomConfig, tag_of
from tutti.storage.text_source import TextSource
from tutti.types import DataSpec

Size = Literal["tiny", "small", "base", "large"]


class CustomDecoderConfig(CustomConfig[ActionDecoder]):
    """`kind: "package.module:Class"`, an `ActionDecoder`: `Class(spec, width, **options)`.

    `width` is the d of the readout and of the fused vision tokens.
    """

    base, key = ActionDecoder, "model.action.kind"


# The union of kinds of each part: a further kind is one more member here, told apart by `kind`.
VisionConfig = Annotated[
    VisionTransformerConfig | PretrainedVisionConfig | VlmVisionConfig, Field(discriminator="kind")
]
LanguageConfig = Annotated[
    TextTransformerConfig | PretrainedTextConfig | VlmLanguageConfig, Field(discriminator="kind")
]
FusionConfig = Annotated[JointAttentionConfig | VlmFusionConfig, Field(discriminator="kind")]
ActionDecoderConfig = Annotated[
    Annotated[RegressionConfig, Tag("regression")]
    | Annotated[FlowConfig, Tag("flow")]
    | Annotated[DiffusionConfig, Tag("diffusion")]
    | Annotated[BinsConfig, Tag("bins")]
    | Annotated[FastConfig, Tag("fast")]
    | Annotated[Pi0Config, Tag("pi0")]
    | Annotated[CustomDecoderConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]

# About 1, 28, 100 and 500 M parameters; `tiny` learns from scratch on a CPU within minutes.
_SIZES: dict[Size, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = {
    # stem channels, vision, language, fusion (width, depth, heads; language: tokens), hidden of the action
    "tiny": ((64, 128, 128), (128, 1, 4), (64, 2, 4, 1), (128, 2, 4), 256),
    "small": ((96, 192, 384), (384, 6, 6), (256, 3, 4, 4), (384, 8, 6), 768),
    "base": ((192, 384, 768), (768, 4, 12), (512, 3, 8, 4), (768, 8, 12), 1536),
    "large": ((320, 640, 1280), (1280, 8, 20), (768, 4, 12, 4), (1280, 15, 20), 2560),
}
_TRUNKS: dict[Size, tuple[int, ...]] = {
    # width, depth, heads of the decoders that are a small transformer
    "tiny": (96, 2, 4),
    "small": (256, 4, 4),
    "base": (512, 4, 8),
    "large": (1024, 8, 16),
}
_KEYS = ("width", "depth", "heads", "num_tokens")
PRESETS: dict[Size, dict[str, dict[str, Any]]] = {
    size: {
        "vision": {"kind": "vit", "stem": {"channels": channels}, **dict(zip(_KEYS, vision, strict=False))},
        "language": {"kind": "transformer", **dict(zip(_KEYS, language, strict=True))},
        "fusion": {"kind": "joint_attention", **dict(zip(_KEYS, fusion, strict=False))},
        "action": {"kind": "regression", "hidden": hidden},
    }
    for size, (channels, vision, language, fusion, hidden) in _SIZES.items()
}


VLM = ("vision", "language", "fusion")
"""The parts that a vision-language model fills."""


def preset_of(size: Any, decoder: Any, *, vlm: bool = False) -> dict[str, Any]:
    """The keys that a size stands for, beside a decoder of this kind; none where there is no such size."""
    if not isinstance(size, str) or size not in PRESETS:
        return {}
    preset = PRESETS[size] | ({part: {"kind": "vlm"} for part in VLM} if vlm else {})
    if decoder in ("flow", "diffusion", "bins", "fast"):
        return preset | {"action": {"kind": decoder, **dict(zip(_KEYS, _TRUNKS[size], strict=False))}}
    return preset


class ModelConfig(FrozenConfig):
    """The four parts of the model. Whatever is not given comes from the preset called `size`, key by key.

    `{size: small, fusion: {depth: 4}}` is `small` with a shallower fusion.
    """

    size: Size = Field(default="tiny", description="The preset: about 1, 28, 100 or 500 M parameters.")
    vlm: VlmConfig | None = Field(
        default=None, description="A vision-language model that is vision, language and fusion at once."
    )
    vision: VisionConfig = Field(default=VisionTransformerConfig(), description="The vision encoder.")
    language: LanguageConfig = Field(default=TextTransformerConfig(), description="The language encoder.")
    fusion: FusionConfig = Field(default=JointAttentionConfig(), description="Where both and the state meet.")
    action: ActionDecoderConfig = Field(default=RegressionConfig(), description="The action decoder.")
    embodiment: Literal["shared"] | RobotKind = Field(
        default="shared",
        description="How several robots share the model. shared: all of it. projection: state and actions of "
        "each have projections of their own. prompt: a learned vector of each is added to the readout token.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        size, action = given.get("size", "tiny"), given.get("action")
        kind = action.get("kind") if isinstance(action, dict) else None
        return merge(preset_of(size, kind, vlm=given.get("vlm") is not None), given)

    @model_validator(mode="after")
    def _vlm_is_three_parts(self) -> Self:
        given = "model.vlm is given" if self.vlm else "there is no model.vlm"
        for name in VLM:
            if (getattr(self, name).kind == "vlm") != (self.vlm is not None):
                raise ValueError(
                    f"{name}.kind is {getattr(self, name).kind}, but {given}, which is vision, language and "
                    f"fusion at once. Take model.{name} out, or set model.{name}.kind=vlm and model.vlm.path"
                )
        if getattr(self.action, "cross_attention", False) == "layers" and self.vlm is None:
            raise ValueError(
                "action.cross_attention is layers, those of model.vlm, and there is none. Name one, or set "
                "model.action.cross_attention=fused"
            )
        if isinstance(self.action, Pi0Config) and self.embodiment != "shared":
            raise ValueError(
                f"embodiment is {self.embodiment}, but model.action.kind is pi0, whose expert knows neither "
                "projections of robots nor a prompt. Set model.embodiment=shared"
            )
        return self

    def encoders(self, spec: DataSpec) -> tuple[VisionEncoder, LanguageEncoder, Fusion]:
        """What the action decoder reads."""
        if isinstance(self.vision, VlmVisionConfig) and isinstance(self.fusion, VlmFusionConfig):
            assert self.vlm is not None
            return build_vlm(self.vlm, self.vision, self.fusion, spec)
        assert not isinstance(self.vision, VlmVisionConfig)
        assert not isinstance(self.language, VlmLanguageConfig)
        assert not isinstance(self.fusion, VlmFusionConfig)
        vision = self.vision.build(spec)
        language = self.language.build(spec)
        return vision, language, self.fusion.build(spec, vision.width, language.width)

    def build(self, spec: DataSpec) -> VLA:
        """The model with fresh weights from torch's global generator. Raises UserError where sizes clash."""
        vision, language, fusion = self.encoders(spec)
        reads = fusion if isinstance(self.action, Pi0Config) else fusion.width
        action: ActionDecoder = self.action.build(spec, reads)  # pyright: ignore[reportArgumentType]
        if isinstance(action, VlmFastDecoder):
            action.write_by(language)
        count = len(spec.embodiments)
        if self.embodiment != "shared" and count > 1:
            fusion.tell_robots(count, self.embodiment)
            if self.embodiment == "projection":
                action.separate_robots(count)
        return VLA(spec, vision, language, fusion, action)

    @property
    def text_source(self) -> TextSource | None:
        """The tokenizer that the language encoder was trained with; None: one is fitted to the data."""
        texts = self.vlm or self.language
        return texts.source() if isinstance(texts, TextsConfig) else None

    def picture_size(self) -> int | None:
        """The edge of the pictures that the vision tower was trained with; None: it is no tower."""
        seeing = self.vlm or self.vision
        return seeing.picture_size() if isinstance(seeing, PicturesConfig) else None

    def towers(self) -> dict[str, FolderConfig]:
        """What comes out of folders, by its key."""
        keys = {"vlm": self.vlm, "vision": self.vision, "language": self.language}
        return {name: one for name, one in keys.items() if isinstance(one, FolderConfig)}

    def resolved(self) -> ModelConfig:
        """The same with what a checkpoint must hold of its towers."""
        return self.model_copy(update={name: one.resolved() for name, one in self.towers().items()})


WithTower = PretrainedVision | PretrainedText | VlmVision | VlmLanguage | VlmFusion | Pi0Decoder


def pretrained_parts(model: VLA) -> dict[str, WithTower]:
    """The parts of a model that have a pre-trained tower, by their socket."""
    parts = {"vision": model.vision, "language": model.language, "fusion": model.fusion}
    parts |= {"action": model.action}
    return {name: one for name, one in parts.items() if isinstance(one, WithTower)}


def load_towers(model: VLA, given: Collection[str] = ()) -> dict[str, Loaded]:
    """Fills the pre-trained towers of `model` from their folders, by socket; not one whose weights are
    random, or of which all that a checkpoint leaves out is among the tensors `given`, those of the model.

    Raises: UserError if a folder is not there, or does not hold the tower.
    """
    loaded: dict[str, Loaded] = {}
    known: dict[str, Read] = {}
    for socket, part in pretrained_parts(model).items():
        if part.tower.config.weights == "random":
            continue
        outside = {f"{socket}.tower.{name}" for name in part.tower.outside()}
        if not given or not outside <= set(given):
            loaded[socket] = part.tower.load(known)
    return loaded


def exported(
    config: ModelConfig, spec: DataSpec, tensors: dict[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of an export: with the weights of frozen towers, and LoRA's factors merged.

    Raises: UserError if a tower is needed whose folder is not there, or holds other weights.
    """
    if not (towers := config.towers()):
        return config, tensors
    model = config.build(spec)
    model.load_state_dict(tensors)
    load_towers(model, tensors)
    tensors = dict(tensors)
    for socket, part in pretrained_parts(model).items():
        outside = {f"{socket}.tower.{name}": value for name, value in part.tower.outside().items()}
        tensors |= {name: value.detach().clone() for name, value in outside.items() if name not in tensors}
    own = {socket: one.exported() for socket, one in towers.items()}
    return config.model_copy(update=own), merged(tensors)
