"""A pre-trained vision tower as the vision encoder: pictures in its own colours to tokens of its width."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tutti.masks import readable, tell, told
from tutti.models.interfaces import VisionEncoder
from tutti.models.layers import present_pictures, space_to_depth
from tutti.models.pretrained.config import PicturesConfig, TowerConfig
from tutti.models.pretrained.facts import Socket
from tutti.models.pretrained.hub import transformers
from tutti.models.pretrained.remembered import Remembered
from tutti.models.pretrained.tower import Tower, projection
from tutti.nested_dicts import content_hash
from tutti.storage.files import cache_home
from tutti.types import DataSpec, Tokens, UserError


class PretrainedVisionConfig(TowerConfig, PicturesConfig):
    """`kind: pretrained`, a vision tower that others have trained; docs/how-to/pretrained-towers.md."""

    socket: ClassVar[Socket] = "vision"

    kind: Literal["pretrained"]
    shuffle: PositiveInt = Field(
        default=1, description="So many x so many neighbouring tokens become one, as many times as wide."
    )
    cache: int = Field(
        default=0,
        ge=0,
        description="MiB of tokens that a tower with learn: none keeps on disk, for all runs, in the folder "
        "of caches ($TUTTI_CACHE); each picture is computed alone, once. 0: none.",
    )
    withhold: bool = Field(
        default=False,
        description="true: all views are withheld, in training and in use: the control that never sees.",
    )

    @model_validator(mode="after")
    def _caches_what_stays(self) -> Self:
        if self.cache and self.learn != "none":
            raise ValueError("cache is for learn: none; the tokens of a tower that learns change")
        if self.cache and self.weights == "random":
            raise ValueError("cache is for weights: pretrained; random ones are others in the next run")
        return self

    def build(self, spec: DataSpec) -> PretrainedVision:
        """The encoder for pictures of `spec`, random until its tower is loaded.

        Raises: UserError if the tower cannot be built, or takes no pictures of that size.
        """
        return PretrainedVision(self, spec)


class PretrainedVision(VisionEncoder):
    """The tower's tokens of each view, and a learned vector for each view, 0 at first.

    Pictures of s x s pixels give (s / patch / shuffle)^2 tokens, row by row, where a convolutional tower's
    stride is its patch; views follow one another. Class token and registers are left out. Pictures come in
    [-1, 1] and are brought to the colours of the tower here: ((x + 1) / 2 - mean) / std.

    `grid` is the edge of what the tower gives, before the shuffle.
    """

    position: nn.Parameter
    scale: Tensor
    shift: Tensor

    def __init__(self, config: PretrainedVisionConfig, spec: DataSpec) -> None:
        super().__init__()
        self.tower = Tower(config)
        self.remembered = Remembered(config.remember, config.cache, cache_home() if config.cache else Path())
        self.withhold, self.shuffle, self.image_size = config.withhold, config.shuffle, spec.image_size
        scale, shift = config.affine()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        facts, values, size = self.tower.facts, self.tower.values, self.image_size
        # Sines of AIMv2's native towers tell any place.
        own = size if facts.convolutional or values.get("is_native") else values.get("image_size", size)
        patch = 1 if facts.convolutional else values.get("patch_size", 1)
        stretched = config.check_size(size, patch, own)
        self.named = {"interpolate_pos_encoding": True} if stretched and facts.sizes == "flag" else {}
        with torch.no_grad():
            map_ = self.maps(torch.zeros(1, 3, spec.image_size, spec.image_size))
        _, features, self.grid, _ = map_.shape
        width = features // len(config.layers)
        self.record_bytes = 4 * features * self.grid**2 if config.cache else 0  # of a picture on disk
        self.project = projection(config, width)
        if self.grid % config.shuffle:
            raise UserError(
                f"model.vision.shuffle is {config.shuffle}, but the tower gives {self.grid} x {self.grid} "
                "tokens a view.\n  expected: a divisor of it"
            )
        self.width = width * config.shuffle**2
        self.tokens_per_view = (self.grid // config.shuffle) ** 2
        self.position = nn.Parameter(torch.zeros(len(spec.views), 1, self.width))

    def forward(self, images: Float[Tensor, "b v 3 h w"], image_mask: Bool[Tensor, "b v"]) -> Tokens:
        """Pictures in [-1, 1] to (b, v * tokens_per_view, width); an absent view's tokens are masked."""
        images, image_mask = present_pictures(
            images, image_mask, views=len(self.position), size=self.image_size, withhold=self.withhold
        )
        b, v = image_mask.shape
        with torch.no_grad() if self.tower.still else nullcontext():
            pictures = images.flatten(0, 1)
            self.remembered.forget_others(self.tower.filled)
            if self.remembered.memory and not self.remembered.disk and readable(pictures):
                seen = self.remembered.tokens(pictures, self.tokens)
            elif (about := self._computed_from(pictures)) is not None:
                # A policy that acts reads what is kept, and adds no picture of its own.
                seen = self.remembered.tokens(pictures, self.tokens, about, keep=self.training).to(
                    pictures.dtype
                )
            else:
                seen = self.tokens(pictures)
        n = self.tokens_per_view
        seen = self._folded(seen if self.project is None else self.project(seen))
        values = (seen.view(b, v, n, self.width) + self.position).flatten(1, 2)
        mask = tell(image_mask[:, :, None].expand(b, v, n).reshape(b, v * n), told(image_mask))
        return Tokens(values=values, mask=mask)

    def _computed_from(self, pictures: Tensor) -> dict[str, Any] | None:
        """All that the tokens on disk depend on besides the picture; None: they are not looked for."""
        loaded, fake = self.tower.loaded, isinstance(pictures, FakeTensor) or torch.compiler.is_compiling()
        if fake or not self.remembered.disk or loaded is None:
            return None
        kind, key = pictures.device.type, self.tower.config.key
        casts = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
        return {
            "kind": loaded.kind,
            "sha256": loaded.sha256,
            "architecture": content_hash(self.tower.values, 20),
            "layers": list(self.tower.places),
            "output": -1 in self.tower.config.layers,  # pyright: ignore[reportAttributeAccessIssue]
            "image_size": self.image_size,
            "colours": [self.scale.flatten().tolist(), self.shift.flatten().tolist()],
            "numbers": [str(pictures.dtype), str(casts), kind],
            "torch": torch.__version__,
            "transformers": transformers(key).__version__ if self.tower.facts.network else "",
        }

    def tokens(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """The tower's own tokens of pictures in [-1, 1]; of several layers side by side."""
        return self.maps(images * self.scale + self.shift).flatten(2).transpose(1, 2)

    def _folded(self, seen: Float[Tensor, "b n d"]) -> Float[Tensor, "b m e"]:
        """Neighbouring tokens as one."""
        if self.shuffle == 1:
            return seen
        map_ = seen.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return space_to_depth(map_, self.shuffle).flatten(2).transpose(1, 2)

    def maps(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d p q"]:
        """What the tower gives of pictures in its own colours, as a map."""
        facts, hidden = self.tower.facts, self.tower.hidden(pixels, **self.named)
        if facts.convolutional:
            return hidden
        front = facts.front + int(self.tower.values.get("num_register_tokens", 0) if facts.front else 0)
        side = self.image_size // self.tower.values["patch_size"]
        return hidden[:, front:].transpose(1, 2).unflatten(2, (side, side))
