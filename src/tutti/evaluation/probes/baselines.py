"""Baselines without the model: ridge regressions of the actions from one input alone.

A policy that does not beat one of these may do no more. The copycat problem (1905.11979, 2010.14876):
the state, or the action before, tells the next action so well that pictures and text look unnecessary
offline, until the robot acts and its own mistakes are in the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64

from tutti.evaluation.probes.input_ablation import ErrorSums
from tutti.evaluation.probes.ridge import STILL, fit_steps, fourier_features, one_hot, predict_steps
from tutti.evaluation.probes.samples import Sample
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.findings import LEAK_NEXT_STEP_RATIO, LEAK_R2_MIN

MEAN, TASK, STATE, PREVIOUS, VISION = (
    "mean action",
    "task alone",
    "state alone",
    "action before alone",
    "pictures alone",
)
CELLS = 8
"""Pictures are averaged over CELLS x CELLS areas before a regression sees them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A regression's masked mean |a^ - a*| over the executed part, and its ratio to the model's."""

    name: str
    error: Estimate
    ratio: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """How well a linear map from the state gives the recorded action, on held-out windows.

    `now` is R2 of a_t from s_t and `next` that of a_{t+1} from s_t (None with a horizon of 1), over all
    moving dimensions together; `dimensions` lists those whose own R2 is above `LEAK_R2_MIN`. `leaks` where
    `now` is above `LEAK_R2_MIN` and leaves `LEAK_NEXT_STEP_RATIO` times less unexplained than `next`: the
    state then holds the command itself. A state that merely is close to the command (absolute positions)
    also gives a high R2, but one step later it is nearly as good.
    """

    now: float
    next: float | None
    dimensions: tuple[int, ...]

    @property
    def leaks(self) -> bool:
        """Whether the state holds the answer."""
        ahead = self.next is None or (1 - self.next) > LEAK_NEXT_STEP_RATIO * (1 - self.now)
        return self.now > LEAK_R2_MIN and ahead


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
    the action before; the pictures averaged over 8 x 8 areas. They minimise the squared error and are scored
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


def state_leak(training: Sample, held_out: Sample) -> Leak:
    """Ridge from the normalised state to the recorded action at t and t + 1."""
    steps = min(2, training.index.horizon)
    targets, mask = training.actions(steps)
    truth, present = held_out.actions(steps)
    models = fit_steps(states(training), targets, mask, training.episode)
    predicted = predict_steps(models, states(held_out))
    left = np.where(present, np.square(predicted - truth), 0.0).sum(0)
    count = np.maximum(present.sum(0), 1)
    middle = np.where(present, truth, 0.0).sum(0) / count
    spread = np.where(present, np.square(truth - middle), 0.0).sum(0)
    moving = spread / count > STILL
    if not moving[0].any():
        return Leak(now=0.0, next=None, dimensions=())
    r2 = [1 - float(left[k][moving[0]].sum() / max(spread[k][moving[0]].sum(), STILL)) for k in range(steps)]
    own = 1 - left[0] / np.maximum(spread[0], STILL)
    alone = np.flatnonzero(moving[0] & (own > LEAK_R2_MIN))
    return Leak(now=r2[0], next=r2[1] if steps > 1 else None, dimensions=tuple(alone.tolist()))


def states(sample: Sample) -> Float64[np.ndarray, "n s"]:
    """The normalised states."""
    return np.concatenate([batch.observation.state.double().numpy() for batch in sample.batches()])


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
