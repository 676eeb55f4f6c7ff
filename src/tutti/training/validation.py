"""Each loss term on held-out episodes, without touching weights, modes or random states."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn

from tutti.objectives.objective import Objective
from tutti.training.machine import Machine
from tutti.training.randomness import own_randomness
from tutti.types import Batch, LossTerms


def term_values(terms: LossTerms) -> tuple[dict[str, float], dict[str, float], dict[str, float], float]:
    """Raw values, lambdas, metrics and total as numbers, fetched from the device at once.

    A metric that is not finite (nothing to measure in this batch) is left out.
    """
    groups = [terms.values, terms.lambdas, terms.metrics, {"total": terms.total}]
    tensors = [value for group in groups for value in group.values()]
    device = terms.total.device
    numbers = torch.stack([t.detach().to(device, torch.float64).reshape(()) for t in tensors]).tolist()
    taken = iter(numbers)
    values, lambdas, metrics, total = [{name: next(taken) for name in group} for group in groups]
    return values, lambdas, {n: v for n, v in metrics.items() if math.isfinite(v)}, total["total"]


@torch.no_grad()
def validate(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    machine: Machine,
    *,
    progress: float,
    seed: int,
    only: Collection[str] | None = None,
    prefix: str = "valid",
) -> dict[str, float]:
    """Means over the held-out windows in evaluation mode: "valid/action", "valid/metric/...", "valid/total".

    Batches are weighted by their number of windows. Random draws of the terms come from `seed`, so equal
    weights give equal numbers, and training goes on as if this had not happened. `progress` in [0, 1] is the
    share of training done, which decides the lambdas of the total; `only` names the terms that count.
    """
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    modes = [(module, module.training) for root in (model, objective) for module in root.modules()]
    model.eval()
    objective.eval()
    try:
        with own_randomness(seed):
            for batch in batches:
                moved = batch.to(machine.device)
                with machine.autocast():
                    terms: LossTerms = objective(model(moved.observation), moved, progress, only)
                values, _, metrics, total = term_values(terms)
                found = {**values, **{f"metric/{name}": v for name, v in metrics.items()}, "total": total}
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value * len(batch.window)
                    weights[name] = weights.get(name, 0) + len(batch.window)
    finally:
        for module, mode in modes:
            module.training = mode
    return {f"{prefix}/{name}": total / weights[name] for name, total in sums.items()}
