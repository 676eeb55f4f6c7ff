"""Baselines without the model: ridge regressions of the actions from one input alone.

A policy that does not beat one of these may do no more. The copycat problem (1905.11979, 2010.14876):
the state, or the action before, tells the next action so well that images and text look unnecessary
offline, until the robot acts and its own mistakes are in the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64

from tutti.data.checks.ridge import fit_steps, fourier_features, one_hot, predict_steps
from tutti.data.samples import Sample, states
from tutti.evaluation.probes.input_ablation import ErrorSums
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums

MEAN, TASK, STATE, PREVIOUS, VISION = (
    "mean action",
    "task alone",
    "state alone",
    "action before alone",
    "images alone",
)
CELLS = 8
"""Images are averaged over CELLS x CELLS areas before a regression sees them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A regression's masked mean |a^ - a*| over the executed part, and its ratio to the model's."""

    name: str
    error: Estimate
    ratio: Estimate


def baselines(
    training: Sample,
    held_out: Sample,
    model_error: ErrorSums,
    *,
    groups: Sequence[str],
    executed: int,
    seed: int = 0,
) -> tuple[Baseline, ...]:
    """Each baseline fitted on `training` and scored on `held_out`, next to the model's own error there.

    Ridge regressions of a^ on: nothing; the task's one-hot; the state and 256 random Fourier features of it;
    the action before; the images averaged over 8 x 8 areas. They minimise the squared error and are scored
    by the absolute one, as the model is, which favours a model trained on the absolute error by a little.
    """
    targets, mask = training.actions(executed)
    truth, present = held_out.actions(executed)
    rows: list[Baseline] = []
    train, held = _inputs(training, groups, seed), _inputs(held_out, groups, seed)
    for name, inputs in train.items():
        models = fit_steps(inputs, targets, mask, training.episode)
        wrong = np.where(present, np.abs(predict_steps(models, held[name]) - truth), 0.0).sum((1, 2))
        rows.append(
            Baseline(
                name=name,
                error=ratio_of_sums(wrong, model_error.count, held_out.episode, seed=seed),
                ratio=ratio_of_sums(wrong, model_error.error, held_out.episode, seed=seed),
            )
        )
    return tuple(rows)


def task_numbers(sample: Sample, groups: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """The task of each window, as its place among the names in order."""
    order = {name: number for number, name in enumerate(sorted(set(groups)))}
    ids = np.concatenate([batch.instruction_id.numpy() for batch in sample.batches()])
    return np.array([order[name] for name in groups], dtype=np.int64)[ids]


def thumbnails(sample: Sample) -> Float64[np.ndarray, "n p"]:
    """Every view averaged over CELLS x CELLS areas, in [-1, 1], flattened."""
    rows: list[np.ndarray] = []
    for batch in sample.batches():
        images = batch.observation.images
        small = F.adaptive_avg_pool2d(images.flatten(0, 1).to(torch.float32), CELLS)
        rows.append((small.reshape(len(images), -1) / 127.5 - 1).double().numpy())
    return np.concatenate(rows)


def _inputs(sample: Sample, groups: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """The inputs of each baseline, by its name."""
    before, known = sample.previous()
    return {
        MEAN: np.zeros((len(sample), 1)),
        TASK: one_hot(task_numbers(sample, groups), len(set(groups))),
        STATE: fourier_features(states(sample), seed=seed),
        PREVIOUS: np.concatenate([before, known[:, None].astype(np.float64)], axis=1),
        VISION: thumbnails(sample),
    }
