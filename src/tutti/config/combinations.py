"""Checks across sections of a config: combinations that make no sense are refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from tutti.objectives.balancing.gradient_share import PRIMARY, GradientShareBalancingConfig
from tutti.objectives.balancing.learned import FamoBalancingConfig
from tutti.objectives.balancing.softmax import DwaBalancingConfig
from tutti.objectives.config import BalancingConfig, TermConfig
from tutti.objectives.terms.recoverable_language import RecoverableLanguageConfig
from tutti.objectives.weight_schedule import Weight, schedule_of
from tutti.training.backward.aggregators import DECIDES_ALONE
from tutti.training.backward.config import BackwardConfig
from tutti.training.backward.interface import OneBackwardConfig
from tutti.training.backward.k_gradients import KGradientsConfig
from tutti.training.config import TrainingConfig
from tutti.training.optim.learning_rates import unknown_parts
from tutti.training.strategy import PARTS, Strategy, StrategyConfig

BY_LOSS = ("uncertainty", "dwa", "rlw", "famo", "gradient_share")
"""Balancings that set the ratios of the lambdas, which some aggregators undo."""


def check_combination(
    balancing: BalancingConfig,
    backward: BackwardConfig,
    terms: Mapping[str, TermConfig],
    strategy: StrategyConfig,
    training: TrainingConfig,
) -> None:
    """`terms` are those of the objective, by name.

    Raises: ValueError naming both keys, the reason and the cure.
    """
    weights = {name: term.weight for name, term in terms.items()}
    _check_signs(balancing, terms)
    if isinstance(balancing, GradientShareBalancingConfig):
        _check_calibration(balancing, strategy, training)
    if isinstance(balancing, DwaBalancingConfig) and 2 * balancing.every >= training.steps:
        raise ValueError(
            f"balancing.kind dwa compares two stretches of balancing.every {balancing.every} updates, but "
            f"training.steps is {training.steps}: no lambda would ever change. Lower balancing.every."
        )
    if isinstance(backward, KGradientsConfig):
        _check_aggregator(balancing.kind, backward.aggregator.kind)
    _check_moves(backward, weights)
    if training.parallel.kind == "fsdp":
        _check_sharded(balancing, backward, training)
    for key, parts in training.optimizer.parts.items():
        if message := unknown_parts(f"training.optimizer.{key}", parts, (*PARTS, "objective")):
            raise ValueError(message)


def _check_signs(balancing: BalancingConfig, terms: Mapping[str, TermConfig]) -> None:
    """Refuses a negative term where the balancing takes its logarithm: the run would stop in the middle."""
    for name, term in terms.items():
        counts = not schedule_of(term.weight).is_zero
        if not isinstance(term, RecoverableLanguageConfig) or not counts:
            continue
        start = f"balancing.kind {balancing.kind} with objective.{name}.kind {term.kind}: that term may be"
        if balancing.kind == "uncertainty":
            raise ValueError(
                f"{start} negative, of which there is no log-variance. Use another balancing, or set "
                f"objective.{name}.weight to 0."
            )
        if isinstance(balancing, FamoBalancingConfig) and balancing.bounds.get(name, 0.0) >= 0:
            raise ValueError(
                f"{start} negative, and FAMO takes the logarithm of what is above its bound. Set "
                f"balancing.bounds.{name} well below the -log of the number of instructions, such as -10."
            )


def _check_sharded(balancing: BalancingConfig, backward: BackwardConfig, training: TrainingConfig) -> None:
    """Refuses what needs the gradient of a single term: FSDP averages gradients as they reach `.grad`."""
    wants = {
        f"backward.kind {backward.kind}": not isinstance(backward, OneBackwardConfig),
        f"balancing.kind {balancing.kind}": isinstance(balancing, GradientShareBalancingConfig),
    }
    for key in (key for key, wanted in wants.items() if wanted):
        raise ValueError(
            f"training.parallel.kind fsdp with {key}: that needs the gradient of each term by itself, but "
            "under FSDP gradients are averaged and given back as they are made, in one backward pass of the "
            "total. Use training.parallel.kind=ddp, or backward.kind=one and balancing.kind=fixed."
        )
    if training.compile != "off":
        raise ValueError(
            f"training.parallel.kind fsdp with training.compile {training.compile}: the blocks are compiled "
            "as one graph, which the gathering of their weights would break. Use training.compile=off, or "
            "training.parallel.kind=ddp."
        )


def _check_calibration(
    balancing: GradientShareBalancingConfig, strategy: StrategyConfig, training: TrainingConfig
) -> None:
    """Requires that the norms are measured within the run, after its warm-up, while action counts."""
    last = balancing.start + balancing.steps - 1
    if last >= training.steps:
        raise ValueError(
            f"balancing.start {balancing.start} and balancing.steps {balancing.steps}: the gradients would "
            f"be measured until update {last + 1}, but training.steps is {training.steps}. Lower one of the "
            "two."
        )
    if balancing.start < training.schedule.warmup:
        raise ValueError(
            f"balancing.start is {balancing.start}, but the learning rate warms up for "
            f"{training.schedule.warmup} updates (training.schedule.warmup), and gradients measured before "
            "that mislead. Raise balancing.start."
        )
    phases = Strategy(strategy.phases(), steps=training.steps)
    for step in range(balancing.start, last + 1):
        phase = phases.at(step).phase
        if PRIMARY not in phase.active_terms([PRIMARY]):
            raise ValueError(
                f"balancing.kind gradient_share measures against '{PRIMARY}' from update {balancing.start} "
                f"to {last}, but in phase '{phase.name}' of the strategy that term does not count. Move "
                "balancing.start, or use balancing.kind=fixed."
            )


def _check_aggregator(balancing: str, aggregator: str) -> None:
    names = f"balancing.kind {balancing} with backward.aggregator.kind {aggregator}"
    if balancing == "famo" and aggregator not in ("sum", "mean"):
        raise ValueError(
            f"{names}: FAMO learns from what its own weights have done to the losses, but here the "
            "aggregator decides the direction. Use one of them: balancing.kind=fixed, or backward.kind=one."
        )
    if balancing in BY_LOSS and aggregator in DECIDES_ALONE:
        raise ValueError(
            f"{names}: the aggregator normalises the gradients, so what the balancing does to their lengths "
            "is undone. Use balancing.kind=fixed, or another aggregator."
        )
    if balancing == "rlw" and aggregator == "random":
        raise ValueError(f"{names}: the weights would be drawn twice. Use one of the two.")


def _check_moves(backward: BackwardConfig, weights: Mapping[str, Weight]) -> None:
    unknown = [term for term in backward.may_train if term not in weights]
    if unknown:
        raise ValueError(
            f"backward.may_train names the term {', '.join(unknown)}; the objective has {', '.join(weights)}."
        )
    free = [term for term, weight in weights.items() if not schedule_of(weight).is_zero]
    if backward.kind == "knowledge_insulation" and free == [PRIMARY]:
        raise ValueError(
            "backward.kind is knowledge_insulation, but there is no term besides action: the encoders would "
            "learn from nothing. Add a term to the objective, or use backward.kind=one."
        )
