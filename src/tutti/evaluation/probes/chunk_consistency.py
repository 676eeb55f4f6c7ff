"""Does the plan hold: the same moment predicted by two chunks, and how often actions turn back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tutti.evaluation.probes.samples import Sample, masked_sums, predict, spread
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.models.vla import VLA

DEAD_BAND = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """Over pairs of windows t and t + k of an episode, k = `distance` the actions executed before the policy
    looks again:

    `jump` = mean |a^t_{t+k+j} - a^{t+k}_{t+k+j}| over the moments that both chunks cover, as a share of the
    masked mean error |a^ - a*| there (None where chunks do not overlap);
    `reversals` = of the pairs of consecutive executed actions of which both are larger than `DEAD_BAND` in
    size, each dimension by itself, the share whose signs differ; `recorded` is that share in the recorded
    actions. Sizes are in the data's units divided by the normalisation's scale, so 0 is a command of 0.
    """

    distance: int
    jump: Estimate | None
    reversals: Estimate
    recorded: Estimate


def consistency(
    model: VLA,
    sample: Sample,
    *,
    centre: Float64[np.ndarray, " a"],
    execute: int,
    most: int = 1000,
    seed: int = 0,
) -> Consistency | None:
    """At most `most` pairs from `sample`; `centre` is what 0 of the data is in normalised units.

    None if no episode is long enough for a pair.
    """
    index, horizon = sample.index, model.spec.horizon
    distance = min(execute, horizon)
    later = sample.rows + distance
    inside = later < index.episodes_of(sample.rows)
    if not inside.any():
        return None
    first = spread(index, sample.rows[inside], most)
    second = spread(index, first.rows + distance, most)
    zero = torch.from_numpy(centre).float()
    rows: dict[str, list[np.ndarray]] = {}
    for one, two in zip(first.batches(), second.batches(), strict=True):
        chunks = predict(model, one.observation), predict(model, two.observation)
        overlap = horizon - distance
        if overlap:
            mask = two.action_mask[:, :overlap]
            old, new = chunks[0][:, distance:], chunks[1][:, :overlap]
            _add(rows, "jump", masked_sums(old - new, mask, overlap))
            _add(rows, "error", masked_sums(new - two.actions[:, :overlap], mask, overlap))
        played = torch.cat([chunk[:, :distance] for chunk in chunks], dim=1) - zero
        shown = torch.cat([batch.actions[:, :distance] for batch in (one, two)], dim=1) - zero
        present = torch.cat([batch.action_mask[:, :distance] for batch in (one, two)], dim=1)
        for name, actions in (("played", played), ("shown", shown)):
            turned, pairs = _turns(actions, present)
            _add(rows, f"{name}/turned", turned)
            _add(rows, f"{name}/pairs", pairs)
    table = {name: np.concatenate(parts) for name, parts in rows.items()}

    def ratio(top: str, bottom: str) -> Estimate:
        return ratio_of_sums(table[top], table[bottom], first.episode, seed=seed)

    return Consistency(
        distance=distance,
        jump=ratio("jump", "error") if "jump" in table else None,
        reversals=ratio("played/turned", "played/pairs"),
        recorded=ratio("shown/turned", "shown/pairs"),
    )


def _turns(actions: Tensor, present: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each window: how many consecutive pairs change sign, of how many that are large enough."""
    large = (actions.abs() > DEAD_BAND) & present
    both = large[:, 1:] & large[:, :-1]
    turned = both & (actions[:, 1:].sign() != actions[:, :-1].sign())
    return turned.double().sum((1, 2)).numpy(), both.double().sum((1, 2)).numpy()


def _add(rows: dict[str, list[np.ndarray]], name: str, values: np.ndarray) -> None:
    rows.setdefault(name, []).append(values)
