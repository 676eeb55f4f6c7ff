"""Validation: every loss term on held-out episodes; weights, modes and random states stay as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tutti.distributed.ranks import ONE_RANK, shared_batch
from tutti.frozen_config import FrozenConfig
from tutti.training.data_feed import portion
from tutti.training.device import Machine
from tutti.training.parallel.ddp import Parallel
from tutti.training.rng import own_randomness, seed_everything, without_side_effects
from tutti.training.update import Sums, read_scalars, source_means, to_host
from tutti.types import Batch


class ValidationConfig(FrozenConfig):
    """How often the loss terms are measured on held-out episodes, and with which weights."""

    every: int = Field(default=200, ge=0, description="Steps between validations; 0: never.")
    raw: bool = Field(default=False, description="Also validate the raw weights, not only their average.")


@torch.no_grad()
def validate(
    parallel: Parallel,
    machine: Machine,
    batches: Iterable[Batch],
    *,
    progress: float,
    seed: int,
    only: Collection[str] | None = None,
    prefix: str = "valid",
) -> dict[str, float]:
    """Means over the held-out windows in evaluation mode: "valid/action", "valid/metric/...", "valid/total".

    Batches are weighted by their number of windows; for a term and its metrics by those that have its labels,
    and where none has them it is left out. What a term reports over all windows (`Term.joined`) is
    computed once, from what it kept of each batch. Of several sources there is also "valid/action@i": the
    term over all that counts in the windows of source i. Equal weights give equal numbers, and training
    goes on as if this had not happened. `progress` in [0, 1] is the share of training done, which decides the
    lambdas of the total; `only` names the terms that count.

    On several ranks batch i is judged by rank i mod n, alone: no row meets those of another rank,
    so the batches are those of one process. The random draws of batch i come from `seed` + i, and the values
    of all are added up in the order of the batches: the means are to the last bit those of one process with
    the same weights. All ranks must call it, and get the same.
    """

    world, objective = parallel.world, parallel.objective
    roots = (parallel.model, objective)
    judged: list[tuple[int, dict[str, int], dict[str, float], dict[str, float], Any, Sums]] = []
    with without_side_effects(*roots), own_randomness(seed), shared_batch(ONE_RANK):
        for root in roots:
            root.eval()
        for number, batch in portion(batches, world.ranks):
            seed_everything(seed + (number or 0))
            with machine.autocast():
                _, terms = parallel.evaluate_held_out(batch.to(machine.device), progress, only)
            ((read,), _) = to_host([read_scalars(terms)])
            metrics = {f"metric/{name}": value for name, value in read.metrics.items()}
            if number is not None:
                values = {**read.values, **metrics, "total": read.total}
                rows = {name: int(batch.labelled(objective.labels(name)).sum()) for name in read.values}
                rows["total"] = len(batch.window)
                kept = {name: {k: v.cpu() for k, v in own.items()} for name, own in terms.per_window.items()}
                judged.append((number, rows, values, read.lambdas, kept, read.by_source))
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    parts: dict[str, list[dict[str, Tensor]]] = {}
    in_order = sorted(chain(*world.all_gather(judged)), key=lambda one: one[0])
    for _, rows, values, _, kept, _ in in_order:
        for name, value in values.items():
            windows = rows.get(name.removeprefix("metric/").split("/")[0], rows["total"])
            sums[name] = sums.get(name, 0.0) + value * windows
            weights[name] = weights.get(name, 0) + windows
        for name, own in kept.items():
            parts.setdefault(name, []).append(own)
    means = {name: total / weights[name] for name, total in sums.items() if weights[name]}
    if any(min(rows.values()) < rows["total"] for _, rows, *_ in in_order):
        # Terms have weights of their own: the mean of the batches' totals is no longer the sum of the means.
        means["total"] = sum(factor * means.get(name, 0.0) for name, factor in in_order[0][3].items())
    for name, each in parts.items():
        whole = {key: torch.cat([one[key] for one in each]) for key in each[0]}
        means |= {f"metric/{name}/{key}": value for key, value in objective.joined(name, whole).items()}
    means |= source_means(one[-1] for one in in_order)
    return {f"{prefix}/{name}": mean for name, mean in means.items()}
