"""What is known of each kind of tower, by the `model_type` of its config.json: the one table of facts.

The names are those of transformers 5.9 to 5.24, which loads older files under them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Socket = Literal["vision", "language", "vlm"]
Colours = tuple[float, float, float]

HALF: Colours = (0.5, 0.5, 0.5)
IMAGENET: tuple[Colours, Colours] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP: tuple[Colours, Colours] = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LITE: tuple[Colours, Colours] = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One kind of tower.

    `network` is its class in transformers, "" for Tutti's own EfficientNet; `blocks` the list of what repeats
    in depth, `tail` what follows it, which an earlier layer is read without. `unread` are modules and
    parameters that no token depends on, `others` the beginnings of tensors in a file that are of other parts.
    `front` tokens stand before those of the picture, and the registers. `positions`: a text may have no more
    tokens than `max_position_embeddings`, less so many. `sizes`: pictures of another size than the tower's
    are refused ("own"), or take `interpolate: true`, which is handed on ("flag") or not ("itself"), or are
    taken ("any").

    A VLM (socket "vlm") is three parts: `seeing` are the modules of its vision, whose blocks are `blocks`;
    `decoder` is the language model, whose first token has the position `first`; with `grid` a position is
    time, row and column.
    """

    socket: Socket
    network: str
    blocks: str
    tail: str = ""
    unread: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    front: int = 0
    convolutional: bool = False
    sizes: Literal["own", "flag", "itself", "any"] = "any"
    mean: Colours = HALF
    std: Colours = HALF
    positions: int | None = None
    seeing: tuple[str, ...] = ()
    decoder: str = ""
    first: int = 0
    grid: bool = False


_VIT = {"socket": "vision", "mean": IMAGENET[0], "std": IMAGENET[1]}
_DINO = {**_VIT, "front": 1, "unread": ("embeddings.mask_token",)}
_BERT = {"socket": "language", "blocks": "encoder.layer", "positions": 0}
_BERT |= {"unread": ("pooler",), "others": ("cls.", "lm_head.", "qa_outputs.", "classifier.")}
_CAUSAL = {"socket": "language", "blocks": "layers", "tail": "norm", "others": ("lm_head.",)}
_T5: dict[str, Any] = {"socket": "language", "blocks": "encoder.block", "tail": "encoder.final_layer_norm"}
_T5 |= {"others": ("decoder.", "lm_head.")}
_CONVNEXT: dict[str, Any] = {**_VIT, "blocks": "encoder.stages", "unread": ("layernorm",)}
_CONVNEXT |= {"others": ("classifier.",)}
_VLM: dict[str, Any] = {"socket": "vlm", "others": ("lm_head.",)}
_IDEFICS = {**_VLM, "seeing": ("vision_model", "connector"), "blocks": "vision_model.encoder.layers"}
_IDEFICS |= {"decoder": "text_model", "sizes": "itself"}
_QWEN = {**_VLM, "seeing": ("visual",), "blocks": "visual.blocks", "decoder": "language_model", "grid": True}

FACTS: dict[str, Facts] = {
    "siglip_vision_model": Facts(
        socket="vision",
        network="SiglipVisionModel",
        blocks="encoder.layers",
        tail="post_layernorm",
        unread=("head",),
        others=("text_model.", "logit_"),
        sizes="flag",
    ),
    "clip_vision_model": Facts(
        socket="vision",
        network="CLIPVisionModel",
        blocks="encoder.layers",
        unread=("post_layernorm",),
        others=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
        front=1,
        sizes="flag",
        mean=CLIP[0],
        std=CLIP[1],
    ),
    "dinov2": Facts(**_DINO, network="Dinov2Model", blocks="encoder.layer", tail="layernorm", sizes="itself"),
    "dinov2_with_registers": Facts(
        **_DINO, network="Dinov2WithRegistersModel", blocks="encoder.layer", tail="layernorm", sizes="itself"
    ),
    "dinov3_vit": Facts(**_DINO, network="DINOv3ViTModel", blocks="model.layer", tail="norm"),
    "vit": Facts(
        **{**_VIT, "mean": HALF, "std": HALF},
        network="ViTModel",
        blocks="layers",
        tail="layernorm",
        unread=("pooler",),
        others=("classifier.",),
        front=1,
        sizes="flag",
    ),
    "ijepa": Facts(
        **_VIT, network="IJepaModel", blocks="layers", tail="layernorm", unread=("pooler",), sizes="flag"
    ),
    "aimv2_vision_model": Facts(
        socket="vision",
        network="Aimv2VisionModel",
        blocks="encoder.layers",
        tail="rms_norm",
        unread=("head",),
        others=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
        mean=CLIP[0],
        std=CLIP[1],
        sizes="own",
    ),
    "resnet": Facts(
        **_VIT, network="ResNetModel", blocks="encoder.stages", others=("classifier.",), convolutional=True
    ),
    "convnextv2": Facts(**_CONVNEXT, network="ConvNextV2Model", convolutional=True),
    "efficientnet_lite0": Facts(
        socket="vision", network="", blocks="blocks", convolutional=True, mean=LITE[0], std=LITE[1]
    ),
    "clip_text_model": Facts(
        socket="language",
        network="CLIPTextModel",
        blocks="encoder.layers",
        tail="final_layer_norm",
        others=("vision_model.", "text_projection.", "visual_projection.", "logit_scale"),
        positions=0,
    ),
    "t5": Facts(**_T5, network="T5EncoderModel"),
    "mt5": Facts(**_T5, network="MT5EncoderModel"),
    "bert": Facts(**_BERT, network="BertModel"),
    # Their first position is that behind the padding's id.
    "roberta": Facts(**{**_BERT, "positions": 2}, network="RobertaModel"),
    "xlm-roberta": Facts(**{**_BERT, "positions": 2}, network="XLMRobertaModel"),
    "distilbert": Facts(
        **{**_BERT, "blocks": "transformer.layer", "unread": (), "others": ("vocab_", "classifier.")},
        network="DistilBertModel",
    ),
    "electra": Facts(
        socket="language",
        network="ElectraModel",
        blocks="encoder.layer",
        others=("generator_", "discriminator_", "classifier."),
        positions=0,
    ),
    "gemma": Facts(**_CAUSAL, network="GemmaModel"),
    "gemma2": Facts(**_CAUSAL, network="Gemma2Model"),
    "gemma3_text": Facts(**_CAUSAL, network="Gemma3TextModel"),
    "llama": Facts(**_CAUSAL, network="LlamaModel"),
    "mistral": Facts(**_CAUSAL, network="MistralModel"),
    "qwen2": Facts(**_CAUSAL, network="Qwen2Model"),
    "qwen3": Facts(**_CAUSAL, network="Qwen3Model"),
    "smollm3": Facts(**_CAUSAL, network="SmolLM3Model"),
    "smolvlm": Facts(**_IDEFICS, network="SmolVLMModel"),
    "idefics3": Facts(**_IDEFICS, network="Idefics3Model"),
    "paligemma": Facts(
        **_VLM,
        network="PaliGemmaModel",
        seeing=("vision_tower", "multi_modal_projector"),
        blocks="vision_tower.encoder.layers",
        unread=("vision_tower.head",),
        decoder="language_model",
        first=1,
        sizes="flag",
    ),
    "qwen2_5_vl": Facts(**_QWEN, network="Qwen2_5_VLModel", mean=CLIP[0], std=CLIP[1]),
    "qwen3_vl": Facts(**_QWEN, network="Qwen3VLModel"),
}

SECTIONS: dict[tuple[str, Socket], tuple[str, str]] = {
    ("siglip", "vision"): ("vision_config", "siglip_vision_model"),
    ("clip", "vision"): ("vision_config", "clip_vision_model"),
    ("clip", "language"): ("text_config", "clip_text_model"),
}
"""Where the config.json of a whole model has that of a tower, and which kind of tower it is."""


GEMMA_2B: dict[str, Any] = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        **{
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
        },
        **{"patch_size": 14, "image_size": 224, "vision_use_head": False},
    },
    "text_config": {
        "model_type": "gemma",
        **{"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "vocab_size": 257152},
        **{"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256},
    },
    **{"projection_dim": 2048, "image_token_id": 257152},
}
GEMMA_300M: dict[str, Any] = {
    **GEMMA_2B["text_config"],
    **{"hidden_size": 1024, "intermediate_size": 4096},
}
"""The two networks of pi0 (2410.24164), which a config.json of it need not describe."""
VARIANTS = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
"""What lerobot calls them: the only ones of which a checkpoint is known."""


BEFORE = ("model.", "bert.", "roberta.", "distilbert.", "vision_model.", "siglip.", "clip.")
"""What the names in a file may begin with, where it is of a whole model."""

OUTPUT = "lm_head"
WRITERS = {"vlm": "AutoModelForImageTextToText", "language": "AutoModelForCausalLM"}
"""Where the output layer lies beside a network, which these classes have as their `model`."""
PI0, WHOLE, EXPERT = "PI0ForConditionalGeneration", "model.vlm.", "model.dit"
"""The class of a checkpoint in pi0's format; where it has the VLM and the expert."""
POLICY = {r"^model\.(?=paligemma_with_expert|state_proj|action_)": ""}
"""How transformers, which knows the names of lerobot's network, finds them in a policy that lerobot saves."""
EXPERT_KEYS = ("max_state_dim", "max_action_dim", "min_period", "max_period")


def of_pi0(found: dict[str, Any]) -> dict[str, Any] | None:
    """The VLM of a config.json in pi0's format, that of transformers or of lerobot, with the rest of it as
    `action_expert`; None if it is of another."""
    lerobot = found.get("type") == "pi0" and all(found.get(key) == name for key, name in VARIANTS.items())
    if found.get("model_type") != "pi0" and not lerobot:
        return None
    expert = {**GEMMA_300M, **(found.get("dit_config") or {})}
    rest = {key: found[key] for key in EXPERT_KEYS if key in found}
    vlm = found.get("vlm_config") or GEMMA_2B
    return {**vlm, "model_type": "paligemma", "action_expert": {"dit_config": expert, **rest}}


def kinds(socket: Socket) -> list[str]:
    """The kinds of towers for this socket, in words for a message."""
    return [name for name, facts in FACTS.items() if facts.socket == socket]


def known_kinds() -> set[tuple[str, str]]:
    """What a folder's `model_type` may be, for each socket."""
    return {(name, facts.socket) for name, facts in FACTS.items()} | {*SECTIONS}
