"""Which of the rates that were tried is the best, and which are as good within the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from tutti.runs.screened_rates import LEAST, RateVerdict
from tutti.types import UserError

LEVEL = 0.95
COMPARABLE = 0.5
"""Only rates whose mean error is within this share of the best one say what the noise is: near divergence a
seed decides."""


def judge_rates(errors: Mapping[float, Sequence[float | None]]) -> RateVerdict:
    """The verdict on the errors of each rate, one of each seed in the same order; None: not finite.

    The best rate has the lowest mean over the seeds; a rate with a training that was not finite is out.
    What a seed does to all rates alike does not count: with e the errors of R comparable rates from n seeds,

        s^2 = sum_rk (e_rk - mean_r - mean_k + mean)^2 / ((R - 1)(n - 1)),   tolerance = t_0.95 s sqrt(2 / n)

    and at least LEAST of the best mean. t is that of (R - 1)(n - 1) degrees of freedom, one-sided.

    Raises: UserError if no rate has a finite error.
    """
    table = {rate: np.array(own, np.float64) for rate, own in errors.items()}  # None becomes NaN
    means = {rate: float(own.mean()) for rate, own in table.items() if np.isfinite(own).all()}
    if not means:
        raise UserError(
            f"No rate from {min(errors):g} to {max(errors):g} gave a finite error. Begin with lower ones "
            f"(--from {min(errors) / 2:g}), or look for what is wrong: tutti doctor CONFIG"
        )
    best = min(means, key=lambda rate: (means[rate], rate))
    limit = means[best] + COMPARABLE * abs(means[best])
    known = np.array([table[rate] for rate in means if means[rate] <= limit])
    freedom, tolerance = (known.shape[0] - 1) * (known.shape[1] - 1), LEAST * abs(means[best])
    if freedom:
        left = known - known.mean(1, keepdims=True) - known.mean(0, keepdims=True) + known.mean()
        noise = math.sqrt(float((left**2).sum()) / freedom * 2 / known.shape[1])
        tolerance = max(tolerance, float(stats.t.ppf(LEVEL, freedom)) * noise)
    return RateVerdict(
        best=best,
        within_noise=tuple(sorted(rate for rate in means if means[rate] <= means[best] + tolerance)),
        tolerance=tolerance,
        noise_known=freedom > 0,
        edge=(best == max(errors)) - (best == min(errors)),
    )
