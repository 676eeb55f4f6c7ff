"""VLA: an observation goes through vision, language and fusion; the action decoder reads the result."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tutti.models.interfaces import ActionDecoder, Fusion, LanguageEncoder, Past, VisionEncoder
from tutti.models.layers import to_floats
from tutti.types import DataSpec, Features, History, Observation, Robots, Tokens


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
        self.to_floats = to_floats  # compiled where a training compiles its blocks

    def forward(self, observation: Observation) -> Features:
        """Everything a loss term or the action decoder may read."""
        vision, language = self.encode(observation)
        past, state = self.recall(observation.history), observation.state
        return self.fuse(vision, language, state, observation.state_mask, past, robots=observation.robots)

    def encode(self, observation: Observation) -> tuple[Tokens, Tokens]:
        """Vision and language tokens before the fusion. Bytes become x / 127.5 - 1 here."""
        vision = self.vision(self.prepare(observation.images), observation.image_mask)
        return vision, self.language(observation.text, observation.text_mask)

    def recall(self, history: History | None) -> Past | None:
        """The tokens of the earlier pictures, encoded as the present ones are, with their states."""
        if history is None:
            return None
        images, mask = (part.flatten(0, 1) for part in (history.images, history.image_mask))
        seen = self.vision(self.prepare(images), mask)
        rows = len(history.state)
        vision = seen.apply(lambda part: part.reshape(rows, -1, *part.shape[2:]))
        return Past(vision=vision, state=history.state, state_mask=history.state_mask)

    def fuse(
        self,
        vision: Tokens,
        language: Tokens,
        state: Float[Tensor, "b s"],
        state_mask: Bool[Tensor, " b"],
        past: Past | None = None,
        *,
        robots: Robots | None = None,
    ) -> Features:
        """The features of already encoded images and texts, with the state where it is known, as far as the
        robot of each row has its dimensions."""
        if robots is not None and robots.state is not None:
            state = torch.where(robots.state, state, 0.0)
            past = past and replace(past, state=torch.where(robots.state[:, None], past.state, 0.0))
        fused = self.fusion(vision, language, state, state_mask, past, robots=robots)
        known: dict[str, Any] = {"fused_vision": fused.vision, "fused_language": fused.language}
        known |= {"readout": fused.readout, "layers": fused.layers, "state": fused.state}
        return Features(vision=vision, language=language, robots=robots, **known)

    if TYPE_CHECKING:
        __call__ = forward

    def prepare(self, images: Tensor) -> Float[Tensor, "b v 3 h w"]:
        """Bytes in [0, 255] to x / 127.5 - 1 in the model's own precision; floats are taken as prepared."""
        is_bytes = images.dtype == torch.uint8
        return self.to_floats(images, next(self.parameters()).dtype) if is_bytes else images

    @torch.no_grad()
    def predict(self, observation: Observation) -> Float[Tensor, "b t a"]:
        """The chunk of normalised actions to execute from `observation` on."""
        return self.action.predict(self(observation))
