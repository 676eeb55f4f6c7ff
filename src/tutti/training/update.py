"""One update of the parameters: its batches, what was computed from them, and the observers that watch it.

One observer tells a balancing the terms' values after the step, where it asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tutti.distributed.ranks import MicroBatches, mean_over_ranks
from tutti.distributed.sharded_tensors import total_norm
from tutti.objectives.objective import Objective
from tutti.training.device import Machine
from tutti.training.rng import load_rng_state, own_randomness, rng_state
from tutti.training.strategy import SchedulePoint
from tutti.types import LABELS, Batch, Features, Label, LossTerms

Evaluate = Callable[[Batch, float, Collection[str]], tuple[Features, LossTerms]]
"""A forward pass: batch, progress of the schedules and the names of the terms that count."""


Sums = dict[str, Float64[np.ndarray, "p 2 k"]]
"""`LossTerms.by_source` as numbers."""


@dataclass(frozen=True, slots=True)
class TermValues:
    """Raw values, lambdas, metrics and total of one batch, as numbers."""

    values: dict[str, float]
    lambdas: dict[str, float]
    metrics: dict[str, float]
    total: float
    labelled: dict[str, float] = field(default_factory=dict)
    """Share of the rows that have each label."""
    by_source: Sums = field(default_factory=dict)

    def to_record(self) -> dict[str, float]:
        """What is recorded of a batch: the total, each term raw and weighted, lambdas, the terms' metrics,
        the shares of labelled rows."""
        return (
            {"loss/total": self.total}
            | {f"loss/{name}/raw": value for name, value in self.values.items()}
            | {f"loss/{name}/weighted": self.lambdas[name] * value for name, value in self.values.items()}
            | {f"lambda/{name}": value for name, value in self.lambdas.items()}
            | {f"metric/{name}": value for name, value in self.metrics.items()}
            | {f"data/labelled/{label}": share for label, share in self.labelled.items()}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceScalars:
    """The scalars of one batch's terms as they are now, still on the device and without their graph."""

    names: tuple[tuple[str, ...], ...]
    numbers: Float64[Tensor, " n"]
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    """Those of the terms' sums by source, which are the last of the numbers."""


def read_scalars(terms: LossTerms, batch: Batch | None = None) -> DeviceScalars:
    """A copy of raw values, lambdas, metrics, total and the shares of labelled rows of `batch`, if given,
    means over the ranks, without a synchronisation."""
    shares: dict[Label, Tensor] = {}
    if batch is not None:
        labels = LABELS if batch.answer_mask is None else (*LABELS, "answer")
        shares = {one: batch.labelled((one,)).double().mean() for one in labels}
    groups = (terms.values, terms.lambdas, terms.metrics, {"total": terms.total}, shares)
    device = terms.total.device
    scalars = [
        value.detach().to(device, torch.float64).reshape(()) for group in groups for value in group.values()
    ]
    numbers = torch.stack(scalars)
    if terms.by_source:  # means over the ranks as well: only their ratios count
        numbers = torch.cat([numbers, *(sums.to(device).flatten() for sums in terms.by_source.values())])
    return DeviceScalars(
        names=tuple(tuple(group) for group in groups),
        numbers=mean_over_ranks(numbers),
        shapes={name: sums.shape for name, sums in terms.by_source.items()},
    )


class Transfer:
    """The numbers of several batches' terms, and `more` scalars, on their way to the host in one transfer.

    What is queued on a GPU after this does not delay them.
    """

    def __init__(self, scalars: Sequence[DeviceScalars], *more: Tensor) -> None:
        self._scalars = scalars
        vectors = [one.numbers for one in scalars]
        extra = [value.detach().to(vectors[0]).reshape(1) for value in more]
        self._numbers, self._arrived = torch.cat([*vectors, *extra]), None
        if self._numbers.is_cuda:
            pinned = torch.empty_like(self._numbers, device="cpu", pin_memory=True)
            self._numbers = pinned.copy_(self._numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[list[TermValues], list[float]]:
        """The values of each batch, and those of `more`: here the host waits.

        A metric that is not finite (nothing to measure in this batch) is left out.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers = iter(self._numbers.tolist())
        terms: list[TermValues] = []
        for one in self._scalars:
            values, lambdas, metrics, total, shares = [{n: next(numbers) for n in g} for g in one.names]
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            sums = {
                name: np.array([next(numbers) for _ in range(shape.numel())]).reshape(shape)
                for name, shape in one.shapes.items()
            }
            terms.append(TermValues(values, lambdas, metrics, total["total"], shares, sums))
        return terms, list(numbers)


def to_host(scalars: Sequence[DeviceScalars], *more: Tensor) -> tuple[list[TermValues], list[float]]:
    """The numbers of several batches' terms, and `more` scalars, at once: the host waits."""
    return Transfer(scalars, *more).read()


@dataclass(slots=True, kw_only=True)
class Update:
    """An update while it is made: `step` (0-based), its point in the schedules, the terms that count.

    All `batches` are there before the first forward pass, since a mean is over the rows of all of them. Each
    forward pass adds its `scalars`. `terms`, `grad_norm` and its number `size` come when the backward pass is
    complete.
    """

    step: int
    point: SchedulePoint
    active_terms: tuple[str, ...]
    batches: list[Batch] = field(default_factory=list)
    scalars: list[DeviceScalars] = field(default_factory=list)
    terms: list[TermValues] = field(default_factory=list)
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    size: float = 0.0
    clip: dict[str, float] = field(default_factory=dict)
    """What clipping multiplied the gradient by (`Clipper.factors`)."""
    micro_batches: MicroBatches = field(init=False)
    shows_gradients: bool = False
    """True if an observer looks at the gradients of single terms, which must not be shown a NaN."""

    def __post_init__(self) -> None:
        self.micro_batches = MicroBatches(self.batches)

    @property
    def number(self) -> int:
        """The micro-batch that has last gone through the forward pass, from 0."""
        return len(self.scalars) - 1

    def read(self, parameters: Iterable[Tensor], objective: Objective, meanwhile: Callable[[], None]) -> None:
        """Fetches terms and gradient norm: the one time in an update that the host waits for the device,
        which computes `meanwhile` what that queues.

        A term of which no row has the labels is 0, but nothing was measured: it is left out.
        """
        self.grad_norm = total_norm([p.grad for p in parameters if p.grad is not None])
        sent = Transfer(self.scalars, self.grad_norm)
        meanwhile()
        self.terms, (self.size,) = sent.read()
        lacking = {
            label for label in self.terms[0].labelled if not any(t.labelled[label] for t in self.terms)
        }
        absent = {name for name in self.active_terms if lacking.intersection(objective.labels(name))}
        for found in (found for one in self.terms for found in (one.values, one.metrics)):
            for key in [key for key in found if key.split("/")[0] in absent]:
                del found[key]

    @property
    def means(self) -> dict[str, float]:
        """The raw terms, means over the micro-batches."""
        return mean_terms(self.terms)

    def to_records(self) -> list[dict[str, float]]:
        """What is recorded of each micro-batch; of several sources also the raw terms over their rows."""
        means = source_means(one.by_source for one in self.terms).items()
        of_sources = {"loss/{}/raw@{}".format(*name.split("@")): value for name, value in means}
        return [*(one.to_record() for one in self.terms), of_sources]

    @property
    def total(self) -> float:
        """The total, mean over the micro-batches."""
        return sum(one.total for one in self.terms) / len(self.terms)


def source_means(sums: Iterable[Sums]) -> dict[str, float]:
    """Each term over all rows of source i alone, by names such as "action@i", from the sums of batches: what
    is the sum of several means is the sum of those of which something counts there. A term of which nothing
    counts in a source is left out."""
    whole: Sums = {}
    for one in sums:
        whole |= {name: whole[name] + parts if name in whole else parts for name, parts in one.items()}
    means: dict[str, float] = {}
    for name, parts in whole.items():
        totals, counts = parts[:, 0], parts[:, 1]
        own = np.where(counts > 0, totals / np.where(counts > 0, counts, 1), 0).sum(axis=0)
        counted = np.flatnonzero((counts > 0).any(axis=0))
        means |= {f"{name}@{source}": float(own[source]) for source in counted}
    return means


def mean_terms(terms: Sequence[TermValues]) -> dict[str, float]:
    """The mean of each raw term over the micro-batches."""
    return {name: sum(one.values[name] for one in terms) / len(terms) for name in terms[0].values}


class Observer:
    """Watches updates. Every method may stay as it is."""

    def before_batches(self, update: Update) -> None:
        """Called before the batches of the update are drawn."""

    def after_batches(self, update: Update) -> None:
        """Called when all batches of the update are there, before the first forward pass."""

    def after_forward(self, update: Update, features: Features, terms: LossTerms) -> None:
        """Called between the forward and the backward pass of micro-batch `update.number`."""

    def before_step(self, update: Update) -> None:
        """Called when `.grad` is complete and nothing has moved."""

    def after_clipping(self, update: Update) -> None:
        """Called when `.grad` is what the optimiser is given, and nothing has moved."""

    def after_step(self, update: Update) -> None:
        """Called when the optimiser has moved the weights."""


class Reevaluation(Observer):
    """Computes the terms of the same batches once more after the step, where a balancing asks (FAMO)."""

    def __init__(self, objective: Objective, evaluate: Evaluate, machine: Machine) -> None:
        self.objective, self.evaluate, self.machine = objective, evaluate, machine
        self._random: dict[str, Any] = {}

    def before_batches(self, update: Update) -> None:
        if self.objective.hooks.needs_losses_after_step:
            self._random = rng_state()

    def after_step(self, update: Update) -> None:
        if self.objective.hooks.needs_losses_after_step:
            self.objective.hooks.reevaluate(update.means, self.means(update, self._random))

    @torch.no_grad()
    def means(self, update: Update, random: dict[str, Any]) -> dict[str, float]:
        """The raw terms of the batches of an update, means over the micro-batches, with the weights of now.

        Draws (dropout, noise) start from the random states `random`, those before the update: what differs
        from then is the weights alone. Afterwards the random states are what they were.
        """
        scalars: list[DeviceScalars] = []
        with own_randomness(0), self.machine.autocast():
            load_rng_state(random)
            for number, batch in enumerate(update.batches):
                with update.micro_batches.use(number):
                    _, terms = self.evaluate(batch, update.point.progress, update.active_terms)
                    scalars.append(read_scalars(terms))
            values, _ = to_host(scalars)
        there = update.means if update.terms else values[0].values
        return {name: value for name, value in mean_terms(values).items() if name in there}
