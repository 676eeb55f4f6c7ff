"""Gradient checks: which term reaches which part in each phase; each term's share of update and gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tutti.config.run_config import RunConfig
from tutti.findings import Finding
from tutti.models.config import pretrained_parts
from tutti.report.formatting import capitalised
from tutti.report.judges import dominating_terms
from tutti.report.records import PRIMARY, single_step
from tutti.runs.build import BuiltTraining
from tutti.training.backward.masked import OBJECTIVE
from tutti.training.backward.term_gradients import Gradients, added, term_gradients
from tutti.training.diagnostics.measures import gradient_measures, update_shares, weighted_sum
from tutti.training.diagnostics.reach import ReachTable, problems, reach
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.optim.learning_rates import part_of
from tutti.training.optim.update_parts import preconditioned
from tutti.training.rng import own_randomness
from tutti.types import Batch

TRIES = 4
"""Batches after which a term that reaches nothing is reported: one batch may be masked by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientShares:
    """`norm`, `share` and `update_share` of each term and part, as in the records, but of the step that a few
    batches together would make: no run is there to follow. `lambdas` are the weights in it, `when` says at
    which weights of the model and of the terms."""

    when: str
    measures: Mapping[str, float]
    lambdas: Mapping[str, float]

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms, in the order of the sum."""
        return tuple(self.lambdas)

    def by_part(self, kind: Literal["update_share", "share"]) -> dict[str, dict[str, float]]:
        """`by_part(kind)[part][term]`: the share of the update or of the gradient."""
        table: dict[str, dict[str, float]] = {}
        for name, share in self.measures.items():
            found, term, part = name.split("/")
            if found == kind:
                table.setdefault(part, {})[term] = share
        return table


def phase_tables(
    training: BuiltTraining, batches: Sequence[Batch]
) -> tuple[list[tuple[str, ReachTable]], list[Finding]]:
    """The reach table at the start of each phase, and at its end where other terms count by then.

    What one batch seems to lack must be lacking in all of `batches` to be a problem.
    """
    tables = list(_tables(training, batches[0]))
    wrong = problems([table for _, table in tables])
    for batch in batches[1:TRIES]:
        if wrong:
            again = problems([table for _, table in _tables(training, batch)])
            wrong = [sentence for sentence in wrong if sentence in again]
    findings = [Finding(kind="reach", severity="fault", sentence=capitalised(text)) for text in wrong]
    frozen = set.intersection(*({*table.frozen} for _, table in tables))
    towers = {name: part.tower for name, part in pretrained_parts(training.model).items()}
    for part in sorted(frozen):
        config = towers[part].config if part in towers else None
        why = "the strategy freezes it throughout"
        if config is not None and config.learn != "all":
            lora = "lora, which is for linear layers of blocks"
            why = f"{config.key}.learn is {'none' if config.learn == 'none' else lora}"
        text = f"{capitalised(part)} never learns: {why}."
        findings.append(Finding(kind="always_frozen", severity="hint", sentence=text, part=part))
    return tables, findings


def _tables(training: BuiltTraining, batch: Batch) -> Iterator[tuple[str, ReachTable]]:
    strategy, objective = training.trainer.strategy, training.objective
    may_train = training.config.backward.may_train
    for number, phase in enumerate(strategy.phases):
        first = strategy.ends[number - 1] if number else 0
        before: set[str] = set()
        for moment in (strategy.at(first), strategy.at(strategy.ends[number] - 1)):
            table = reach(
                training.model,
                objective,
                batch,
                only=phase.active_terms(objective.names),
                frozen=phase.frozen,
                mask={term: parts for term, parts in may_train.items() if term in objective.names},
                progress=moment.progress,
            )
            if set(table.terms) - before:
                yield phase.name, table
            before |= set(table.terms)


def first_updates(training: BuiltTraining, updates: int) -> list[Finding]:
    """Makes the first updates, with the schedules of the training's start; a non-finite one ends it."""
    try:
        training.run_updates(range(updates))
    except NonFiniteError as error:
        what = "the gradient" if error.term == "gradient" else f"'{error.term}'"
        windows = ", ".join(map(str, error.windows[:8]))
        return [
            Finding(
                kind="not_finite",
                severity="fault",
                sentence=f"Update {error.step}: {what} is not finite.",
                number=error.step,
                cure=f"Look for extreme values in windows {windows}; else lower training.optimizer.lr or "
                "lengthen training.schedule.warmup.",
            )
        ]
    return []


def gradient_shares(
    training: BuiltTraining, batches: Sequence[Batch], when: str, *, at_end: bool
) -> GradientShares:
    """Shares at the present weights of the model, with the lambdas of the training's start or of its end.

    The terms are those of the phase (the first; the last in which the action counts), and what the backward
    forbids a term is not in them.
    """
    trainer, names = training.trainer, training.objective.names
    strategy, parameters = trainer.strategy, trainer.parameters
    phases = [phase for phase in strategy.phases if PRIMARY in phase.active_terms(names)]
    phase = phases[-1] if at_end and phases else strategy.phases[0]
    progress = 1.0 if at_end else strategy.at(0).progress
    parts: dict[str, list[int]] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        parameter.requires_grad_(part_of(name) not in phase.frozen)
        if part_of(name) != OBJECTIVE:
            parts.setdefault(part_of(name), []).append(number)
    lambdas: dict[str, float] = {}
    gradients: Gradients = {}
    with own_randomness(training.config.seed):
        for batch in batches:
            features = training.model(batch.observation)
            terms = training.objective(features, batch, training.model, progress, phase.active_terms(names))
            own = trainer.backward.masked(term_gradients(terms.values, list(parameters.values())))
            gradients = added(gradients, own)
            lambdas = {name: float(value) for name, value in terms.lambdas.items()}
    mean = {name: value / len(batches) for name, value in lambdas.items()}
    whole = weighted_sum(gradients, mean)
    moved = preconditioned(trainer.optimizer, list(parameters.values()), gradients, whole)
    measures = gradient_measures(gradients, mean, parts) | update_shares(moved, mean, parts)
    when = f"{when}, lambdas as at the training's {'end' if at_end else 'start'}"
    return GradientShares(when=when, measures=measures, lambdas=lambdas)


def judge_shares(config: RunConfig, start: GradientShares, end: GradientShares) -> list[Finding]:
    """Terms other than the action's that make most of the update of a part that the action moves too.

    A weight that falls is a curriculum, so what dominates only at the start is a hint: the weight of the
    demo's state term, which begins with most of the vision encoder's update, was chosen by rollouts. What a
    term keeps to the end competes with the action to the end.
    """
    settings = config.model_dump(mode="json")
    findings = [at(end.when, one) for one in dominating_terms(single_step(end.measures), settings)]
    named = {finding.term for finding in findings}
    for finding in dominating_terms(single_step(start.measures), settings):
        if finding.term not in named:
            schedule = config.objective.schedules()[finding.term]
            kind = "share" if finding.term in config.objective.shares() else "weight"
            first, last = f"{schedule.at(0.0):g}", f"{schedule.at(1.0):g}"
            how = f"stays {first}" if first == last else f"goes from {first} to {last}"
            cure = f"Later it does not. Its {kind} {how}: nothing to do if it is meant to lead at first."
            findings.append(at(start.when, replace(finding, severity="hint", cure=cure)))
    return findings


def at(when: str, finding: Finding) -> Finding:
    """The same finding, its sentence beginning with the moment that it is about."""
    return replace(finding, sentence=f"{capitalised(when)}: {finding.sentence}")
