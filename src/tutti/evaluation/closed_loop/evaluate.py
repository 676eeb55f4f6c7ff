"""Closed-loop evaluation: rollouts of a policy and its controls from fixed starts, parallel and resumable.

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

from tutti.distributed.cores import usable_cores
from tutti.evaluation.closed_loop.controls import Starts, plan, rollout_blocks, verdict
from tutti.evaluation.closed_loop.results import EvaluationProtocol, EvaluationResult, score
from tutti.evaluation.closed_loop.rollouts import (
    Condition,
    PolicyFactory,
    Rollout,
    RolloutBlock,
    RolloutSpec,
    RolloutWorker,
)
from tutti.evaluation.closed_loop.starts import TrainingStarts, check_seeds
from tutti.evaluation.config import EvaluationConfig
from tutti.suites.environment import EnvironmentFactory
from tutti.suites.workers import Workers
from tutti.types import UserError

Progress = Callable[[int, int], None]
"""Called with (finished rollouts, all rollouts), first with those of an earlier, interrupted run."""

MAX_WORKERS = 8


def evaluate(
    policy: PolicyFactory,
    config: EvaluationConfig,
    environments: EnvironmentFactory,
    *,
    folder: Path | None = None,
    trained: TrainingStarts | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Plays every planned rollout that `folder` does not hold yet, and scores all of them.

    `folder` receives one JSON record per rollout, `<condition>/<task>/<seed>.json`, as it ends; a record of
    another policy or protocol is replaced. None keeps everything in memory. `trained` are the starts of the
    demonstrations; None skips that check.

    Raises UserError: the evaluation's seeds overlap the demonstrations'; `max_decisions` exceeds what the
    simulator allows; the policy gave non-finite actions; the disk is full.
    Raises WorkerError: a worker failed or died; the rollouts it had finished are kept.
    """
    trained = trained or TrainingStarts()
    check_seeds(config, trained)
    if config.max_decisions > environments.longest:
        raise UserError(
            f"evaluation.max_decisions is {config.max_decisions}, but the simulator ends an episode after "
            f"{environments.longest} control steps. Set it to at most {environments.longest}."
        )
    began = time.perf_counter()
    planned = plan(config, environments)
    spec = RolloutSpec(
        policy=policy,
        environments=environments,
        actions_per_query=config.actions_per_query,
        max_decisions=config.max_decisions,
        folder=folder,
    )
    rollouts, missing = _split(spec, rollout_blocks(planned))
    resumed, total = len(rollouts), len(rollouts) + sum(len(block.starts) for block in missing)
    with _one_torch_thread():
        _report(progress, resumed, total)
        for played in _play(spec, missing, _workers(config, missing)):
            rollouts += played
            _report(progress, len(rollouts), total)
    return _result(
        *(config, environments, trained, planned, rollouts),
        resumed=resumed,
        seconds=time.perf_counter() - began,
    )


def _split(spec: RolloutSpec, planned: Sequence[RolloutBlock]) -> tuple[list[Rollout], list[RolloutBlock]]:
    """Rollouts that an earlier run has saved, and the blocks that remain to be played."""
    saved: list[Rollout] = []
    missing: list[RolloutBlock] = []
    for block in planned:
        left: list[tuple[int, str]] = []
        for seed, instruction in block.starts:
            record = spec.find(block.task, block.condition, seed, instruction)
            if record is None:
                left.append((seed, instruction))
            else:
                saved.append(record)
        if left:
            missing.append(RolloutBlock(task=block.task, condition=block.condition, starts=tuple(left)))
    return saved, missing


def _workers(config: EvaluationConfig, missing: Sequence[RolloutBlock]) -> int:
    """ "auto" is one worker per core that this process may use, at most 8 (each takes about 0.7 GB)."""
    wanted = min(usable_cores(), MAX_WORKERS) if config.workers == "auto" else config.workers
    return max(1, min(wanted, len(missing)))


def _play(spec: RolloutSpec, missing: Sequence[RolloutBlock], count: int) -> Iterator[list[Rollout]]:
    """The rollouts of each block as it ends. One worker plays in this process, several are spawned."""
    if count == 1:
        worker = RolloutWorker(spec)
        try:
            for block in missing:
                yield worker(block)
        finally:
            worker.close()
        return
    left = list(missing)
    last: dict[int, str] = {}

    def next_block(worker: int) -> RolloutBlock | None:
        if not left:
            return None
        block = _next(left, worker, last)
        last[worker] = block.task
        return block

    with _worker_variables():
        workers = Workers(RolloutWorker(spec), count)
    with workers:
        for _, played in workers.run(next_block):
            yield played


def _next(left: list[RolloutBlock], worker: int, last: dict[int, str]) -> RolloutBlock:
    """Takes a block off the list: of the worker's last task, else of a task that nobody plays, else any."""
    taken = set(last.values())
    same = (i for i, block in enumerate(left) if block.task == last.get(worker))
    free = (i for i, block in enumerate(left) if block.task not in taken)
    return left.pop(next(same, next(free, 0)))


@contextmanager
def _worker_variables() -> Iterator[None]:
    """Environment variables of starting workers: their libraries read them at import."""
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
def _one_torch_thread() -> Iterator[None]:
    """One torch thread in this process as in the workers: the same bits for any number of workers."""
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
    verdicts = (verdict(control, ordered) for control in ("wrong_instruction", "no_image"))
    return EvaluationResult(
        scores={c: score(c, [r for r in ordered if r.condition == c]) for c in planned},
        verdicts=tuple(one for one in verdicts if one is not None),
        protocol=EvaluationProtocol(
            suite=config.suite,
            split=config.split,
            seed_first=config.seeds[0],
            seed_last=config.seeds[-1],
            chunk=max(chunks),
            executed=min(config.actions_per_query, max(chunks)),
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
