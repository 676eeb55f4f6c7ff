"""Findings in the curves that every run records: spikes, clipping, overfitting, align at chance or floor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from tutti.findings import (
    CHANCE_SHARE_MIN,
    CLIPPED_RECORDS_MIN,
    CLIPPED_SHARE_MAX,
    FLOOR_SHARE_MAX,
    OVERFIT_RISE_MAX,
    OVERFIT_VALIDATIONS_MIN,
    SPIKES_PER_STEP_MAX,
    Finding,
)
from tutti.report.findings.diagnostic_records import LAST_FRACTION
from tutti.report.formatting import percent, plain
from tutti.report.inputs import Json, Records, config_value


def judge_curves(records: Records, config: Json) -> Iterator[Finding]:
    """Everything that losses and optimizer show, in no order."""
    yield from spikes(records)
    yield from clipping(records, config)
    yield from skips(records)
    yield from rollbacks(records)
    for name in records.columns:
        pieces = name.split("/")
        if len(pieces) == 3 and pieces[0] == "loss" and pieces[2] == "raw":
            yield from overfitting(records, pieces[1])
            yield from chance(records, pieces[1])


def spikes(records: Records) -> Iterator[Finding]:
    """Loss spikes, with the last one of each term."""
    count, steps = records.last("diag/spikes"), _steps(records)
    if not count or not steps:
        return
    terms = [name.removeprefix("diag/spike/") for name in records.columns if name.startswith("diag/spike/")]
    last = [f"{term} at step {records.get(f'diag/spike/{term}')[0][-1]:,}" for term in terms]
    yield Finding(
        kind="loss_spikes",
        severity="warning" if count > steps * SPIKES_PER_STEP_MAX else "hint",
        sentence=f"{plain(count)} loss spike{'s' if count > 1 else ''} in {steps:,} steps"
        + (f" (last: {', '.join(last)})." if last else "."),
        number=count,
        cure="Look at the batches in spikes/ (tutti replay RUN/spikes/step-N): odd windows? Else lower "
        "the learning rate or `training.gradients.clip_norm`.",
    )


def clipping(records: Records, config: Json) -> Iterator[Finding]:
    """A clip norm that nearly every gradient exceeds."""
    values = [v for v in records.get("optim/clip_share")[1] if math.isfinite(v)]
    if len(values) < CLIPPED_RECORDS_MIN or fmean(values) < CLIPPED_SHARE_MAX:
        return
    share, norm = fmean(values), records.mean("optim/grad_norm")
    limit = config_value(config, "training", "gradients", "clip_norm")
    yield Finding(
        kind="always_clipped",
        severity="hint",
        sentence=f"{percent(share)} of the steps are clipped"
        + (f" (mean gradient norm {plain(norm)}" if norm else "")
        + (
            f", clip_norm {plain(limit)})."
            if norm and isinstance(limit, int | float)
            else ")."
            if norm
            else "."
        ),
        number=share,
        cure="All steps have the same length, whatever the gradient says: raise "
        "`training.gradients.clip_norm` above the usual norm, so that it holds back outliers only.",
    )


def skips(records: Records) -> Iterator[Finding]:
    """Updates left out because a value was not finite."""
    count, steps = records.last("optim/skipped"), _steps(records)
    if not count or not steps:
        return
    yield Finding(
        kind="skipped_updates",
        severity="warning" if count > steps * SPIKES_PER_STEP_MAX else "hint",
        sentence=f"{plain(count)} of {steps:,} updates {'was' if count == 1 else 'were'} left out: a term or "
        "the gradient was not finite.",
        number=count,
        cure="Look at the newest of them in failures/ (tutti replay RUN --failure): windows with odd "
        "values? Else lower the learning rate.",
    )


def rollbacks(records: Records) -> Iterator[Finding]:
    """Times that the run diverged and went back."""
    count = records.last("optim/rollbacks")
    if not count:
        return
    to, left = records.get("optim/rollback_from")
    ways = ", ".join(f"from step {plain(b)} to {a:,}" for a, b in zip(to, left, strict=True))
    yield Finding(
        kind="rolled_back",
        severity="warning",
        sentence=f"The loss diverged, and the run went back {plain(count)} time{'s' if count > 1 else ''}"
        + (f" ({ways})." if ways else "."),
        number=count,
        cure="It learned from other data after that; a lower learning rate or a longer warm-up may spare the "
        "detour.",
    )


def overfitting(records: Records, term: str) -> Iterator[Finding]:
    """A term that rises on held-out episodes while it falls in training."""
    steps, held = records.get(f"valid/{term}")
    points = [(s, v) for s, v in zip(steps, held, strict=True) if math.isfinite(v)]
    if len(points) <= OVERFIT_VALIDATIONS_MIN + 1:
        return
    best = min(range(len(points)), key=lambda n: points[n][1])
    (at_best, least), (at_end, end) = points[best], points[-1]
    before = _mean_between(records, term, points[best - 1][0] if best else 0, at_best)
    after = _mean_between(records, term, points[-2][0], at_end)
    if len(points) - 1 - best < OVERFIT_VALIDATIONS_MIN or least <= 0 or before is None or after is None:
        return
    rise = end / least - 1
    if rise >= OVERFIT_RISE_MAX and after < before:
        yield Finding(
            kind="overfit",
            severity="warning",
            sentence=f"{term} overfits: on held-out episodes it rose by {percent(rise)} since step "
            f"{at_best:,} ({plain(least)} to {plain(end)}), while in training it fell from {plain(before)} "
            f"to {plain(after)}.",
            number=rise,
            cure=f"More demonstrations or augmentation, fewer steps, or let the weight of {term} reach 0 at "
            f"step {at_best:,}.",
            term=term,
        )


def chance(records: Records, term: str) -> Iterator[Finding]:
    """A term that stands where a guess does, or where nothing is left to learn."""
    # A term that is more than a cross-entropy reports that one by itself; chance is its chance.
    own = f"metric/{term}/cross_entropy"
    own = own if own in records else f"loss/{term}/raw"
    value, guess, floor = (
        _end(records, name) for name in (own, f"metric/{term}/chance", f"metric/{term}/floor")
    )
    if value is None or guess is None or guess <= (floor or 0.0):
        return
    share = (value - (floor or 0.0)) / (guess - (floor or 0.0))
    if share >= CHANCE_SHARE_MIN:
        yield Finding(
            kind="at_chance",
            severity="warning",
            sentence=f"{term} is at chance: {plain(value)} in its last quarter, a guess has {plain(guess)}.",
            number=value,
            cure="It has taught nothing: train longer, raise its weight, or check that instructions differ "
            "within a batch.",
            term=term,
        )
    elif floor is not None and share <= FLOOR_SHARE_MAX:
        yield Finding(
            kind="at_floor",
            severity="hint",
            sentence=f"{term} is at its floor: {plain(value)}, at best {plain(floor)}, by chance "
            f"{plain(guess)}.",
            number=value,
            cure="It has nothing left to teach: its weight may reach 0 earlier.",
            term=term,
        )


def _end(records: Records, name: str) -> float | None:
    """The mean of the finite values in the last quarter of the column."""
    values = [v for v in records.get(name)[1] if math.isfinite(v)]
    return fmean(values[-math.ceil(len(values) / LAST_FRACTION) :]) if values else None


def _mean_between(records: Records, term: str, after: int, until: int) -> float | None:
    steps, values = records.get(f"loss/{term}/raw")
    found = [v for s, v in zip(steps, values, strict=True) if after < s <= until and math.isfinite(v)]
    return fmean(found) if found else None


def _steps(records: Records) -> int:
    """The last step that was recorded."""
    return max((steps[-1] for steps, _ in records.columns.values() if steps), default=0)
