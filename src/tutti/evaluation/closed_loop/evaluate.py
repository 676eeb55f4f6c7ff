"""Closed-loop evaluation: rollouts of a policy and its controls from fixed starts, parallel and resumable.

Same policy, same config, same machine: same k/n and same actions to the last bit, for any number of workers
and any interruption. With `batch_size` above 1 a text of more tokens than the spec's `text_length` lengthens
those beside it: their last bits then depend on what plays with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

from tutti.evaluation.closed_loop.batched import BatchedRollouts
from tutti.evaluation.closed_loop.controls import plan, rollout_blocks
from tutti.evaluation.closed_loop.results import EvaluationProtocol, EvaluationResult
from tutti.evaluation.closed_loop.rollouts import (
    PlannedRollout,
    PolicyFactory,
    RolloutSpec,
    RolloutWorker,
    count_of,
    in_parallel,
)
from tutti.evaluation.closed_loop.starts import TrainingStarts, check_seeds
from tutti.evaluation.config import EvaluationConfig
from tutti.suites.environment import Suite


def evaluate(
    policy: PolicyFactory,
    config: EvaluationConfig,
    environments: Suite,
    *,
    folder: Path | None = None,
    trained: TrainingStarts | None = None,
    judged: str = "",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> EvaluationResult:
    """Plays every planned rollout that `folder` does not hold yet, and scores all of them.

    `folder` receives one JSON record per rollout, `<condition>/<task>/<seed>.json`, as it ends; a record of
    another policy or protocol is replaced. None keeps everything in memory. `trained` are the starts of the
    demonstrations; None skips that check. `judged` names the policy in the protocol. `progress`
    is called with (finished rollouts, all rollouts), first with those that lay there.

    Raises UserError: the evaluation's seeds overlap the demonstrations'; `max_decisions` exceeds what the
    simulator allows; the policy gave non-finite actions; the disk is full.
    Raises WorkerError: a worker failed or died; the rollouts it had finished are kept.
    """
    trained = trained or TrainingStarts()
    check_seeds(config, trained)
    began = time.perf_counter()
    planned = plan(config, environments)
    spec = RolloutSpec(
        policy=policy,
        environments=environments,
        actions_per_query=config.actions_per_query,
        max_decisions=config.limit(environments),
        folder=folder,
        chunks=config.chunks,
        batch_size=config.batch_size,
    )
    rollouts = {one: saved for one in planned if (saved := spec.find(one)) is not None}
    missing, resumed = [one for one in planned if one not in rollouts], len(rollouts)
    progress(resumed, len(planned))
    acts = {one for one in missing if config.batch_size > 1 and one.condition not in ("noop", "expert")}
    batched = [one for one in missing if one in acts]
    alone = rollout_blocks([one for one in missing if one not in acts])
    with one_torch_thread(), closing(RolloutWorker(spec)) as worker:
        if batched:
            count = count_of(config.workers)  # one simulates in this process
            many = BatchedRollouts(spec, config.batch_size, count if count > 1 else 0, partial(_next, {}))
            for one, rollout in many.play(rollout_blocks(batched, size=1)):
                rollouts[one] = rollout
                progress(len(rollouts), len(planned))
        for played in in_parallel(worker, alone, config.workers, partial(_next, {})):
            rollouts |= played
            progress(len(rollouts), len(planned))
    ordered = [rollouts[one] for one in planned]
    own = [rollout for rollout in ordered if rollout.condition == "policy"]
    chunk = max(rollout.chunk for rollout in own)
    protocol = EvaluationProtocol(
        policy=judged,
        suite=environments.name,
        split=config.split,
        seed_first=config.seeds[0],
        seed_last=config.seeds[-1],
        chunk=chunk,
        executed=min(config.actions_per_query, chunk),
        chunks=str(config.chunks),
        max_decisions=config.limit(environments),
        distinct_starts=len({(rollout.task, rollout.start) for rollout in own}),
        environment=environments.fingerprint,
        trained_seeds=tuple(f"{one[0]} to {one[-1]}" for one in trained.seeds),
        starts_not_known=trained.unknown,
        departures=config.departures(environments),
    )
    seconds, tiers = time.perf_counter() - began, environments.tiers
    return EvaluationResult.of(ordered, protocol, resumed=resumed, seconds=seconds, tiers=tiers)


def _next(last: dict[int, str], left: list[list[PlannedRollout]], worker: int) -> list[PlannedRollout]:
    """Takes a block off the list: of the worker's last task, else of a task that nobody plays, else any."""
    taken, tasks = set(last.values()), [block[0].task for block in left]
    same = (place for place, task in enumerate(tasks) if task == last.get(worker))
    free = (place for place, task in enumerate(tasks) if task not in taken)
    block = left.pop(next(same, next(free, 0)))
    last[worker] = block[0].task
    return block


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One torch thread inside the block, as in spawned workers: the same bits for any number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
