"""Consistency of successive action chunks: disagreement where they overlap, and sign flips of actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tutti.data.samples import Sample, spread
from tutti.evaluation.probes.predictions import masked_sums, predict
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.models.vla import VLA

DEAD_BAND = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkConsistency:
    """Agreement of the chunks predicted at t and t + k of an episode, k = `distance` the actions per query:

    `chunk_disagreement` = mean |a^t_{t+k+j} - a^{t+k}_{t+k+j}| over the steps that both chunks cover, as a
    share of the masked mean error |a^ - a*| there (None where chunks do not overlap);
    `sign_flips` = of the pairs of consecutive executed actions of which both are larger than `DEAD_BAND` in
    size, each dimension by itself, the share whose signs differ; `recorded_flips` is that share in the
    recorded actions. Sizes are in the data's units divided by the normalisation's scale, so 0 is a command
    of 0.
    """

    distance: int
    chunk_disagreement: Estimate | None
    sign_flips: Estimate
    recorded_flips: Estimate


def chunk_consistency(
    model: VLA,
    sample: Sample,
    *,
    centre: Float64[np.ndarray, " a"],
    executed: int,
    max_pairs: int = 1000,
    seed: int = 0,
) -> ChunkConsistency | None:
    """At most `max_pairs` pairs from `sample`; `centre` is what 0 of the data is in normalised units.

    None if no episode is long enough for a pair.
    """
    index, horizon = sample.index, model.spec.horizon
    distance = min(executed, horizon)
    later = sample.rows + distance
    inside = later < index.episodes_of(sample.rows)
    if not inside.any():
        return None
    first = spread(index, sample.rows[inside], max_pairs)
    second = spread(index, first.rows + distance, max_pairs)
    zero = torch.from_numpy(centre).float()
    rows: dict[str, list[np.ndarray]] = {}
    for one, two in zip(first.batches(), second.batches(), strict=True):
        chunks = predict(model, one.observation), predict(model, two.observation)
        overlap = horizon - distance
        if overlap:
            mask = two.action_mask[:, :overlap]
            old, new = chunks[0][:, distance:], chunks[1][:, :overlap]
            _add(rows, "disagreement", masked_sums(old - new, mask, overlap))
            _add(rows, "error", masked_sums(new - two.actions[:, :overlap], mask, overlap))
        predicted = torch.cat([chunk[:, :distance] for chunk in chunks], dim=1) - zero
        recorded = torch.cat([batch.actions[:, :distance] for batch in (one, two)], dim=1) - zero
        present = torch.cat([batch.action_mask[:, :distance] for batch in (one, two)], dim=1)
        for name, actions in (("predicted", predicted), ("recorded", recorded)):
            flipped, pairs = _sign_flips(actions, present)
            _add(rows, f"{name}/flips", flipped)
            _add(rows, f"{name}/pairs", pairs)
    table = {name: np.concatenate(parts) for name, parts in rows.items()}

    def ratio(top: str, bottom: str) -> Estimate:
        return ratio_of_sums(table[top], table[bottom], first.episode, seed=seed)

    return ChunkConsistency(
        distance=distance,
        chunk_disagreement=ratio("disagreement", "error") if "disagreement" in table else None,
        sign_flips=ratio("predicted/flips", "predicted/pairs"),
        recorded_flips=ratio("recorded/flips", "recorded/pairs"),
    )


def _sign_flips(actions: Tensor, present: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each window: how many consecutive pairs change sign, of how many that are large enough."""
    large = (actions.abs() > DEAD_BAND) & present
    both = large[:, 1:] & large[:, :-1]
    flipped = both & (actions[:, 1:].sign() != actions[:, :-1].sign())
    return flipped.double().sum((1, 2)).numpy(), both.double().sum((1, 2)).numpy()


def _add(rows: dict[str, list[np.ndarray]], name: str, values: np.ndarray) -> None:
    rows.setdefault(name, []).append(values)
