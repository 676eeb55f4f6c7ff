"""VLA: an observation goes through vision, language and fusion; the action decoder reads the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tutti.models.interfaces import ActionDecoder, Fusion, LanguageEncoder, VisionEncoder
from tutti.types import DataSpec, Features, Observation, Tokens


class VLA(nn.Module):
    """A vision-language-action model: four parts, each replaceable on its own."""

    def __init__(
        self,
        spec: DataSpec,
        vision: VisionEncoder,
        language: LanguageEncoder,
        fusion: Fusion,
        action: ActionDecoder,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.vision = vision
        self.language = language
        self.fusion = fusion
        self.action = action

    def forward(self, observation: Observation) -> Features:
        """Everything a loss term or the action decoder may read."""
        vision, language = self.encode(observation)
        return self.fuse(vision, language, observation.state, observation.state_mask)

    def encode(self, observation: Observation) -> tuple[Tokens, Tokens]:
        """Vision and language tokens before the fusion. Bytes become x / 127.5 - 1 here."""
        vision = self.vision(self.prepare(observation.images), observation.image_mask)
        return vision, self.language(observation.text, observation.text_mask)

    def fuse(
        self, vision: Tokens, language: Tokens, state: Float[Tensor, "b s"], state_mask: Bool[Tensor, " b"]
    ) -> Features:
        """The features of already encoded images and texts, with the state where it is known."""
        readout, fused_vision = self.fusion(vision, language, state, state_mask)
        return Features(vision=vision, language=language, readout=readout, fused_vision=fused_vision)

    if TYPE_CHECKING:
        __call__ = forward

    def prepare(self, images: Tensor) -> Float[Tensor, "b v 3 h w"]:
        """Bytes in [0, 255] to x / 127.5 - 1 in the model's own precision; floats are taken as prepared."""
        if images.dtype != torch.uint8:
            return images
        return images.to(next(self.parameters()).dtype).div_(127.5).sub_(1.0)

    @torch.no_grad()
    def predict(self, observation: Observation) -> Float[Tensor, "b t a"]:
        """The chunk of normalised actions to execute from `observation` on."""
        return self.action.predict(self(observation))
