"""Who moves what: the reach table of every phase, and each term's share of the gradient in each part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from tutti.config.run_config import RunConfig
from tutti.data.bundle import DataBundle
from tutti.debug.remarks import Remark, note, problem
from tutti.models.vla import VLA
from tutti.objectives.unified import UnifiedLoss
from tutti.objectives.weight_schedule import schedule_of
from tutti.report.findings.diagnostics import DROWNED, LOUD
from tutti.training.backward.routing import OBJECTIVE
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.diagnostics.measures import gradient_measures
from tutti.training.diagnostics.reach import ReachTable, problems, reach
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.optim.optimizers import part_of
from tutti.training.rng import own_randomness
from tutti.training.strategy import Strategy
from tutti.training.trainer import Trainer
from tutti.types import Batch

PRIMARY = "action"
LARGE, TOO_LARGE = 0.7, 0.9
"""Shares of a part's gradient: above the first a term is named, above the second it is a problem, if the term
keeps its weight to the end. The action is what the robot does; the rest serves it."""
TRIES = 4
"""Batches after which a term that reaches nothing is believed to: one batch may be masked by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareTable:
    """`shares[part][term]` = |lambda_i g_i| / sum_j |lambda_j g_j| over the part's parameters, the norms
    being means over a few batches. `lambdas` are the weights in it; `title` says when and with which."""

    title: str
    shares: Mapping[str, Mapping[str, float]]
    lambdas: Mapping[str, float]

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms, in the order of the sum."""
        return tuple(self.lambdas)


def phase_tables(
    config: RunConfig, model: VLA, objective: UnifiedLoss, batches: Sequence[Batch]
) -> tuple[list[tuple[str, ReachTable]], list[Remark]]:
    """The reach table at the start of each phase, and at its end where other terms count by then.

    What one batch seems to lack must be lacking in all of `batches` to be a problem.
    """
    strategy = _strategy(config, objective)
    tables = list(_tables(config, strategy, model, objective, batches[0]))
    wrong = problems([table for _, table in tables])
    for batch in batches[1:TRIES]:
        if wrong:
            again = problems([table for _, table in _tables(config, strategy, model, objective, batch)])
            wrong = [sentence for sentence in wrong if sentence in again]
    remarks = [problem("reach", sentence) for sentence in wrong]
    still = set.intersection(*({*table.frozen} for _, table in tables))
    remarks += [note("reach", f"{part} never learns: the strategy freezes it throughout.") for part in still]
    return tables, remarks


def _tables(
    config: RunConfig, strategy: Strategy, model: VLA, objective: UnifiedLoss, batch: Batch
) -> Iterator[tuple[str, ReachTable]]:
    for number, phase in enumerate(strategy.phases):
        first = strategy.ends[number - 1] if number else 0
        before: set[str] = set()
        for moment in (strategy.at(first), strategy.at(strategy.ends[number] - 1)):
            table = reach(
                model,
                objective,
                batch,
                only=phase.counting(objective.names),
                frozen=phase.frozen,
                mask={t: parts for t, parts in config.backward.moves.items() if t in objective.names},
                progress=moment.progress,
            )
            if set(table.terms) - before:
                yield phase.name, table
            before |= set(table.terms)


class Rehearsal:
    """The first updates of the training that `config` describes, for measurements; nothing is kept of it.

    What a trainer writes when something goes wrong lies in a folder that lasts as long as the `with` block.
    """

    def __init__(self, config: RunConfig, data: DataBundle, model: VLA, objective: UnifiedLoss) -> None:
        self.config, self.data, self.objective = config, data, objective
        self.model = model
        self._folder = TemporaryDirectory()
        self.trainer = Trainer(
            config.training,
            model,
            objective,
            Path(self._folder.name),
            strategy=config.strategy,
            backward=config.backward,
        )
        self.updates = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self, updates: int) -> list[Remark]:
        """Makes the updates, with the schedules of the training's start. A non-finite one ends it."""
        stream = map(self.data.train.batch_at, count())
        self.model.train()
        self.objective.train()
        for number in range(min(updates, self.config.training.steps)):
            try:
                self.trainer.rehearse(stream, number)
            except NonFiniteError as error:
                what = "the gradient" if error.term == "gradient" else f"'{error.term}'"
                text = (
                    f"update {error.step}: {what} is not finite. Look for extreme values in windows "
                    f"{', '.join(map(str, error.windows[:8]))}; else lower training.optimizer.lr or "
                    "lengthen training.schedule.warmup."
                )
                return [problem("first updates", text)]
            self.updates += 1
        return []

    def shares(self, batches: Sequence[Batch], *, at_end: bool) -> ShareTable:
        """Shares at the present weights, with the lambdas of the training's start or of its end.

        The terms are those of the phase (the first; the last in which the action counts), and what the
        backward forbids a term is not in them.
        """
        strategy, names = self.trainer.strategy, self.objective.names
        phases = [phase for phase in strategy.phases if PRIMARY in phase.counting(names)]
        phase = phases[-1] if at_end and phases else strategy.phases[0]
        moment = strategy.at(strategy.steps - 1 if at_end else 0)
        progress = 1.0 if at_end else moment.progress
        parameters = self.trainer.parameters
        parts: dict[str, list[int]] = {}
        for number, (name, parameter) in enumerate(parameters.items()):
            parameter.requires_grad_(part_of(name) not in phase.frozen)
            if part_of(name) != OBJECTIVE:
                parts.setdefault(part_of(name), []).append(number)
        norms: dict[str, dict[str, float]] = {part: {} for part in parts}
        lambdas: dict[str, float] = {}
        with own_randomness(self.config.seed):
            for batch in batches:
                features = self.model(batch.observation)
                terms = self.objective(features, batch, progress, phase.counting(names))
                gradients = self.trainer.backward.routed(
                    term_gradients(terms.values, list(parameters.values()))
                )
                lambdas = {name: float(value) for name, value in terms.lambdas.items()}
                for key, value in gradient_measures(gradients, lambdas, parts).items():
                    kind, _, rest = key.partition("/")
                    if kind == "norm":
                        term, _, part = rest.rpartition("/")
                        norms[part][term] = norms[part].get(term, 0.0) + value / len(batches)
        when = f"after {self.updates} updates" if self.updates else "at initialisation"
        return ShareTable(
            title=f"Gradient shares {when}, weights as at the training's {'end' if at_end else 'start'}",
            shares={
                part: {term: value / max(sum(own.values()), 1e-300) for term, value in own.items()}
                for part, own in norms.items()
                if sum(own.values()) > 0
            },
            lambdas=lambdas,
        )


def judge(config: RunConfig, start: ShareTable, end: ShareTable) -> list[Remark]:
    """Terms other than the action's that supply most of the gradient in a part that the action moves too.

    A weight that falls is a curriculum, so it is a note: the demo's state term begins with 92 % of the vision
    encoder's gradient, at a weight that was chosen by rollouts, and has about half at its last weight. What a
    term keeps to the end competes with the action to the end.
    """
    remarks: list[Remark] = []
    for term, found in _dominating(end, LARGE).items():
        part, share = max(found.items(), key=lambda pair: pair[1])
        weight = end.lambdas[term]
        even = weight * (1 - share) / share
        rest = [end.shares[p].get(PRIMARY, 0.0) for p in found]
        when = end.title.partition(",")[0].removeprefix("Gradient shares ")
        text = (
            f"'{term}' supplies {_listed(found)} ({when}) at the weight {weight:g} that it has at the end of "
            f"the training, the action term {100 * min(rest):.1f} %. objective.{term}.weight is likely too "
            f"high: at {even:.1g} it would supply half of the {part} gradient."
        )
        remarks.append(problem("shares", text) if share > TOO_LARGE else note("shares", text))
    drowned = {part for part, own in start.shares.items() if 0 < own.get(PRIMARY, 0.0) < DROWNED}
    for term, found in _dominating(start, LARGE, drowned).items():
        if not any(f"'{term}'" in remark.text for remark in remarks):
            schedule = schedule_of(config.objective.weights()[term])
            falls = f", which falls to {schedule.at(1.0):g}" if schedule.at(1.0) < schedule.at(0.0) else ""
            text = (
                f"at initialisation '{term}' supplies {_listed(found)} at its weight {start.lambdas[term]:g}"
            )
            rest = [start.shares[part][PRIMARY] for part in found if part in drowned]
            action = f"; the action term has {100 * min(rest):.1f} %" if rest else ""
            remarks.append(note("shares", f"{text}{falls}{action}."))
    return remarks


def _dominating(
    table: ShareTable, bound: float, drowned: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """term -> {part: share} where it is above `bound`, or above `LOUD` in the parts in which the action is
    `drowned`; in parts that the action term moves."""
    found: dict[str, dict[str, float]] = {}
    for part, own in table.shares.items():
        for term, share in own.items():
            if term != PRIMARY and own.get(PRIMARY, 0.0) > 0 and share > (LOUD if part in drowned else bound):
                found.setdefault(term, {})[part] = share
    return found


def _listed(found: Mapping[str, float]) -> str:
    shares = [f"{100 * share:.0f} % of the {part} gradient" for part, share in found.items()]
    return " and ".join([", ".join(shares[:-1]), *shares[-1:]] if shares[1:] else shares)


def _strategy(config: RunConfig, objective: UnifiedLoss) -> Strategy:
    training = config.training
    return Strategy(
        config.strategy.phases(),
        steps=training.steps,
        warmup=training.schedule.warmup,
        terms=objective.names,
    )
