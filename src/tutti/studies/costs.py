"""Measures FLOPs and time of a step of each arm, and derives the steps that a budget allows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter

from tutti.config.run_config import RunConfig
from tutti.evaluation.closed_loop.evaluate import one_torch_thread
from tutti.key_effects import with_effect
from tutti.models.describe import flop_counter
from tutti.nested_dicts import content_hash
from tutti.objectives.unified import UnifiedLoss
from tutti.runs.build import TRAIN_SECTIONS, BuiltTraining, trial_training
from tutti.storage.files import write_json
from tutti.storage.reading import read_valid
from tutti.studies.cells import by_content
from tutti.studies.config import BudgetConfig
from tutti.training.diagnostics.observer import DiagnosticsConfig
from tutti.training.strategy import Strategy

ROUNDS, TURN = 20, 3
"""Rounds of timing, and the steps of each stretch that every arm makes in a round."""

BATCHES = 4
"""Batches over which the FLOPs of a step are averaged: the first of the run."""

NO_DIAGNOSTICS = DiagnosticsConfig.model_validate({"every": 0, "spikes": {"z_threshold": "off"}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """`steps` steps of a run with the same computation; step `at` is one of them."""

    at: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Means over all steps of a run. `flops` are of matrix products and convolutions, two a multiply-add.

    `parameters` counts everything that training moves, the terms' heads included. `time_ratio` is the time
    of a step over that of the baseline's, `milliseconds` its own; both None where time is not the budget.
    """

    flops: float
    samples: int
    parameters: int
    time_ratio: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCost:
    """A cost that was measured, with a hash of all that it depends on."""

    identity: str
    cost: StepCost


KNOWN = TypeAdapter(dict[str, KnownCost])


def stretches(objective: UnifiedLoss, strategy: Strategy) -> list[Stretch]:
    """The run's steps, grouped by phase, by the terms that are computed, and by whether the balancing needs
    each term's gradient."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for step in range(strategy.steps):
        moment = strategy.at(step)
        computed = tuple(
            name
            for name in moment.phase.active_terms(objective.names)
            if objective.balancing.is_active(name, moment.progress)
        )
        key = (moment.index, computed, objective.hooks.window(step) is not None)
        groups.setdefault(key, []).append(step)
    return [Stretch(at=steps[len(steps) // 2], steps=len(steps)) for steps in groups.values()]


class StepMeter:
    """Measures FLOPs and time of an arm's steps, phase by phase, with real updates that no record keeps."""

    def __init__(self, training: BuiltTraining) -> None:
        self.training = training
        self.stretches = stretches(training.objective, training.trainer.strategy)
        self.parameters = sum(parameter.numel() for parameter in training.trainer.parameters.values())
        self.samples = training.data.train.batch_size * training.config.training.accumulation
        if training.objective.hooks.unmeasured(0):
            training.run_updates([0])  # lambdas are measured once, which is no part of a step
        self._initial = {name: value.clone() for name, value in training.objective.state_dict().items()}
        self._stream = iter(training.data.train)

    def flops(self, batches: int = BATCHES) -> float:
        """FLOPs of a step, forward, backward and optimiser, mean over the run."""

        def count(step: int, repeats: int) -> float:
            with flop_counter() as counter:
                self.training.run_updates([step] * repeats)  # the same batches for every stretch and arm
            return counter.get_total_flops() / repeats

        return self._mean(count, batches)

    def milliseconds(self, steps: int = TURN) -> float:
        """Time of a step, mean over the run, from at most `steps` steps of each stretch.

        On a CPU it is that of the one thread, which other work on the machine hardly changes; else wall time.
        """
        on_cpu = self.training.trainer.machine.device.type == "cpu"
        clock = time.thread_time if on_cpu else time.perf_counter

        def measure(step: int, repeats: int) -> float:
            started = clock()
            self.training.run_updates([step] * repeats, self._stream)
            return 1000 * (clock() - started) / repeats

        return self._mean(measure, steps)

    def _mean(self, measure: Callable[[int, int], float], most: int) -> float:
        """The mean over all steps of the run, from at most `most` steps of each stretch."""
        total = 0.0
        for stretch in self.stretches:
            # A balancing that learns may not see more steps than a run has.
            self.training.objective.load_state_dict(self._initial)
            total += stretch.steps * measure(stretch.at, min(most, stretch.steps))
        return total / sum(stretch.steps for stretch in self.stretches)


@contextmanager
def step_meter(config: RunConfig, folder: Path) -> Iterator[StepMeter]:
    """Of a training that writes nothing; `folder` keeps the decoded pictures of the config's data sets."""
    quiet = config.training.model_copy(update={"diagnostics": NO_DIAGNOSTICS, "compile": "off"})
    with trial_training(config.model_copy(update={"training": quiet}), folder) as training:
        yield StepMeter(training)


def measure_costs(
    configs: Mapping[str, RunConfig],
    baseline: str,
    budget: BudgetConfig,
    *,
    fingerprint: str,
    folder: Path,
    rounds: int = ROUNDS,
) -> dict[str, StepCost]:
    """The cost of each arm's step, measured once and saved in `folder`/costs.json.

    Earlier measurements are kept, so that a new arm does not change the steps of the others.
    Times are taken on one thread with the arms in turns (A, B, C, A, B, C, ...), after one uncounted turn,
    and compared within a round: a drift of the machine hits all alike. The ratio is the rounds' median.
    """
    path = folder / "costs.json"
    cure = "Delete it: costs are measured again."
    kept = read_valid(path, KNOWN.validate_python, cure) if os.path.lexists(path) else {}

    def described(config: RunConfig) -> dict[str, Any]:
        """All of a config that a cost depends on; the data by their content."""
        return by_content(with_effect(config.sections(*TRAIN_SECTIONS)), config, fingerprint)

    base, timed = described(configs[baseline]), budget.kind == "time"
    keys = {arm: content_hash([base, described(config), timed], 16) for arm, config in configs.items()}
    missing = [arm for arm in configs if arm not in kept or kept[arm].identity != keys[arm]]
    if missing:
        turns = dict.fromkeys([baseline, *missing])
        measured = _measure({a: configs[a] for a in turns}, baseline, budget, folder, rounds)
        kept |= {arm: KnownCost(identity=keys[arm], cost=measured[arm]) for arm in missing}
        write_json(path, {arm: asdict(known) for arm, known in kept.items()})
    return {arm: kept[arm].cost for arm in configs}


def affordable_steps(
    budget: BudgetConfig, steps: int, costs: Mapping[str, StepCost], baseline: str
) -> dict[str, int]:
    """The steps of each arm where the baseline makes `steps`, rounded, at least 1; or those it was given."""
    fields = {"samples": "samples", "flops": "flops", "time": "time_ratio"}

    def affordable(arm: str) -> int:
        kind = budget.arms.get(arm, budget.kind)
        if isinstance(kind, int):
            return kind
        own, base = (getattr(costs[one], fields[kind]) if kind in fields else 1.0 for one in (arm, baseline))
        return max(1, round(steps / (own / base)))

    return {arm: affordable(arm) for arm in costs}


def _measure(
    configs: Mapping[str, RunConfig], baseline: str, budget: BudgetConfig, folder: Path, rounds: int
) -> dict[str, StepCost]:
    with one_torch_thread(), ExitStack() as stack:
        meters = {arm: stack.enter_context(step_meter(c, folder)) for arm, c in configs.items()}
        flops = {arm: meter.flops() for arm, meter in meters.items()}
        times: dict[str, list[float]] = {}
        if budget.kind == "time":
            times = in_turns({arm: meter.milliseconds for arm, meter in meters.items()}, rounds)
        return {
            arm: StepCost(
                flops=flops[arm],
                samples=meter.samples,
                parameters=meter.parameters,
                time_ratio=ratio_of(times[arm], times[baseline]) if times else None,
                milliseconds=median(times[arm]) if times else None,
            )
            for arm, meter in meters.items()
        }


def in_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """`rounds` measurements of each in turns, after an uncounted one of each."""
    for timer in timers.values():
        timer()
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return times


def ratio_of(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of a time over the base's in the same round."""
    return median(own / under for own, under in zip(times, base, strict=True))
