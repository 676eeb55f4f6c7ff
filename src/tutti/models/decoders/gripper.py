"""A gripper that is open or closed: one action dimension with two values, trained as a yes-or-no question."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from tutti.frozen_config import FrozenConfig
from tutti.gripper_dims import MAX_AWAY, gripper_dimensions, share_away
from tutti.models.decoders.chunks import ranges, require_fitted
from tutti.types import DataSpec, UserError, precise


class GripperConfig(FrozenConfig):
    """Which dimension of the action is the gripper, and how much its error counts."""

    dimension: int = Field(default=-1, description="place in the action; -1 is the last")
    weight: float = Field(default=1.0, gt=0, description="of its cross-entropy, beside the L1 of the others")

    def build(self, spec: DataSpec, kind: str) -> Gripper:
        """The gripper in actions of `spec`. Raises UserError if there is no such dimension."""
        (place,) = gripper_dimensions((self.dimension,), spec.action_dim, "model.action.gripper.dimension")
        return Gripper(place, self.weight, kind)


class Gripper(nn.Module):
    """e = weight (softplus(z) - y z), the binary cross-entropy of the logit z; y = 1 where the action lies
    above the middle between the two values. Predicted is the upper value where z > 0, else the lower.

    The two values are found in the training chunks (`fit`): the medians of what lies below and above the
    middle between smallest and largest. With weight 1 as in GR-1 (2312.13139).
    """

    def __init__(self, dimension: int, weight: float, kind: str) -> None:
        super().__init__()
        self.dimension, self.weight, self.kind = dimension, weight, kind
        self.values: Tensor
        self.fitted: Tensor
        self.register_buffer("values", torch.tensor([-1.0, 1.0]))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def fit(self, actions: Float[Tensor, "n t a"], action_mask: Bool[Tensor, "n t a"]) -> None:
        """Finds the two values.

        Raises: UserError if the dimension has one value only, or over 2 % of its values lie elsewhere.
        """
        seen = actions[..., self.dimension : self.dimension + 1]
        mask = action_mask[..., self.dimension : self.dimension + 1]
        least, most = (float(end) for end in ranges(seen, mask))
        values = seen[mask]
        name = f"model.action.gripper: action dimension {self.dimension}"
        cure = "Choose its dimension (model.action.gripper.dimension), or set model.action.gripper=off."
        if not len(values) or least == most:
            raise UserError(f"{name} has one value only, {least:g} (normalised), not two. {cure}")
        upper = values > (least + most) / 2
        two = torch.stack([values[~upper].median(), values[upper].median()])
        if (away := share_away(values, two[0], two[1])) > MAX_AWAY:
            raise UserError(
                f"{name} is not binary: {100 * away:.1f} % of its values lie away from {two[0]:g} and "
                f"{two[1]:g} (normalised), expected at most {100 * MAX_AWAY:g} %. {cure}"
            )
        self.values.copy_(two)
        self.fitted.fill_(True)

    def error(self, logits: Float[Tensor, "b t"], actions: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """weight * cross-entropy. Raises UserError before `fit`."""
        require_fitted(self, self.kind)
        logits = precise(logits)
        closed = (actions > self.values.mean()).to(logits.dtype)
        return self.weight * F.binary_cross_entropy_with_logits(logits, closed, reduction="none")

    def choose(self, logits: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """The value that each logit stands for."""
        return torch.where(logits > 0, self.values[1], self.values[0])
