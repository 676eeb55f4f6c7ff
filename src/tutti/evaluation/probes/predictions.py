"""What a model predicts for a sample of windows: chunks on the CPU, masked sums per window."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tutti.models.vla import VLA
from tutti.types import Observation


@torch.no_grad()
def predict(model: VLA, observation: Observation) -> Float[Tensor, "b t a"]:
    """The normalised chunk, on the CPU; `observation` may lie anywhere."""
    device = next(model.parameters()).device
    return model.predict(observation.to(device)).float().cpu()


def masked_sums(
    values: Float[Tensor, "b t a"], mask: Bool[Tensor, "b t a"], steps: int
) -> Float64[np.ndarray, " b"]:
    """sum m |x| of each window over its first `steps` actions."""
    sizes = torch.where(mask, values.abs(), torch.zeros(()))
    return sizes[:, :steps].double().sum((1, 2)).numpy()
