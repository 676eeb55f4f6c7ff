"""Does the state leak the action? A ridge regression from the recorded state to the recorded action."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from tutti.data.bundle import DataBundle
from tutti.data.checks.ridge import STILL, fit_steps, predict_steps
from tutti.data.samples import Sample, held_out, spread, states, training
from tutti.findings import LEAK_NEXT_STEP_RATIO, LEAK_R2_MIN, Finding

WINDOWS = 2000
"""Held-out windows that `measure_leak` looks at."""


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


def leak_findings(leak: Leak) -> list[Finding]:
    """A fault if the state holds the command, a hint if it nearly gives it away."""
    hint = partial(Finding, kind="state_near_action", severity="hint", number=leak.now)
    if leak.leaks:
        later = "" if leak.next is None else f", the action after it with {leak.next:.3f}"
        text = (
            f"A linear map from the state gives the next action with R2 {leak.now:.4f}{later}: the state "
            "leaks the action. A policy need not look then, and fails on the robot, whose state holds no "
            "command to come."
        )
        cure = "Choose another data.sources.state_key, or take the command out of the state."
        return [Finding(kind="state_leak", severity="fault", sentence=text, number=leak.now, cure=cure)]
    if leak.now > LEAK_R2_MIN:
        text = (
            f"A linear map from the state gives the next action with R2 {leak.now:.3f}, as with absolute "
            "positions: a policy that copies its state will look good offline."
        )
        return [hint(sentence=text, cure="Trust closed-loop rollouts only.")]
    if leak.dimensions:
        dimensions = ", ".join(map(str, leak.dimensions))
        return [
            hint(sentence=f"The state alone gives dimension {dimensions} of the action (R2 > {LEAK_R2_MIN}).")
        ]
    return []
