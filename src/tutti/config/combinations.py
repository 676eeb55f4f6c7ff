"""Checks across sections of a config: combinations that make no sense are refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tutti.evaluation.config import NO_SUITE, EvaluationConfig
from tutti.models.config import ModelConfig
from tutti.objectives.balancing.learned import FamoBalancingConfig
from tutti.objectives.balancing.shares import SharesBalancingConfig
from tutti.objectives.balancing.softmax import DwaBalancingConfig
from tutti.objectives.config import BalancingConfig, TermConfig, no_shares
from tutti.objectives.objective import PRIMARY
from tutti.objectives.terms.recoverable_language import RecoverableLanguageConfig
from tutti.training.backward.aggregators import DECIDES_ALONE
from tutti.training.backward.config import BackwardConfig
from tutti.training.backward.interface import OneBackwardConfig
from tutti.training.backward.k_gradients import KGradientsConfig
from tutti.training.config import TrainingConfig
from tutti.training.optim.learning_rates import unknown_parts
from tutti.training.strategy import PARTS, StrategyConfig

BY_LOSS = ("uncertainty", "dwa", "rlw", "famo")
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
    shares = [name for name, term in terms.items() if term.share is not None]
    _check_signs(balancing, terms)
    if shares and sets_lambdas(balancing, backward):
        alone = isinstance(balancing, SharesBalancingConfig)
        kind = backward.aggregator.kind if isinstance(backward, KGradientsConfig) else ""
        what = f"backward.aggregator.kind {kind}" if alone else f"balancing.kind {balancing.kind}"
        raise ValueError(no_shares(shares, what))
    if isinstance(balancing, SharesBalancingConfig):
        _check_calibration(balancing, training)
    if isinstance(balancing, DwaBalancingConfig) and 2 * balancing.every >= training.steps:
        raise ValueError(
            f"balancing.kind dwa compares two stretches of balancing.every {balancing.every} updates, but "
            f"training.steps is {training.steps}: no lambda would ever change. Lower balancing.every."
        )
    if isinstance(backward, KGradientsConfig):
        _check_aggregator(balancing.kind, backward.aggregator.kind)
    _check_moves(backward, terms)
    if training.parallel.kind == "fsdp":
        _check_sharded(_counted(shares, terms, strategy), backward, training)
    for key, parts in training.optimizer.parts.items():
        if message := unknown_parts(f"training.optimizer.{key}", parts, (*PARTS, "objective")):
            raise ValueError(message)


def check_model(model: ModelConfig, terms: Mapping[str, TermConfig], training: TrainingConfig) -> None:
    """Refuses what a pre-trained part cannot do under this objective and training.

    Raises: ValueError naming both keys, the reason and the cure.
    """
    why = ""
    if training.parallel.kind == "fsdp":
        why = (
            "parallel.kind fsdp: a rank that has kept all would not gather the weights that another waits for"
        )
    elif training.compile == "model":
        why = "compile model: the graph looks at nothing that it is shown, so nothing would be kept"
    for name, tower in model.towers().items() if why else ():
        for key in (f"model.{name}.{key}" for key in ("cache", "remember") if getattr(tower, key, 0)):
            raise ValueError(f"{key} with training.{why}. Set {key}=0, or another training.{why.split()[0]}.")
    stops = getattr(terms.get(PRIMARY), "stop_gradient", ())
    if "fused" in stops and getattr(model.action, "writer", "own") == "vlm":
        raise ValueError(
            f"objective.{PRIMARY}.stop_gradient [fused] with model.action.writer vlm: the VLM itself writes "
            "the actions, so their gradient reaches it all the same. Take fused out, or let writer be own."
        )


def check_playing(score: EvaluationConfig, during: EvaluationConfig) -> None:
    """Requires a simulator, and starts that the score does not use.

    Raises: ValueError naming both keys, the reason and the cure.
    """
    if score.suite == NO_SUITE:
        raise ValueError(
            "training.evaluate_every plays in the suite of the evaluation, but evaluation.suite is none. "
            "Name a suite, or set training.evaluate_every to 0."
        )
    shared = range(max(score.seeds[0], during.seeds[0]), min(score.seeds[-1], during.seeds[-1]) + 1)
    if shared:
        raise ValueError(
            f"training.evaluate_first_seed {during.first_seed} with evaluation.first_seed "
            f"{score.first_seed}: both play the seeds {shared[0]} to {shared[-1]}. The checkpoint would be "
            f"chosen by what it is scored with. Set training.evaluate_first_seed to {score.seeds[-1] + 1} or "
            "more."
        )


def _check_signs(balancing: BalancingConfig, terms: Mapping[str, TermConfig]) -> None:
    """Refuses a negative term where the balancing takes its logarithm: the run would stop in the middle."""
    for name, term in terms.items():
        counts = not term.schedule.is_zero
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


def sets_lambdas(balancing: Any, backward: Any) -> bool:
    """True if this balancing or the aggregator of this backward chooses how much each term counts, so that
    no share would be kept. Both are configs, or as they are written."""
    aggregator = _key(backward, "aggregator")
    return (_key(balancing, "kind") or "shares") != "shares" or _key(aggregator, "kind") in DECIDES_ALONE


def _key(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, Mapping) else getattr(section, key, None)


def _counted(
    names: Iterable[str], terms: Mapping[str, TermConfig], strategy: StrategyConfig
) -> tuple[str, ...]:
    """Those of the terms that count in some phase."""
    active = {name for phase in strategy.phases() for name in phase.active_terms(terms)}
    return tuple(name for name in names if name in active and not terms[name].schedule.is_zero)


def _check_sharded(shares: Sequence[str], backward: BackwardConfig, training: TrainingConfig) -> None:
    """Refuses what needs the gradient of a single term: FSDP averages gradients as they reach `.grad`."""
    if shares:
        weights = ", ".join(f"objective.{name}.weight" for name in shares)
        raise ValueError(
            f"training.parallel.kind fsdp with a share for {', '.join(shares)}: lambdas follow from the "
            "gradient of each term by itself, which FSDP does not give. Train some updates with "
            "training.parallel.kind=single (or ddp): the log prints the weights that these shares stand for. "
            f"Give those instead: {weights}."
        )
    wants = {f"backward.kind {backward.kind}": not isinstance(backward, OneBackwardConfig)}
    for key in (key for key, wanted in wants.items() if wanted):
        raise ValueError(
            f"training.parallel.kind fsdp with {key}: that needs the gradient of each term by itself, but "
            "under FSDP gradients are averaged and given back as they are made, in one backward pass of the "
            "total. Use training.parallel.kind=ddp, or backward.kind=one."
        )
    if training.compile != "off":
        raise ValueError(
            f"training.parallel.kind fsdp with training.compile {training.compile}: the blocks are compiled "
            "as one graph, which the gathering of their weights would break. Use training.compile=off, or "
            "training.parallel.kind=ddp."
        )


def _check_calibration(balancing: SharesBalancingConfig, training: TrainingConfig) -> None:
    """Requires that the parts of the update are measured within the run, and after its warm-up."""
    start = balancing.start
    if start == "warmup":
        return
    if start >= training.steps:
        raise ValueError(
            f"balancing.start is {start}, but training.steps is {training.steps}: the parts of the update "
            "would never be measured. Lower it, or let it be warmup."
        )
    if start < training.schedule.warmup:
        raise ValueError(
            f"balancing.start is {start}, but the learning rate warms up for {training.schedule.warmup} "
            "updates (training.schedule.warmup), and what is measured before that misleads. Raise "
            "balancing.start, or let it be warmup."
        )


def _check_aggregator(balancing: str, aggregator: str) -> None:
    names = f"balancing.kind {balancing} with backward.aggregator.kind {aggregator}"
    if balancing == "famo" and aggregator not in ("sum", "mean"):
        raise ValueError(
            f"{names}: FAMO learns from what its own weights have done to the losses, but here the "
            "aggregator decides the direction. Use one of them: balancing.kind=shares, or backward.kind=one."
        )
    if balancing in BY_LOSS and aggregator in DECIDES_ALONE:
        raise ValueError(
            f"{names}: the aggregator normalises the gradients, so what the balancing does to their lengths "
            "is undone. Use balancing.kind=shares, or another aggregator."
        )
    if balancing == "rlw" and aggregator == "random":
        raise ValueError(f"{names}: the weights would be drawn twice. Use one of the two.")


def _check_moves(backward: BackwardConfig, terms: Mapping[str, TermConfig]) -> None:
    unknown = [term for term in backward.may_train if term not in terms]
    if unknown:
        raise ValueError(
            f"backward.may_train names the term {', '.join(unknown)}; the objective has {', '.join(terms)}."
        )
    free = [name for name, term in terms.items() if not term.schedule.is_zero]
    if backward.kind == "knowledge_insulation" and free == [PRIMARY]:
        raise ValueError(
            "backward.kind is knowledge_insulation, but there is no term besides action: the encoders would "
            "learn from nothing. Add a term to the objective, or use backward.kind=one."
        )
