"""Vision tower and connector of a VLM as the vision encoder: pictures to tokens of its language model."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tutti.masks import tell, told
from tutti.models.interfaces import VisionEncoder
from tutti.models.layers import present_pictures
from tutti.models.pretrained.tower import Tower
from tutti.models.pretrained.vlm_config import VlmConfig
from tutti.types import DataSpec, Tokens, UserError

QWEN_GEOMETRY = (
    "get_vision_position_ids",
    "get_vision_window_index",
    "get_vision_interpolation_indices_and_weights",
)
"""What transformers computes of the sizes of Qwen's pictures, and takes from outside, since 5.15."""


class VlmVision(VisionEncoder):
    """The tokens that a VLM makes of each view, row by row, the views one behind the other.

    Pictures come in [-1, 1] and are brought to the colours of the tower here.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: VlmConfig, tower: Tower, spec: DataSpec, *, withhold: bool) -> None:
        super().__init__()
        self.tower, self.withhold = tower, withhold
        self.views, self.image_size = len(spec.views), spec.image_size
        scale, shift = config.affine()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    @abstractmethod
    def maps(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """The tokens of pictures in the tower's own colours."""

    def measure(self) -> None:
        """Learns from one blank picture how many tokens there are, and how wide."""
        with torch.no_grad():
            tokens = self.maps(torch.zeros(1, 3, self.image_size, self.image_size))
        _, self.tokens_per_view, self.width = tokens.shape

    def forward(self, images: Float[Tensor, "b v 3 h w"], image_mask: Bool[Tensor, "b v"]) -> Tokens:
        """Pictures in [-1, 1] to (b, v * tokens_per_view, width); an absent view's tokens are masked."""
        images, image_mask = present_pictures(
            images, image_mask, views=self.views, size=self.image_size, withhold=self.withhold
        )
        b, v = image_mask.shape
        with torch.no_grad() if self.tower.still else nullcontext():
            values = self.maps(images.flatten(0, 1) * self.scale + self.shift).unflatten(0, (b, v))
        mask = image_mask[:, :, None].expand(b, v, self.tokens_per_view).flatten(1)
        return Tokens(values=values.flatten(1, 2), mask=tell(mask, told(image_mask)))


class IdeficsVision(VlmVision):
    """SmolVLM, SmolVLM2 and Idefics 3: a SigLIP whose patches find their position by their place in the
    picture, from 0 to 1, and a connector that folds neighbours into width (pixel shuffle), then projects."""

    places: Tensor

    def __init__(self, config: VlmConfig, tower: Tower, spec: DataSpec, *, withhold: bool) -> None:
        super().__init__(config, tower, spec, withhold=withhold)
        network: Any = tower.network
        seeing, fold = network.vision_model.config, network.connector.scale_factor
        config.check_size(spec.image_size, seeing.patch_size * fold, seeing.image_size)
        side, rows = seeing.image_size // seeing.patch_size, spec.image_size // seeing.patch_size
        # As they do it, in float32: the place i / rows falls between two of the borders j / side.
        borders = torch.arange(1 / side, 1.0, 1 / side)
        place = (torch.arange(rows) * (1.0 / torch.tensor(rows))).clamp(max=1.0 - 1e-6)
        row = torch.bucketize(place, borders, right=True)
        self.register_buffer("places", (row[:, None] * side + row).flatten(), persistent=False)

    def maps(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Their embeddings, without the mask of patches, which looks at values."""
        network: Any = self.tower.network
        vision = network.vision_model
        x = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = x + vision.embeddings.position_embedding(self.places)
        for block in vision.encoder.layers:
            x = block(x, None)
        return network.connector(vision.post_layernorm(x))


class PaliGemmaVision(VlmVision):
    """PaliGemma 1 and 2: a SigLIP and a linear layer."""

    def __init__(self, config: VlmConfig, tower: Tower, spec: DataSpec, *, withhold: bool) -> None:
        super().__init__(config, tower, spec, withhold=withhold)
        network: Any = tower.network
        seeing = network.vision_tower.config
        stretched = config.check_size(spec.image_size, seeing.patch_size, seeing.image_size)
        self.named = {"interpolate_pos_encoding": True} if stretched else {}

    def maps(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """One token a patch."""
        network: Any = self.tower.network
        return network.multi_modal_projector(network.vision_tower(pixels, **self.named).last_hidden_state)


class QwenVision(VlmVision):
    """Qwen 2.5 VL and 3 VL: pictures of any size as a list of patches, square by square of those that become
    one token, each picture twice, as the two frames of a film that stands still.

    Its network asks what the sizes are and looks at the answers; here they are the same for all pictures, so
    what follows from them is computed once. Qwen 3 VL's features for the first blocks of its decoder stand
    behind the tokens, on the last axis.
    """

    own: tuple[str, ...]

    def __init__(self, config: VlmConfig, tower: Tower, spec: DataSpec, *, withhold: bool) -> None:
        super().__init__(config, tower, spec, withhold=withhold)
        network: Any = tower.network
        seeing = network.visual.config
        self.patch, self.merge, self.frames = (
            seeing.patch_size,
            seeing.spatial_merge_size,
            seeing.temporal_patch_size,
        )
        config.check_size(spec.image_size, self.patch * self.merge, spec.image_size)
        try:
            library = import_module("transformers.vision_utils")
            positions, windows_of, interpolated = (getattr(library, name) for name in QWEN_GEOMETRY)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{config.key}: a {config.values()['model_type']} needs transformers 5.15 or later "
                f"({error}).\n  cure: pip install 'transformers>=5.15,<6'"
            ) from error
        side = spec.image_size // self.patch
        found: dict[str, Tensor] = {}
        with unset_fake_temporarily(), torch.device("cpu"):
            sizes = torch.tensor([[1, side, side]])
            found["position_ids"] = positions(sizes, self.merge)
            if hasattr(seeing, "window_size"):
                found["window_index"], windows = windows_of(
                    sizes,
                    spatial_merge_size=self.merge,
                    window_size=seeing.window_size,
                    patch_size=self.patch,
                )
                self.windows: list[int] = windows.tolist()
            else:
                found["interp_indices"], found["interp_weights"] = interpolated(
                    sizes,
                    num_grid_per_side=network.visual.num_grid_per_side,
                    mode=network.visual.interpolation_mode,
                    align_corners=network.visual.interpolation_align_corners,
                    spatial_merge_size=self.merge,
                )
            plain = {name: value.tolist() for name, value in found.items()}
        for name, value in plain.items():
            self.register_buffer(name, torch.tensor(value), persistent=False)
        self.own = tuple(plain)

    def maps(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """One token a square of patches."""
        network: Any = self.tower.network
        b, side, count = len(pixels), pixels.shape[-1] // self.patch, (pixels.shape[-1] // self.patch) ** 2
        cells = side // self.merge
        x = pixels.view(b, 3, cells, self.merge, self.patch, cells, self.merge, self.patch)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        x = x.expand(*x.shape[:6], self.frames, *x.shape[7:]).flatten(5).flatten(0, 4)
        known: dict[str, Any] = {name: self.get_buffer(name).repeat(b, 1) for name in self.own}
        # Plain numbers, which cost a GPU no wait: where each picture, and each window of it, ends.
        known["cu_seqlens"] = np.arange(b + 1) * count
        if "window_index" in known:
            begins = torch.arange(b, device=x.device)[:, None] * cells**2
            known["window_index"] = (known["window_index"] + begins).flatten()
            ends = np.arange(b)[:, None] * count + np.array(self.windows[1:])
            known["cu_window_seqlens"] = np.concatenate([[0], ends.flatten()])
        sizes = torch.tensor([[1, side, side]], device=x.device).expand(b, 3)
        found = network.visual(x, grid_thw=sizes, **known)
        tokens = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
        return torch.cat(tokens, dim=-1).unflatten(0, (b, cells**2))


EYES: dict[str, type[VlmVision]] = {
    "smolvlm": IdeficsVision,
    "idefics3": IdeficsVision,
    "paligemma": PaliGemmaVision,
    "qwen2_5_vl": QwenVision,
    "qwen3_vl": QwenVision,
}
"""By the kind of VLM: how it sees."""
