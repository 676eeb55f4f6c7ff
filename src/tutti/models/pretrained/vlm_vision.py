"""Vision tower and connector of a VLM as the vision encoder: pictures to tokens of its language model."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tutti.masks import tell, told
from tutti.models.interfaces import VisionEncoder
from tutti.models.layers import present_pictures
from tutti.models.pretrained.tower import Tower
from tutti.models.pretrained.vlm_config import VlmConfig
from tutti.types import DataSpec, Tokens


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


EYES: dict[str, type[VlmVision]] = {"smolvlm": IdeficsVision, "idefics3": IdeficsVision}
"""By the kind of VLM: how it sees."""
