"""The masked-patches term: reconstructs the hidden patches of the pictures, as a masked autoencoder does."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from tutti.distributed.ranks import sample_whole_batch
from tutti.objectives.term import Model, TermValue
from tutti.objectives.terms.patches import PatchTerm, PatchTermConfig, normalise_patches
from tutti.types import Batch, Features, Tokens, UserError, at_least_float32

NUM_FIXED = 64
"""How many masks there are in evaluation mode; a window always has the same one."""


class MaskedPatchesConfig(PatchTermConfig):
    """`kind: masked_patches`."""

    kind: Literal["masked_patches"] = "masked_patches"
    ratio: float = Field(default=0.75, gt=0, lt=1, description="share of each view's patches that is hidden")

    def build(self, model: Model, name: str) -> MaskedPatchesTerm:
        """The term for the vision encoder of `model`. Raises UserError where sizes clash."""
        return MaskedPatchesTerm(self, model, name)


class MaskedPatchesTerm(PatchTerm):
    """Masked patches of the present picture (MAE, 2111.06377), guessed with the instruction at hand (as in
    Voltron, 2302.12766).

    In each view a random share `ratio` of the patches is hidden. The model's own vision encoder looks a
    second time, at what is left. Its tokens of visible patches, a learned mask token for each hidden one,
    positions, and the masked mean of the language tokens as one more token go through a decoder of one or
    two transformer layers, which predicts the hidden patches:

    x~_p = (x_p - mean_p) / sqrt(var_p + 1e-6), mean and (population) variance over the patch's numbers;
    L = mean over hidden p of present views of the mean over the numbers of (x^_p - x~_p)^2.

    Pixels are in [-1, 1], averaged over downsample^2 squares. The term reads nothing fused: the readout has
    seen the whole picture. It moves vision (through the second look only), language and its own head.

    In training the mask comes from torch's generator on the picture's device, so a resumed run draws the
    same. In evaluation mode window w always has mask w mod 64 of a fixed list, whatever batch it comes in.

    Differs: MAE leaves hidden patches out of the encoder. Ours has a convolutional stem on a square grid, so
    they are set to mid-grey (0) in the picture before the encoder, and their tokens are replaced after it:
    the look costs a whole pass, not a quarter, and a visible token knows that its neighbour is grey.
    Voltron's language goes into the encoder; `vision` is what the picture alone says, so ours goes into the
    decoder.
    """

    def __init__(self, config: MaskedPatchesConfig, model: Model, name: str) -> None:
        super().__init__(config, model, name, config.downsample)
        tokens = self.grid**2
        self.num_visible = round(tokens * (1 - config.ratio))
        if not 0 < self.num_visible < tokens:
            raise UserError(
                f"objective.{name}.ratio is {config.ratio}, which leaves {self.num_visible} of a view's "
                f"{tokens} patches visible; at least one must be visible and one hidden. Choose a ratio "
                f"between {1 / tokens:.2g} and {1 - 1 / tokens:.2g}, or a finer vision encoder."
            )
        self.embed = nn.Linear(model.vision.width, config.width)
        self.language = nn.Linear(model.language.width, config.width)
        self.mask_token = nn.Parameter(torch.randn(config.width) * 0.02)
        self.add_decoder(config, model)
        fixed = torch.Generator().manual_seed(0)
        noise = torch.rand(NUM_FIXED, len(model.spec.views), tokens, generator=fixed)
        self.fixed_order = nn.Buffer(noise.argsort(dim=-1), persistent=False)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The loss over hidden patches. Metrics: `blind_baseline`, its value if every patch were predicted as
        its mean (0), below which something was learned; in evaluation mode also `text_gain`, by how much the
        value would rise without the instruction."""
        hidden = self.hidden(batch)
        tokens = self.encode_visible(batch, hidden, model)
        language = features.language.mean()
        predicted = self.predict(tokens, hidden, language)
        count = hidden & tokens.mask
        with torch.no_grad():
            cut = self.patches(batch.observation.images, at_least_float32(predicted).dtype)
            # Where nothing counts the target is blanked: a NaN there would come back in the gradient.
            target = normalise_patches(cut).masked_fill(~count[..., None], 0)
        value = self._error(predicted, target, count)
        metrics = {f"{self.name}/blind_baseline": self._error(torch.zeros_like(target), target, count)}
        if not self.training:
            with torch.no_grad():
                blank = self.predict(tokens, hidden, torch.zeros_like(language))
                metrics[f"{self.name}/text_gain"] = self._error(blank, target, count) - value.detach()
        return TermValue(value=value, metrics=metrics)

    def hidden(self, batch: Batch) -> Bool[Tensor, "b n"]:
        """Which patches are hidden, in the order of the vision tokens: equally many in every view."""
        if self.training:
            patches, device = self.fixed_order.shape[1:], batch.observation.images.device
            noise = sample_whole_batch(
                lambda rows: torch.rand(rows, *patches, device=device), len(batch.window)
            )
            order = noise.argsort(dim=-1)
        else:
            order = self.fixed_order[batch.window % NUM_FIXED]
        return (order >= self.num_visible).flatten(1)

    def encode_visible(self, batch: Batch, hidden: Bool[Tensor, "b n"], model: Model) -> Tokens:
        """The vision encoder's tokens of the pictures in which hidden patches are mid-grey."""
        images = model.prepare(batch.observation.images)
        b, v, _, height, width = images.shape
        grid = self.grid
        cells = images.reshape(b, v, 3, grid, height // grid, grid, width // grid)
        shown = cells.masked_fill(hidden.view(b, v, 1, grid, 1, grid, 1), 0).reshape(images.shape)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "vision" not in self.stop_gradient):
            return model.vision(shown, batch.observation.image_mask)

    def predict(
        self, tokens: Tokens, hidden: Bool[Tensor, "b n"], language: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b n p"]:
        """Every patch, normalised, from the visible tokens and the mean language token."""
        b, n = hidden.shape
        views, cells, width = self.position.shape
        x = self.embed(tokens.values.masked_fill(~tokens.mask[..., None], 0))
        x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x).view(b, views, cells, width)
        text = self.language(language)[:, None, None].expand(b, views, 1, width)
        x = torch.cat([text.to(x.dtype), x + self.position], dim=2).flatten(0, 1)
        return self.decode(x, first=1).view(b, n, -1)

    def num_hidden(self, batch: Batch) -> Int[Tensor, "b v"]:
        """The hidden patches of each view that is there: the same number, whichever they are."""
        return (self.grid**2 - self.num_visible) * batch.observation.image_mask

    def _error(
        self, predicted: Float[Tensor, "b n p"], target: Float[Tensor, "b n p"], count: Bool[Tensor, "b n"]
    ) -> Float[Tensor, ""]:
        """The masked mean over patches of the mean square error of their numbers."""
        return self.masked_mean((predicted - target).square().mean(dim=-1), count, self.num_hidden)
