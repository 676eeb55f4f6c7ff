"""What every probe is given, and what they share: predictions, sums per window, ratios over episodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tutti.data.bundle import DataBundle, Sample
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.models.vla import VLA
from tutti.types import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSetup:
    """A model, the windows to probe it on, and those that regressions are fitted to.

    `groups[i]` is the task of instruction i, `partners` the task whose text a task is told in the swap,
    `executed` the number of executed actions of a chunk. The same setup gives the same numbers.
    """

    model: VLA
    data: DataBundle
    train: Sample
    held: Sample
    groups: Sequence[str]
    partners: Mapping[str, str]
    executed: int
    seed: int = 0

    def ratio(self, top: np.ndarray, bottom: np.ndarray, sample: Sample | None = None) -> Estimate:
        """sum(top) / sum(bottom) over the windows of `sample` (held-out ones), interval over episodes."""
        return ratio_of_sums(top, bottom, (sample or self.held).episode, self.seed)


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


def joined(batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What was measured of each batch, by name, as one array for all windows."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch in batches:
        for name, values in batch.items():
            parts[name].append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}
