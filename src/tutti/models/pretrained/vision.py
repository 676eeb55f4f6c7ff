"""A pre-trained vision tower as the vision encoder: pictures in its own colours to tokens of its width."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from tutti.masks import tell, told
from tutti.models.interfaces import VisionEncoder
from tutti.models.layers import present_pictures, readable, space_to_depth
from tutti.models.pretrained.config import TowerConfig
from tutti.models.pretrained.facts import Colours, Socket
from tutti.models.pretrained.remembered import Remembered
from tutti.models.pretrained.tower import Tower, projection
from tutti.storage.reading import read_json
from tutti.types import DataSpec, Tokens, UserError

PICTURE_FILE, USUAL_SIZE = "preprocessor_config.json", 224


class PretrainedVisionConfig(TowerConfig):
    """`kind: pretrained`, a vision tower that others have trained; docs/how-to/pretrained-towers.md."""

    socket: ClassVar[Socket] = "vision"

    kind: Literal["pretrained"]
    shuffle: PositiveInt = Field(
        default=1, description="So many x so many neighbouring tokens become one, as many times as wide."
    )
    interpolate: bool = Field(
        default=False,
        description="true: positions are interpolated to another picture size than the tower's.",
    )
    mean: Colours | Literal["auto"] = Field(
        default="auto", description="Mean of the colours, 0 to 1; auto: that of the folder, or of the kind."
    )
    std: Colours | Literal["auto"] = Field(
        default="auto", description="Deviation of the colours; auto: that of the folder, or of the kind."
    )
    remember: int = Field(
        default=0,
        ge=0,
        description="MiB of tokens that a tower with learn: none keeps on a CPU, so that it computes a "
        "picture once and not in each epoch; it then computes each picture alone. 0: none.",
    )
    withhold: bool = Field(
        default=False,
        description="true: all views are withheld, in training and in use: the control that never sees.",
    )

    @model_validator(mode="after")
    def _remembers_what_stays(self) -> Self:
        if self.remember and self.learn != "none":
            raise ValueError("remember is for learn: none; the tokens of a tower that learns change")
        return self

    def colours(self) -> tuple[Colours, Colours]:
        """Mean and deviation of red, green and blue, of pictures from 0 to 1."""
        said, facts = self._said(), self.facts()

        def chosen(given: Colours | Literal["auto"], key: str, usual: Colours) -> Colours:
            own = said.get(key)
            three = (
                isinstance(own, list) and len(own) == 3 and all(isinstance(one, int | float) for one in own)
            )
            return given if given != "auto" else tuple(map(float, own)) if three else usual  # pyright: ignore

        return chosen(self.mean, "image_mean", facts.mean), chosen(self.std, "image_std", facts.std)

    def picture_size(self) -> int:
        """The edge of the square pictures that it was trained with, in pixels; as far as its files tell, else
        the 224 of ImageNet's."""
        said, own = self._said(), self.all_values().get("image_size")
        for size in (own, said.get("crop_size"), said.get("size")):
            given = size if isinstance(size, dict) else {"height": size}
            for edge in (given.get("height"), given.get("shortest_edge")):
                if type(edge) is int and edge > 0:
                    return edge
        return USUAL_SIZE

    def _said(self) -> dict[str, Any]:
        """What the file beside the weights says of pictures."""
        if self.architecture != "auto" or not (path := self.folder / PICTURE_FILE).is_file():
            return {}
        return read_json(path)

    def resolved(self) -> Self:
        """With the colours, too."""
        mean, std = self.colours()
        return super().resolved().model_copy(update={"mean": mean, "std": std})

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
        self.remembered = Remembered(config.remember)
        self.withhold, self.shuffle, self.image_size = config.withhold, config.shuffle, spec.image_size
        mean, std = (torch.tensor(three)[:, None, None] for three in config.colours())
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.named: dict[str, bool] = {}
        self._check_size(config)
        with torch.no_grad():
            map_ = self.maps(torch.zeros(1, 3, spec.image_size, spec.image_size))
        _, features, self.grid, _ = map_.shape
        width = features // len(config.layers)
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
            if self.remembered.memory and readable(pictures):
                seen = self.remembered.tokens(pictures, self.tokens)
            else:
                seen = self.tokens(pictures)
        n = self.tokens_per_view
        seen = self._folded(seen if self.project is None else self.project(seen))
        values = (seen.view(b, v, n, self.width) + self.position).flatten(1, 2)
        mask = tell(image_mask[:, :, None].expand(b, v, n).reshape(b, v * n), told(image_mask))
        return Tokens(values=values, mask=mask)

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

    def _check_size(self, config: PretrainedVisionConfig) -> None:
        """Raises: UserError if the tower takes no pictures of this size."""
        facts, values, size = self.tower.facts, self.tower.values, self.image_size
        patch, own = values.get("patch_size", 1), values.get("image_size", size)
        if not facts.convolutional and size % patch:
            near = sorted({max(1, size // patch) * patch, (size // patch + 1) * patch})
            raise UserError(
                f"data.image_size is {size}, but the patches of model.vision are {patch} pixels wide.\n  "
                f"expected: a multiple\n  cure: data.image_size={own if own % patch == 0 else near[-1]}"
            )
        if facts.sizes == "any" or facts.convolutional or size == own:
            return
        if not config.interpolate:
            raise UserError(
                f"data.image_size is {size}, but model.vision was trained on pictures of {own} pixels.\n  "
                f"cure: data.image_size={own}, or model.vision.interpolate=true, to stretch its positions"
            )
        self.named = {"interpolate_pos_encoding": True} if facts.sizes == "flag" else {}
