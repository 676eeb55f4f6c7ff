"""Closed-loop evaluation: plays a policy and its controls from fixed starts, in parallel, resumably.

Same policy, same config, same machine: same k/n and same actions to the last bit, for any number of workers
and any interruption.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tutti.evaluation.closed_loop.controls import Starts, plan, units, verdict
from tutti.evaluation.closed_loop.results import EvaluationProtocol, EvaluationResult, score
from tutti.evaluation.closed_loop.rollouts import Condition, Player, PolicyFactory, Rollout, Unit, Worker
from tutti.evaluation.closed_loop.starts import TrainingStarts, check_seeds
from tutti.evaluation.config import EvaluationConfig
from tutti.suites.metaworld.environments import EnvironmentFactory
from tutti.suites.workers import Workers, available_cpus
from tutti.types import UserError

Progress = Callable[[int, int], None]
"""Called with (rollouts done, rollouts in all), first with those found from an earlier, interrupted run."""

MOST_WORKERS = 8


def evaluate(
    policy: PolicyFactory,
    config: EvaluationConfig,
    environments: EnvironmentFactory,
    *,
    folder: Path | None = None,
    trained: TrainingStarts | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Plays every planned rollout that `folder` does not hold yet, and scores them all.

    `folder` receives one JSON record per rollout, `<condition>/<task>/<seed>.json`, as it ends; a record of
    another policy or protocol is replaced. None keeps everything in memory. `trained` are the starts of the
    demonstrations; None, where the caller answers for them.

    Raises UserError: the evaluation's seeds overlap the demonstrations'; `max_decisions` exceeds what the
    simulator allows; the policy gave non-finite actions; the disk is full.
    Raises WorkerError: a worker failed or died; the rollouts it had finished are kept.
    """
    trained = trained or TrainingStarts()
    check_seeds(config, trained)
    if config.max_decisions > environments.longest:
        raise UserError(
            f"evaluation.max_decisions is {config.max_decisions}, but the simulator ends an episode after "
            f"{environments.longest} decisions. Set it to at most {environments.longest}."
        )
    began = time.perf_counter()
    planned = plan(config, environments)
    player = Player(
        policy=policy,
        environments=environments,
        execute=config.execute,
        max_decisions=config.max_decisions,
        folder=folder,
    )
    found, missing = _split(player, units(planned))
    total = len(found) + sum(len(unit.starts) for unit in missing)
    done = list(found)
    _report(progress, len(done), total)
    with _torch_threads():
        for block in _play(player, missing, _workers(config, missing)):
            done.extend(block)
            _report(progress, len(done), total)
    return _result(
        *(config, environments, trained, planned, done),
        resumed=len(found),
        seconds=time.perf_counter() - began,
    )


def _split(player: Player, planned: Sequence[Unit]) -> tuple[list[Rollout], list[Unit]]:
    """Rollouts that an earlier run has saved, and the units that remain."""
    found: list[Rollout] = []
    missing: list[Unit] = []
    for unit in planned:
        left: list[tuple[int, str]] = []
        for seed, instruction in unit.starts:
            record = player.find(unit.task, unit.condition, seed, instruction)
            if record is None:
                left.append((seed, instruction))
            else:
                found.append(record)
        if left:
            missing.append(Unit(task=unit.task, condition=unit.condition, starts=tuple(left)))
    return found, missing


def _workers(config: EvaluationConfig, missing: Sequence[Unit]) -> int:
    """ "auto" is one worker per core that this process may use, at most 8 (each takes about 0.7 GB)."""
    wanted = min(available_cpus(), MOST_WORKERS) if config.workers == "auto" else config.workers
    return max(1, min(wanted, len(missing)))


def _play(player: Player, missing: Sequence[Unit], count: int) -> Iterator[list[Rollout]]:
    """The rollouts of each unit, as units end. One worker plays in this process, several are spawned."""
    if count == 1:
        worker = Worker(player)
        try:
            for unit in missing:
                yield worker(unit)
        finally:
            worker.close()
        return
    left = list(missing)
    last: dict[int, str] = {}
    with _worker_variables():
        workers = Workers(Worker(player), count)
    with workers:
        while left or workers.busy:
            for worker in workers.idle:
                if left:
                    unit = _next(left, worker, last)
                    last[worker] = unit.task
                    workers.start(worker, unit)
            for _, block in workers.finished():
                yield block


def _next(left: list[Unit], worker: int, last: dict[int, str]) -> Unit:
    """Takes a unit off the list: of the task that the worker has at hand, else of one that nobody plays,
    else any.
    """
    taken = set(last.values())
    own = (i for i, unit in enumerate(left) if unit.task == last.get(worker))
    free = (i for i, unit in enumerate(left) if unit.task not in taken)
    return left.pop(next(own, next(free, 0)))


@contextmanager
def _worker_variables() -> Iterator[None]:
    """Environment of the workers while they start: their libraries read it when they are imported."""
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _torch_threads() -> Iterator[None]:
    """One torch thread in this process as in the workers, so that one worker gives the same bits as two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _result(
    config: EvaluationConfig,
    environments: EnvironmentFactory,
    trained: TrainingStarts,
    planned: dict[Condition, Starts],
    rollouts: list[Rollout],
    *,
    resumed: int,
    seconds: float,
) -> EvaluationResult:
    """Puts the rollouts in the plan's order and scores each condition."""
    by_key = {(r.condition, r.task, r.seed): r for r in rollouts}
    ordered = tuple(
        by_key[condition, task, seed]
        for condition, starts in planned.items()
        for task, pairs in starts.items()
        for seed, _ in pairs
    )
    chunks = {r.chunk for r in ordered if r.condition == "policy"}
    verdicts = [verdict(control, ordered) for control in ("wrong_instruction", "no_image")]
    return EvaluationResult(
        scores={c: score(c, [r for r in ordered if r.condition == c]) for c in planned},
        verdicts=tuple(found for found in verdicts if found is not None),
        protocol=EvaluationProtocol(
            suite=config.suite,
            split=config.split,
            seed_first=config.seeds[0],
            seed_last=config.seeds[-1],
            chunk=max(chunks),
            executed=min(config.execute, max(chunks)),
            max_decisions=config.max_decisions,
            distinct_starts=len({(r.task, r.start) for r in ordered if r.condition == "policy"}),
            environment=environments.fingerprint,
            trained_seeds=tuple(f"{one[0]} to {one[-1]}" for one in trained.seeds),
            starts_not_known=trained.unknown,
        ),
        rollouts=ordered,
        resumed=resumed,
        seconds=seconds,
    )
