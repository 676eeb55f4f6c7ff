"""Many episodes through one batched call of the policy: this process predicts, others step the simulator.

Each lane plays one rollout after the other. All lanes of a group wait for one forward pass over all of them;
with several processes there are two groups, so that one is simulated while the other is predicted. A pass
always has as many rows, idle lanes' among them. A picture is drawn where the policy looks, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, cast, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from tutti.chunks import Chunk, Continuation
from tutti.evaluation.closed_loop.rollouts import (
    PlannedRollout,
    Remembering,
    Rollout,
    RolloutPolicy,
    RolloutSpec,
    require_finite,
    start_of,
)
from tutti.storage.files import write_atomically
from tutti.suites.environment import Environment, Suite
from tutti.suites.workers import run_jobs
from tutti.types import History, UserError

Blocks = list[list[PlannedRollout]]
Take = Callable[[Blocks, int], list[PlannedRollout]]
Pictures = dict[str, UInt8[np.ndarray, "h w 3"]]


@runtime_checkable
class BatchedPolicy(RolloutPolicy, Protocol):
    """A policy that predicts for several episodes at once; for each its chunk, or why it has none."""

    def predict_many(
        self,
        observations: Sequence[tuple[Any, Any, Any]],
        histories: Sequence[History] = (),
        use_images: bool | Sequence[bool] = True,
    ) -> Sequence[Float32[np.ndarray, "t a"] | UserError]: ...
    def for_another_robot(self) -> Self: ...


class Moves(NamedTuple):
    """What a simulation is to do: begin a rollout, or execute actions, and show what the policy then sees."""

    lane: int
    begin: PlannedRollout | None
    actions: Sequence[Float32[np.ndarray, " a"]]
    looks: bool
    last: bool


class Seen(NamedTuple):
    """What came of it: how many of the actions were executed (success ends a rollout), and the observation,
    whose pictures are None where nobody looks."""

    lane: int
    executed: int
    success: bool
    pictures: UInt8[np.ndarray, "v h w 3"] | None
    state: Float32[np.ndarray, " s"]
    start: str
    reached: tuple[str, ...] | None
    closest: float | None


class Simulations:
    """The environments of some lanes in one process; each lane keeps that of its task. Picklable until it has
    begun one."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._environments: dict[int, tuple[str, Environment]] = {}
        self._starts: dict[int, str] = {}

    def __call__(self, moves: Sequence[Moves]) -> list[Seen]:
        return [self._move(one) for one in moves]

    def close(self) -> None:
        """Closes every renderer."""
        while self._environments:
            self._environments.popitem()[1][1].close()

    def _move(self, one: Moves) -> Seen:
        if one.begin is not None:
            environment = self._environment(one.lane, one.begin.task)
            environment.reset(one.begin.seed)
            self._starts[one.lane] = start_of(environment)
        environment = self._environments[one.lane][1]
        executed = 0
        for action in one.actions:
            environment.step(action)
            executed += 1
            if environment.success:
                break
        ended = one.last or environment.success
        return Seen(
            lane=one.lane,
            executed=executed,
            success=bool(environment.success),
            pictures=environment.render() if one.looks and not ended else None,
            state=environment.state,
            start=self._starts[one.lane],
            reached=environment.reached,
            closest=environment.closest,
        )

    def _environment(self, lane: int, task: str) -> Environment:
        kept = self._environments.get(lane)
        if kept is None or kept[0] != task:
            if kept is not None:
                kept[1].close()
            self._environments[lane] = (task, self._suite.make(task))
        return self._environments[lane][1]


class _NeedsChunkError(Exception):
    """The runner wants a chunk, of which it has said what it goes on from."""


@dataclass
class Lane:
    """One rollout at a time: what it has executed, and what its runner says of the next steps."""

    number: int
    spec: RolloutSpec
    memory: Remembering | None
    one: PlannedRollout | None = None
    seen: Seen | None = None
    actions: list[np.ndarray] = field(default_factory=list)
    sent: Sequence[np.ndarray] = ()
    past: History | None = None
    _answer: Chunk | None = None

    def begin(self, one: PlannedRollout | None) -> None:
        """Takes the next rollout; None: there is none left."""
        self.one, self.seen, self.actions, self.sent = one, None, [], ()
        self.runner = self.spec.chunks.build(self.spec.actions_per_query)
        self._answer = None
        if self.memory is not None:
            self.memory.reset()

    @property
    def looks(self) -> bool:
        """Whether its policy is shown pictures."""
        return self.one is not None and self.one.condition != "no_image"

    def moves(self) -> Moves:
        """What the simulation is to do next: all steps up to the one that needs a new chunk. A policy that
        remembers looks at each of them."""
        assert self.one is not None
        if self.seen is None:
            return Moves(self.number, self.one, (), self.looks, False)
        ahead: list[np.ndarray] = []
        limit = self.spec.max_decisions - len(self.actions)
        while len(ahead) < (limit if self.memory is None else 1):
            try:
                ahead.append(self.runner.act(self._predict))
            except _NeedsChunkError:
                break
        self.sent = ahead
        return Moves(self.number, None, ahead, self.looks, len(ahead) == limit)

    def take(self, seen: Seen) -> None:
        """What came of the moves. A policy that remembers looks at it."""
        self.actions += self.sent[: seen.executed]
        self.seen, self.sent = seen, ()
        if self.memory is not None and not self.ended:
            pictures, state, _ = self.observation()
            time = len(self.actions) / self.spec.environments.fps
            self.past = self.memory.observe(pictures, state, time, self.looks)

    @property
    def ended(self) -> bool:
        """Whether the rollout is over."""
        assert self.seen is not None
        return self.seen.success or len(self.actions) >= self.spec.max_decisions

    def observation(self) -> tuple[Pictures | None, Float32[np.ndarray, " s"], str]:
        """What the policy is shown."""
        assert self.seen is not None and self.one is not None
        pictures, views = self.seen.pictures, self.spec.environments.views
        named = None if pictures is None else dict(zip(views, pictures, strict=True))
        return named, self.seen.state, self.one.instruction

    def answer(self, chunk: Float32[np.ndarray, "t a"] | UserError) -> None:
        """The chunk of this moment. Raises: UserError if there is none, or it is not finite."""
        if isinstance(chunk, UserError):
            raise chunk
        assert self.one is not None
        require_finite(chunk, self.one, len(self.actions))
        self._answer = chunk

    def _predict(self, continuing: Continuation | None) -> Chunk:
        if self._answer is None:
            raise _NeedsChunkError
        chunk, self._answer = self._answer, None
        return chunk

    def rollout(self) -> Rollout:
        """The record of what has ended."""
        assert self.one is not None and self.seen is not None
        count, seen = len(self.actions), self.seen
        return Rollout(
            **self.one._asdict(),
            success=seen.success,
            decisions=count,
            queries=self.runner.queries,
            chunk=self.runner.horizon,
            start=seen.start,
            identity=self.spec.identity(self.one),
            actions=np.array(self.actions, np.float32).reshape(count, self.spec.environments.action_dim),
            reached=seen.reached,
            closest=seen.closest,
        )


class BatchedRollouts:
    """Plays rollouts in groups of `rows` lanes; `count` processes simulate, 0: this one does.

    Lane i is of group i mod `groups`; the lanes of a group are spread over the processes.
    """

    def __init__(self, spec: RolloutSpec, rows: int, count: int, take: Take) -> None:
        """`take` chooses a lane's next block of rollouts and takes it off the list.

        Raises: UserError if the policy predicts for one episode at a time.
        """
        policy = spec.policy()
        if not isinstance(policy, BatchedPolicy):
            raise UserError(
                f"evaluation.batch_size is {rows}, but {type(policy).__name__} predicts for one episode at a "
                "time. Set evaluation.batch_size to 1."
            )
        self.spec, self.rows, self.count, self.policy = spec, rows, count, policy
        self.groups = 2 if count else 1
        self._take_next = take
        self._lanes: list[Lane] = []
        self._left: Blocks = []
        self._jobs: dict[tuple[int, int], list[Moves]] = {}
        self._away = [0] * self.groups

    def play(self, blocks: Blocks) -> Iterator[tuple[PlannedRollout, Rollout]]:
        """Blocks of one rollout. Each rollout as it ends, when its record is saved.

        Raises: as `run_jobs`; UserError if the policy gives no chunk, or one that is not finite.
        """
        suite, self._left = self.spec.environments, list(blocks)
        lanes = min(self.rows * self.groups, len(blocks))
        if suite.one_a_process:
            lanes = min(lanes, max(1, self.count))
        memories = [self._memory() for _ in range(lanes)]
        self._lanes = [Lane(number, self.spec, memory) for number, memory in enumerate(memories)]
        for lane in self._lanes:
            self._begin(lane)
        with closing(Simulations(suite)) as simulations:
            for _, seen in run_jobs(simulations, self.count, self._next_job):
                for one in seen:
                    lane = self._lanes[one.lane]
                    self._away[lane.number % self.groups] -= 1
                    lane.take(one)
                    if lane.ended:
                        yield self._end(lane)

    def _memory(self) -> Remembering | None:
        policy = self.policy
        remembers = isinstance(policy, Remembering) and policy.remembers
        return cast(Remembering, policy.for_another_robot()) if remembers else None

    def _begin(self, lane: Lane) -> None:
        lane.begin(self._take_next(self._left, lane.number)[0] if self._left else None)
        if lane.one is not None:
            self._send(lane, lane.moves())

    def _end(self, lane: Lane) -> tuple[PlannedRollout, Rollout]:
        played, rollout = lane.one, lane.rollout()
        assert played is not None
        if (path := self.spec.record_path(played)) is not None:
            write_atomically(path, rollout.to_json())
        self._begin(lane)
        return played, rollout

    def _send(self, lane: Lane, moves: Moves) -> None:
        group = lane.number % self.groups
        spread = 1 if self.spec.environments.one_a_process else self.groups
        worker = lane.number // spread % max(1, self.count)
        self._jobs.setdefault((worker, group), []).append(moves)
        self._away[group] += 1

    def _next_job(self, worker: int) -> list[Moves] | None:
        """What the worker simulates next; a group of which all lanes wait is predicted first if need be."""
        for group in range(self.groups):
            if (job := self._jobs.pop((worker, group), None)) is not None:
                return job
            if not self._away[group] and self._predict(self._lanes[group :: self.groups]):
                return self._next_job(worker)
        return None

    def _predict(self, group: Sequence[Lane]) -> bool:
        """Chunks for all lanes of a group that play. False if none does."""
        playing = [lane for lane in group if lane.one is not None]
        waiting = playing
        while waiting:  # with a delay of n a runner wants two chunks of its first step
            moves = {lane.number: lane.moves() for lane in waiting}
            for lane in waiting:
                if moves[lane.number].actions:
                    self._send(lane, moves[lane.number])
            waiting = [lane for lane in waiting if not moves[lane.number].actions]
            self._answer(waiting)
        return bool(playing)

    def _answer(self, waiting: Sequence[Lane]) -> None:
        if not waiting:
            return
        rows = [*waiting, *[waiting[0]] * (self.rows - len(waiting))]
        pasts = [lane.past for lane in rows if lane.past is not None]
        chunks = self.policy.predict_many(
            [lane.observation() for lane in rows], pasts, [lane.looks for lane in rows]
        )
        for lane, chunk in zip(waiting, chunks, strict=False):
            lane.answer(chunk)
