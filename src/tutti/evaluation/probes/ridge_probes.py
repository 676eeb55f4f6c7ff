"""Ridge regressions beside the model: of the actions from one input alone, and from its frozen features.

A policy that does not beat a regression from one input may do no more. The copycat problem (1905.11979,
2010.14876): the state, or the action before, tells the next action so well that images and text look
unnecessary offline, until the robot acts and its own mistakes are in the state.

Linear probes stand beside those of the same model with fresh weights: random features carry much already, so
a probe only shows what training added. A good one is not sufficient for a good policy (one report: R2 .73 at
74.5 % success).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64

from tutti.data.bundle import Sample, states
from tutti.data.checks.ridge import STILL, Ridge, fit_steps, fourier_features, one_hot, predict_steps
from tutti.evaluation.probes.setup import Change, ProbeSetup, unchanged
from tutti.evaluation.statistics.intervals import Estimate
from tutti.models.vla import VLA
from tutti.types import Label

MEAN, TASK_ALONE, STATE_ALONE = "mean action", "task alone", "state alone"
PREVIOUS, IMAGES = "action before alone", "images alone"
CELLS = 8
"""Images are averaged over CELLS x CELLS areas before a regression sees them."""
VISION, FUSED, READOUT = "vision", "fused vision", "readout"
"""Features: the masked mean of the vision encoder's tokens, of the same tokens after the fusion, and the
readout. The last two have seen the state and the text, so that these are in them in any model."""
STATE, PROGRESS, ACTION, TASK = "state", "progress", "action", "task"
TARGETS: dict[str, Label] = {STATE: "state", PROGRESS: "actions", ACTION: "actions"}
"""The numbers that are asked for, of the windows with this label; all that are measured have actions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A regression's masked mean |a^ - a*| over the executed part, and its ratio to the model's."""

    name: str
    error: Estimate
    ratio: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """R2 = 1 - sum |y - y^|^2 / sum |y - mean|^2 of a probe over held-out windows, all dimensions together;
    for the task the share of windows whose task is named rightly."""

    features: str
    target: str
    trained: Estimate
    untrained: Estimate


def baselines(setup: ProbeSetup) -> tuple[Baseline, ...]:
    """Each baseline fitted on training windows and scored on held-out ones, next to the model's own error.

    Ridge regressions of a^ on: nothing; the task's one-hot; the state and 256 random Fourier features of it;
    the action before; the images averaged over 8 x 8 areas. They minimise the squared error and are scored
    by the absolute one, as the model is, which favours a model trained on the absolute error by a little.
    """
    targets, mask = setup.train.actions(setup.executed)
    truth, present = setup.held.actions(setup.executed)
    held, (error, count) = _inputs(setup, setup.held), setup.own_error
    rows: list[Baseline] = []
    for name, inputs in _inputs(setup, setup.train).items():
        models = fit_steps(inputs, targets, mask, setup.train.episode)
        wrong = np.where(present, np.abs(predict_steps(models, held[name]) - truth), 0.0).sum((1, 2))
        rows.append(Baseline(name=name, error=setup.ratio(wrong, count), ratio=setup.ratio(wrong, error)))
    return tuple(rows)


def linear_probes(setup: ProbeSetup) -> tuple[Probe, ...]:
    """Ridge from each kind of features to each target: fitted on training windows, scored on held-out ones.

    The state is normalised, the progress t / (length - 1), the action the first of the chunk, the task its
    one-hot (left out where there is one only). Where windows lack the state, it is that of the others.
    """
    estimates: dict[tuple[str, str], list[Estimate]] = {}
    episode, tasks = setup.train.episode, len(set(setup.groups))
    samples = (setup.train, setup.held)
    known = {target: [one.known(label) for one in samples] for target, label in TARGETS.items()}
    labels = [task_numbers(sample, setup.groups) for sample in samples]
    for network in (setup.model, setup.untrained):
        train, held = (frozen_features(network, sample) for sample in samples)
        for name in (VISION, FUSED, READOUT):
            for target, (fitted, here) in known.items():
                if not (fitted.any() and here.any()):
                    continue
                ridge = Ridge.fit(train[name][fitted], train[target][fitted], episode[fitted])
                left = np.square(ridge.predict(held[name]) - held[target]).sum(1) * here
                total = np.square(held[target] - held[target][here].mean(0)).sum(1) * here
                if total.sum() > STILL * len(total):  # what never moves cannot be explained
                    r2 = setup.ratio(left, total).affine(-1, 1)
                    estimates.setdefault((name, target), []).append(r2)
            if len({*setup.groups} - {""}) > 1:
                ridge = Ridge.fit(train[name], one_hot(labels[0], tasks), episode)
                right = (ridge.predict(held[name]).argmax(1) == labels[1]).astype(np.float64)
                share = setup.ratio(right, np.ones_like(right))
                estimates.setdefault((name, TASK), []).append(share)
    return tuple(
        Probe(features=features, target=target, trained=pair[0], untrained=pair[1])
        for (features, target), pair in estimates.items()
    )


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


def _inputs(setup: ProbeSetup, sample: Sample) -> dict[str, np.ndarray]:
    """The inputs of each baseline, by its name."""
    before, known = sample.previous()
    state = states(sample)
    return {
        MEAN: np.zeros((len(sample), 1)),
        TASK_ALONE: one_hot(task_numbers(sample, setup.groups), len(set(setup.groups))),
        **({STATE_ALONE: fourier_features(state, seed=setup.seed)} if state.shape[1] else {}),
        PREVIOUS: np.concatenate([before, known[:, None].astype(np.float64)], axis=1),
        IMAGES: thumbnails(sample),
    }


@torch.no_grad()
def frozen_features(
    model: VLA, sample: Sample, change: Change = unchanged
) -> dict[str, Float64[np.ndarray, "n _"]]:
    """Frozen features and targets of every window, by name."""
    device = next(model.parameters()).device
    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch in sample.batches():
        features = model(change(batch).to(device))
        assert batch.progress is not None
        values = {
            VISION: features.vision.mean(),
            FUSED: features.fused_vision.mean(),
            READOUT: features.readout,
            STATE: batch.observation.state,
            PROGRESS: batch.progress[:, None],
            ACTION: batch.actions[:, 0],
        }
        for name, value in values.items():
            rows[name].append(value.double().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}
