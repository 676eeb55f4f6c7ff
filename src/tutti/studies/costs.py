"""Measures FLOPs and time of a step of each arm, and derives the steps that a budget allows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tutti.config.run_config import RunConfig
from tutti.evaluation.closed_loop.evaluate import one_torch_thread
from tutti.models.describe import flop_counter
from tutti.nested_dicts import content_hash
from tutti.objectives.unified import UnifiedLoss
from tutti.runs.build import TRAIN_SECTIONS, build_training
from tutti.storage.files import write_json
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


def stretches(objective: UnifiedLoss, strategy: Strategy) -> list[Stretch]:
    """The run's steps, grouped by phase, by the terms that are computed, and by whether the balancing needs
    each term's gradient."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for step in range(strategy.steps):
        moment = strategy.at(step)
        computed = tuple(
            name
            for name in moment.phase.counting(objective.names)
            if objective.balancing.is_active(name, moment.progress)
        )
        key = (moment.index, computed, objective.hooks.wants_gradients(step))
        groups.setdefault(key, []).append(step)
    return [Stretch(at=steps[len(steps) // 2], steps=len(steps)) for steps in groups.values()]


class StepMeter:
    """Measures FLOPs and time of an arm's steps, phase by phase, with real updates that no record keeps."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """`folder` keeps the decoded pictures of the data sets that `config` names."""
        quiet = config.training.model_copy(update={"diagnostics": NO_DIAGNOSTICS, "compile": "off"})
        config = config.model_copy(update={"training": quiet})
        self.training = build_training(config, folder, output=folder / "costs")
        self.stretches = stretches(self.training.objective, self.training.trainer.strategy)
        self._initial = {name: value.clone() for name, value in self.training.objective.state_dict().items()}
        self._stream = iter(self.training.data.train)

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.training.trainer.parameters.values())

    @property
    def samples(self) -> int:
        """Windows of a step."""
        return self.training.data.train.batch_size * self.training.config.training.accumulation

    def flops(self, batches: int = BATCHES) -> float:
        """FLOPs of a step, forward, backward and optimiser, mean over the run."""
        return self._mean(lambda stretch: self._count(stretch.at, min(batches, stretch.steps)))

    def milliseconds(self, steps: int = TURN) -> float:
        """Time of a step, mean over the run, from at most `steps` steps of each stretch.

        On a CPU it is that of the one thread, which other work on the machine hardly changes; else wall time.
        """
        return self._mean(lambda stretch: self._time(stretch.at, min(steps, stretch.steps)))

    def close(self) -> None:
        """Stops the loader's thread."""
        self.training.data.train.close()

    def _mean(self, measure: Callable[[Stretch], float]) -> float:
        total = sum(stretch.steps for stretch in self.stretches)
        return sum(stretch.steps * measure(stretch) for stretch in self.stretches) / total

    def _count(self, step: int, batches: int) -> float:
        self._reset()
        with flop_counter() as counter:
            self.training.run_updates([step] * batches)  # the same batches for every stretch and arm
        return counter.get_total_flops() / batches

    def _time(self, step: int, steps: int) -> float:
        self._reset()
        clock = time.thread_time if self.training.trainer.machine.device.type == "cpu" else time.perf_counter
        started = clock()
        self.training.run_updates([step] * steps, self._stream)
        return 1000 * (clock() - started) / steps

    def _reset(self) -> None:
        """Restores the initial state of a balancing that learns: it may not see more steps than a run has."""
        self.training.objective.load_state_dict(self._initial)


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
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def described(config: RunConfig) -> dict[str, Any]:
        """All of a config that a cost depends on; the data by their content."""
        sections = config.sections(*TRAIN_SECTIONS)
        sections["data"]["sources"] = fingerprint
        return sections

    base, timed = described(configs[baseline]), budget.kind == "time"
    keys = {arm: content_hash([base, described(config), timed], 16) for arm, config in configs.items()}
    missing = [arm for arm in configs if kept.get(arm, {}).get("identity") != keys[arm]]
    if missing:
        turns = dict.fromkeys([baseline, *missing])
        for arm, cost in _measure({a: configs[a] for a in turns}, baseline, budget, folder, rounds).items():
            if arm in missing:
                kept[arm] = {"identity": keys[arm], "cost": asdict(cost)}
        write_json(path, kept)
    return {arm: StepCost(**kept[arm]["cost"]) for arm in configs}


def affordable_steps(
    budget: BudgetConfig, steps: int, costs: Mapping[str, StepCost], baseline: str
) -> dict[str, int]:
    """The steps of each arm where the baseline makes `steps`, rounded, at least 1."""
    field = {"samples": "samples", "flops": "flops", "time": "time_ratio"}.get(budget.kind)
    spent = {arm: 1.0 if field is None else getattr(cost, field) for arm, cost in costs.items()}
    return {arm: max(1, round(steps / (own / spent[baseline]))) for arm, own in spent.items()}


def _measure(
    configs: Mapping[str, RunConfig], baseline: str, budget: BudgetConfig, folder: Path, rounds: int
) -> dict[str, StepCost]:
    with one_torch_thread(), ExitStack() as stack:
        meters = {arm: stack.enter_context(closing(StepMeter(c, folder))) for arm, c in configs.items()}
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
