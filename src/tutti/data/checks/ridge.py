"""Ridge regression in closed form, for probes and for the check whether the state gives the action away."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, Shaped

from tutti.data.bundle import DataBundle, Sample, held_out, spread, states, training
from tutti.dimensions import DataSpec
from tutti.findings import LEAK_NEXT_STEP_RATIO, LEAK_R2_MIN, Finding

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried penalties, in units of the number of rows: 1 halves the weight of a lone standardised input."""
FOLDS = 5
STILL = 1e-6
WINDOWS = 2000
"""Held-out windows that `measure_leak` looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ridge:
    """y^ = ((x - mean) / scale) W + b, fitted by `fit`."""

    mean: Float64[np.ndarray, " p"]
    scale: Float64[np.ndarray, " p"]
    weights: Float64[np.ndarray, "p q"]
    offset: Float64[np.ndarray, " q"]
    penalty: float

    @classmethod
    def fit(
        cls,
        inputs: Float64[np.ndarray, "n p"],
        targets: Float64[np.ndarray, "n q"],
        clusters: Shaped[np.ndarray, " n"],
    ) -> Self:
        """argmin_W sum |y - b - z W|^2 + n penalty |W|^2, z the standardised inputs; b is not penalised.

        The penalty of `PENALTIES` with the least squared error on a fifth of the clusters (episodes), which
        is held out of a first fit, is used in the second, on everything. An input that never moves is left
        out. The same arguments give the same weights.
        """
        mean = inputs.mean(0)
        deviation = inputs.std(0)
        scale = np.where(deviation > STILL * np.maximum(1.0, np.abs(mean)), deviation, np.inf)
        z = (inputs - mean) / scale
        numbers = np.unique(clusters, return_inverse=True)[1]
        apart = numbers % FOLDS == FOLDS - 1
        penalty = PENALTIES[2]
        if apart.any() and not apart.all():
            tried = {
                candidate: _squared_error(z[apart], targets[apart], *solved)
                for candidate, solved in zip(PENALTIES, _solve(z[~apart], targets[~apart]), strict=True)
            }
            penalty = min(tried, key=lambda candidate: tried[candidate])
        weights, offset = _solve(z, targets)[PENALTIES.index(penalty)]
        return cls(mean=mean, scale=scale, weights=weights, offset=offset, penalty=penalty)

    def predict(self, inputs: Float64[np.ndarray, "n p"]) -> Float64[np.ndarray, "n q"]:
        """y^ of other inputs."""
        return ((inputs - self.mean) / self.scale) @ self.weights + self.offset


def fit_steps(
    inputs: Float64[np.ndarray, "n p"],
    actions: Float64[np.ndarray, "n t a"],
    mask: Bool[np.ndarray, "n t a"],
    clusters: Shaped[np.ndarray, " n"],
) -> list[Ridge]:
    """One ridge for each step of a chunk, fitted on the windows that have this step."""
    found: list[Ridge] = []
    for step in range(actions.shape[1]):
        here = mask[:, step].all(-1)
        if not here.any():  # no episode is that long: what the step before does
            found.append(found[-1])
            continue
        found.append(Ridge.fit(inputs[here], actions[here, step], clusters[here]))
    return found


def predict_steps(models: list[Ridge], inputs: Float64[np.ndarray, "n p"]) -> Float64[np.ndarray, "n t a"]:
    """The chunk that `fit_steps` predicts."""
    return np.stack([model.predict(inputs) for model in models], axis=1)


def fourier_features(
    inputs: Float64[np.ndarray, "n p"], count: int = 256, seed: int = 0
) -> Float64[np.ndarray, "n m"]:
    """[x, cos(x W + u)]: inputs in normalised units and `count` random features of a Gaussian kernel.

    The kernel's width is sqrt(p), the distance at which two standardised inputs of p numbers usually lie, so
    that ridge on these can bend where ridge on x cannot. Source: Rahimi and Recht (NIPS 2007).
    """
    random = np.random.default_rng([seed, 5])
    width = inputs.shape[1]
    weights = random.normal(size=(width, count)) / np.sqrt(max(1, width))
    return np.concatenate([inputs, np.cos(inputs @ weights + random.uniform(0, 2 * np.pi, count))], axis=1)


def one_hot(numbers: Int64[np.ndarray, " n"], count: int) -> Float64[np.ndarray, "n c"]:
    """Rows of the identity."""
    return np.eye(count)[numbers]


def _solve(
    z: Float64[np.ndarray, "n p"], targets: Float64[np.ndarray, "n q"]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weights, offset) for each penalty, from one eigendecomposition.

    By torch, whose number of threads is the run's: numpy's own would contend with a training beside it.
    """
    inputs, outputs = torch.from_numpy(z), torch.from_numpy(targets)
    middle, offset = inputs.mean(0), outputs.mean(0)
    centred = inputs - middle
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    rotated = vectors.T @ (centred.T @ (outputs - offset))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for penalty in PENALTIES:
        weights = vectors @ (rotated / (values.clamp(min=0) + penalty * len(z))[:, None])
        found.append((weights.numpy(), (offset - middle @ weights).numpy()))
    return found


def _squared_error(z: np.ndarray, targets: np.ndarray, weights: np.ndarray, offset: np.ndarray) -> float:
    return float(np.square(targets - z @ weights - offset).sum())


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


def measure_leak(data: DataBundle) -> Leak:
    """`state_leak` of a data set. Without held-out episodes, half of the training ones stand in."""
    train = training(data, 2 * WINDOWS)
    if len(data.held_out_rows):
        return state_leak(train, held_out(data, WINDOWS))
    odd = train.episode % 2 == 1
    return state_leak(*(spread(train.index, train.rows[part], len(train)) for part in (~odd, odd)))


def leak_findings(leak: Leak, spec: DataSpec | None = None) -> list[Finding]:
    """A fault if the state holds the command, a hint if it nearly gives it away; `spec` names dimensions."""
    hint = partial(Finding, kind="state_near_action", severity="hint", number=leak.now)
    if leak.leaks:
        later = "" if leak.next is None else f", the action after it with {leak.next:.3f}"
        text = (
            f"A linear map from the state gives the next action with R2 {leak.now:.4f}{later}: the state "
            "leaks the action. A policy need not look then, and fails on the robot, whose state holds no "
            "command to come."
        )
        cure = "Choose another data.sources.state, or take the command out of the state."
        return [Finding(kind="state_leak", severity="fault", sentence=text, number=leak.now, cure=cure)]
    if leak.now > LEAK_R2_MIN:
        text = (
            f"A linear map from the state gives the next action with R2 {leak.now:.3f}, as with absolute "
            "positions: a policy that copies its state will look good offline."
        )
        return [hint(sentence=text, cure="Trust closed-loop rollouts only.")]
    if leak.dimensions:
        dimensions = ", ".join(spec.label("action", one) if spec else str(one) for one in leak.dimensions)
        return [
            hint(sentence=f"The state alone gives dimension {dimensions} of the action (R2 > {LEAK_R2_MIN}).")
        ]
    return []
