"""Linear probes: the state, progress, action and task read from frozen features by ridge regression.

Always beside the same model with fresh weights: random features carry much already, so a probe only shows
what training added. A good probe is not sufficient for a good policy (one report: R2 .73 at 74.5 % success).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from tutti.data.checks.ridge import STILL, Ridge, one_hot
from tutti.data.samples import Sample
from tutti.evaluation.probes.baselines import task_numbers
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.models.vla import VLA

VISION, FUSED, READOUT = "vision", "fused vision", "readout"
FEATURES = (VISION, FUSED, READOUT)
"""The masked mean of the vision encoder's tokens, of the same tokens after the fusion, and the readout. The
last two have seen the state and the text, so that these are in them in any model, trained or not."""
STATE, PROGRESS, ACTION, TASK = "state", "progress", "action", "task"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """R2 = 1 - sum |y - y^|^2 / sum |y - mean|^2 of a probe over held-out windows, all dimensions together;
    for the task the share of windows whose task is named rightly."""

    features: str
    target: str
    trained: Estimate
    untrained: Estimate


def linear_probes(
    model: VLA,
    untrained: VLA,
    training: Sample,
    held_out: Sample,
    *,
    groups: Sequence[str],
    seed: int = 0,
) -> tuple[Probe, ...]:
    """Ridge from each of `FEATURES` to each target: fitted on training windows, scored on held-out ones.

    The state is normalised, the progress t / (length - 1), the action the first of the chunk, the task its
    one-hot (left out where there is one only). Intervals: over episodes.
    """
    estimates: dict[tuple[str, str], list[Estimate]] = {}
    tasks = task_numbers(training, groups), task_numbers(held_out, groups)
    for network in (model, untrained):
        train, held = collect(network, training), collect(network, held_out)
        for name in FEATURES:
            for target in (STATE, PROGRESS, ACTION):
                ridge = Ridge.fit(train[name], train[target], training.episode)
                left = np.square(ridge.predict(held[name]) - held[target]).sum(1)
                total = np.square(held[target] - held[target].mean(0)).sum(1)
                if total.sum() > STILL * len(total):  # what never moves cannot be explained
                    r2 = ratio_of_sums(left, total, held_out.episode, seed=seed).affine(-1, 1)
                    estimates.setdefault((name, target), []).append(r2)
            if len(set(groups)) > 1:
                ridge = Ridge.fit(train[name], one_hot(tasks[0], len(set(groups))), training.episode)
                right = (ridge.predict(held[name]).argmax(1) == tasks[1]).astype(np.float64)
                share = ratio_of_sums(right, np.ones_like(right), held_out.episode, seed=seed)
                estimates.setdefault((name, TASK), []).append(share)
    return tuple(
        Probe(features=features, target=target, trained=pair[0], untrained=pair[1])
        for (features, target), pair in estimates.items()
    )


@torch.no_grad()
def collect(model: VLA, sample: Sample) -> dict[str, Float64[np.ndarray, "n _"]]:
    """Frozen features and targets of every window, by name."""
    device = next(model.parameters()).device
    rows: dict[str, list[np.ndarray]] = {}
    for batch in sample.batches():
        features = model(batch.observation.to(device))
        progress = batch.progress if batch.progress is not None else torch.zeros(len(batch.window))
        values = {
            VISION: features.vision.mean(),
            FUSED: features.fused_vision.mean(),
            READOUT: features.readout,
            STATE: batch.observation.state,
            PROGRESS: progress[:, None],
            ACTION: batch.actions[:, 0],
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value.double().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}
