"""Each loss term on held-out episodes, without touching weights, modes or random states."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tutti.distributed.ranks import ONE_RANK, mean_over_ranks, shared_batch
from tutti.distributed.world import ONE_PROCESS, World
from tutti.objectives.objective import Objective
from tutti.training.data_feed import portion
from tutti.training.device import Machine
from tutti.training.rng import own_randomness, seed_everything
from tutti.types import Batch, Features, LossTerms

if TYPE_CHECKING:
    from tutti.training.data_feed import TrainingData
    from tutti.training.trainer import Trainer

TermValues = tuple[dict[str, float], dict[str, float], dict[str, float], float]
"""Raw values, lambdas, metrics and total of one batch."""

Evaluate = Callable[[Batch, float, Collection[str] | None], tuple[Features, LossTerms]]
"""A forward pass: batch, progress and the names of the terms that count."""


class ValidationConfig(BaseModel):
    """How often the loss terms are measured on held-out episodes, and with which weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=200, ge=0, description="Steps between validations; 0: never.")
    raw: bool = Field(default=False, description="Also validate the raw weights, not only their average.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The scalars of one batch's terms as they are now, still on the device and without their graph."""

    names: tuple[tuple[str, ...], ...]
    numbers: Float64[Tensor, " n"]


def reading(terms: LossTerms) -> Reading:
    """A copy of raw values, lambdas, metrics and total, means over the ranks. The host does not wait for
    it."""
    groups = (terms.values, terms.lambdas, terms.metrics, {"total": terms.total})
    device = terms.total.device
    scalars = [
        value.detach().to(device, torch.float64).reshape(()) for group in groups for value in group.values()
    ]
    return Reading(
        names=tuple(tuple(group) for group in groups), numbers=mean_over_ranks(torch.stack(scalars))
    )


def fetch(readings: Sequence[Reading], *more: Tensor) -> tuple[list[TermValues], list[float]]:
    """The numbers of several readings, and `more` scalars, in one transfer: the host waits once.

    A metric that is not finite (nothing to measure in this batch) is left out.
    """
    vectors = [one.numbers for one in readings]
    scalars = [value.detach().to(vectors[0]).reshape(1) for value in more]
    taken = iter(torch.cat([*vectors, *scalars]).tolist())
    found: list[TermValues] = []
    for one in readings:
        values, lambdas, metrics, total = [{name: next(taken) for name in group} for group in one.names]
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        found.append((values, lambdas, metrics, total["total"]))
    return found, list(taken)


def term_values(terms: LossTerms) -> TermValues:
    """Raw values, lambdas, metrics and total as numbers, fetched from the device at once.

    A metric that is not finite (nothing to measure in this batch) is left out.
    """
    ((found,), _) = fetch([reading(terms)])
    return found


def validated(trainer: Trainer, data: TrainingData) -> dict[str, float]:
    """Every term with the weights that are served (the moving average, or that of a schedule-free
    optimiser) as valid/..., and, if asked for, with those in training as valid_raw/..."""
    moment = trainer.strategy.at(trainer.step - 1)
    share = (moment.step + 1) / moment.steps
    parts = (trainer.model, trainer.objective, data.validation, trainer.machine)
    given: dict[str, Any] = {
        "progress": share,
        "seed": trainer.config.seed,
        "only": moment.phase.counting(trainer.objective.names),
        "evaluate": trainer.parallel.judge,
        "world": trainer.parallel.world,
    }
    with ExitStack() as served:
        served.enter_context(trainer.optimizer.averaged())
        for average in trainer.averages.values():
            served.enter_context(average.applied())
        values = validate(*parts, **given)
    if trainer.config.validation.raw and (trainer.averages or trainer.optimizer.averages):
        values |= validate(*parts, prefix="valid_raw", **given)
    return values


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
    evaluate: Evaluate | None = None,
    world: World = ONE_PROCESS,
) -> dict[str, float]:
    """Means over the held-out windows in evaluation mode: "valid/action", "valid/metric/...", "valid/total".

    Batches are weighted by their number of windows. Equal weights give equal numbers, and training goes on as
    if this had not happened. `progress` in [0, 1] is the share of training done, which decides the lambdas of
    the total; `only` names the terms that count. `evaluate` is the forward pass where it is not that of the
    plain modules.

    On several ranks of `world` batch i is judged by rank i mod n, alone: no row meets those of another rank,
    so the batches are those of one process. The random draws of batch i come from `seed` + i, and the values
    of all are added up in the order of the batches: the means are to the last bit those of one process with
    the same weights. All ranks must call it, and get the same.
    """

    def plain(batch: Batch, at: float, names: Collection[str] | None) -> tuple[Features, LossTerms]:
        features: Features = model(batch.observation)
        return features, objective(features, batch, at, names)

    evaluate = evaluate or plain
    own: list[tuple[int, int, dict[str, float]]] = []
    modes = [(module, module.training) for root in (model, objective) for module in root.modules()]
    model.eval()
    objective.eval()
    try:
        with own_randomness(seed), shared_batch(ONE_RANK):
            for number, batch in portion(batches, world.ranks):
                seed_everything(seed + (number or 0))
                moved = batch.to(machine.device)
                with machine.autocast():
                    _, terms = evaluate(moved, progress, only)
                values, _, metrics, total = term_values(terms)
                found = {**values, **{f"metric/{name}": v for name, v in metrics.items()}, "total": total}
                if number is not None:
                    own.append((number, len(batch.window), found))
    finally:
        for module, mode in modes:
            module.training = mode
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for _, windows, found in sorted(chain(*world.all_gather(own)), key=lambda one: one[0]):
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * windows
            weights[name] = weights.get(name, 0) + windows
    return {f"{prefix}/{name}": total / weights[name] for name, total in sums.items()}
