"""Where things are, by a linear map from frozen features: what a gain in success may come from.

The places of the object and of the goal, as the simulator knew them in the recording: no policy sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float64

from tutti.data.bundle import DataBundle, spread
from tutti.data.checks.ridge import STILL, Ridge
from tutti.evaluation.probes.ridge_probes import READOUT, VISION, frozen_features, task_numbers
from tutti.models.vla import VLA
from tutti.types import Batch, Observation

FEATURES = (VISION, READOUT)
MOST_TRAINING, MOST_UNSEEN = 4000, 2000
"""Windows that a probe is fitted to, and that it is judged on."""


def stateless(batch: Batch) -> Observation:
    """The observations with the mean state, so that the hand does not tell where its target is."""
    state = batch.observation.state
    known = torch.ones(len(state), dtype=torch.bool)  # alike for all, also where it was not recorded
    return replace(batch.observation, state=torch.zeros_like(state), state_mask=known)


def place_probes(
    model: VLA,
    data: DataBundle,
    places: Mapping[str, Float64[np.ndarray, "n 3"]],
    groups: Sequence[str],
) -> dict[str, float]:
    """R2 of each of `places` (by name; metres, one row for each window of the data) from frozen features.

    For each task a ridge regression from the vision encoder's mean token, and one from the readout, fitted on
    windows of the training's data, those whose labels it was not given among them, and judged on those of all
    other episodes; `groups` names the task
    of each instruction. R2 = 1 - sum |y - y^|^2 / sum |y - mean|^2, the mean that of the task's own windows
    to fit, both sums over all tasks: to know the task alone gives 0. The model is given the mean state. Named
    "probe/vision/object".
    """
    rest = np.setdiff1d(np.arange(len(data.windows)), data.training_rows)
    fit = spread(data.windows, data.training_rows, MOST_TRAINING)
    unseen = spread(data.windows, rest, MOST_UNSEEN)
    tasks = [task_numbers(sample, groups) for sample in (fit, unseen)]
    seen, new = frozen_features(model, fit, stateless), frozen_features(model, unseen, stateless)
    found: dict[str, float] = {}
    for features in FEATURES:
        for name, place in places.items():
            left = total = 0.0
            for task in np.intersect1d(tasks[0], tasks[1]):
                of = [numbers == task for numbers in tasks]
                y, truth = place[fit.rows][of[0]], place[unseen.rows][of[1]]
                ridge = Ridge.fit(seen[features][of[0]], y, fit.episode[of[0]])
                left += float(np.square(ridge.predict(new[features][of[1]]) - truth).sum())
                total += float(np.square(truth - y.mean(0)).sum())
            if total > STILL * len(unseen):  # what never moves cannot be explained
                found[f"probe/{features}/{name}"] = 1 - left / total
    return found
