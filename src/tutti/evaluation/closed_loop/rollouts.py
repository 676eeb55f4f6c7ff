"""Rollouts of a policy in the simulator: records, the worker that plays them, and several at once.

A record is a function of its identity alone: task, seed, instruction, condition, policy and limits. Which
worker played it, when, and after what, does not enter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from tutti.chunks import QUEUE, ChunkRunner, ChunksConfig, Continuation, QueueRunner
from tutti.distributed.cores import usable_cores
from tutti.storage.files import write_atomically
from tutti.storage.reading import read_text
from tutti.suites.environment import Environment, Suite
from tutti.suites.kept import KeptEnvironments
from tutti.suites.workers import Job, Result, run_jobs
from tutti.types import History, UserError

Condition = Literal["policy", "other_wording", "wrong_instruction", "no_image", "noop", "expert"]
CONDITIONS: tuple[Condition, ...] = (
    *("policy", "other_wording", "wrong_instruction", "no_image", "noop", "expert"),
)
MAX_WORKERS = 8


@runtime_checkable
class RolloutPolicy(Protocol):
    """Observation to a chunk of actions in data units. `images` has a picture for each view of the suite, by
    its name; None where `use_images` is False. `continuing` is given in real-time chunking alone."""

    def predict(
        self,
        images: Mapping[str, UInt8[np.ndarray, "h w 3"]] | None,
        state: Float32[np.ndarray, " s"],
        instruction: str,
        use_images: bool = True,
        *,
        continuing: Continuation | None = None,
    ) -> Float32[np.ndarray, "t a"]: ...


@runtime_checkable
class Remembering(RolloutPolicy, Protocol):
    """A policy that may look at what it observed before, at every control step of the rollout."""

    @property
    def remembers(self) -> bool: ...
    def reset(self) -> None: ...
    def observe(
        self,
        images: Mapping[str, UInt8[np.ndarray, "h w 3"]] | None,
        state: Float32[np.ndarray, " s"],
        time: float,
        use_images: bool = True,
    ) -> History | None: ...
    def predict(
        self,
        images: Mapping[str, UInt8[np.ndarray, "h w 3"]] | None,
        state: Float32[np.ndarray, " s"],
        instruction: str,
        use_images: bool = True,
        *,
        continuing: Continuation | None = None,
        history: History | None = None,
    ) -> Float32[np.ndarray, "t a"]: ...


@runtime_checkable
class PolicyFactory(Protocol):
    """Builds the policy in the process that uses it; picklable. `fingerprint` changes with the weights."""

    @property
    def fingerprint(self) -> str: ...
    def __call__(self) -> RolloutPolicy: ...


class PlannedRollout(NamedTuple):
    """A rollout to play: who acts, on which task, from the start of which seed, told what: the sentence, and
    the task that it is one of."""

    condition: Condition
    task: str
    seed: int
    instruction: str
    told: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished rollout. Replaying the executed `actions` from the seed reproduces it.

    `decisions` is the number of control steps, `queries` that of predicted chunks, `chunk` that of actions
    predicted at once (1 for expert and no-op), `start` the hash of the privileged state after the reset,
    `identity` the hash of everything the rollout depends on. `told` is the task of the instruction, `reached`
    and `closest` the `Environment`'s.
    """

    task: str
    condition: Condition
    seed: int
    instruction: str
    success: bool
    decisions: int
    queries: int
    chunk: int
    start: str
    identity: str
    actions: Float32[np.ndarray, "decisions a"]
    told: str = ""
    reached: tuple[str, ...] | None = None
    closest: float | None = None

    def about(self) -> dict[str, Any]:
        """Every field but the actions, as plain data."""
        return {key: value for key, value in asdict(self).items() if key != "actions"}

    def to_json(self) -> str:
        """One line of JSON; float32 survives exactly."""
        actions = {"action_dim": self.actions.shape[1], "actions": self.actions.tolist()}
        return json.dumps(self.about() | actions)

    @staticmethod
    def from_json(text: str) -> Rollout:
        """The rollout that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        shape = int(fields["decisions"]), int(fields.pop("action_dim"))
        actions = np.asarray(fields.pop("actions"), dtype=np.float32).reshape(shape)
        reached = fields.pop("reached", None)
        return Rollout(**fields, actions=actions, reached=None if reached is None else tuple(reached))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """Everything a worker needs to play rollouts; picklable. `folder` None keeps the records in memory.

    Raises: UserError if `max_decisions` exceeds what the simulator allows.
    """

    policy: PolicyFactory
    environments: Suite
    actions_per_query: int
    max_decisions: int
    folder: Path | None
    chunks: ChunksConfig = QUEUE
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.max_decisions > (longest := self.environments.longest):
            raise UserError(
                f"evaluation.max_decisions is {self.max_decisions}, but the simulator ends an episode after "
                f"{longest} control steps. Set it to at most {longest}."
            )

    def identity(self, one: PlannedRollout) -> str:
        """The hash of everything a rollout depends on; expert and no-op do not depend on the policy."""
        limit = str(self.max_decisions)
        parts = [self.environments.fingerprint, one.task, one.condition, str(one.seed), limit]
        if one.condition not in ("noop", "expert"):
            parts += [self.policy.fingerprint, one.instruction, str(self.actions_per_query)]
            parts += [] if self.chunks == QUEUE else [self.chunks.model_dump_json()]
            parts += [] if self.batch_size == 1 else [f"batches of {self.batch_size}"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def record_path(self, one: PlannedRollout) -> Path | None:
        """The path of a rollout's record; None where records stay in memory."""
        return self.folder and self.folder / one.condition / one.task / f"{one.seed}.json"

    def find(self, one: PlannedRollout) -> Rollout | None:
        """The saved record of this rollout; None if there is none, or only another policy's or protocol's."""
        path = self.record_path(one)
        try:
            rollout = Rollout.from_json(read_text(path, inside=path.parent)) if path is not None else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None  # none, or not a record of ours: the rollout is played and the file replaced
        if rollout is None or rollout.identity != self.identity(one):
            return None
        # For expert and no-op the sentence is only a label.
        return replace(rollout, instruction=one.instruction, told=one.told)


class _Controller:
    """Gives the next chunk of one rollout. It renders only if the policy gets images, once a control step."""

    def __init__(
        self, suite: Suite, environment: Environment, one: PlannedRollout, policy: RolloutPolicy | None
    ) -> None:
        self._suite, self._environment, self._one, self._policy = suite, environment, one, policy
        acts = one.condition not in ("expert", "noop")
        self._memory = policy if acts and isinstance(policy, Remembering) and policy.remembers else None
        if self._memory is not None:
            self._memory.reset()
        self._looks = one.condition != "no_image"
        self._seen: dict[str, UInt8[np.ndarray, "h w 3"]] | None = None
        self._past: History | None = None

    def look(self, step: int) -> None:
        """Lets a policy that remembers see this control step."""
        self._seen = None
        if self._memory is not None:
            time = step / self._suite.fps
            self._past = self._memory.observe(self._images(), self._environment.state, time, self._looks)

    def __call__(self, continuing: Continuation | None) -> Float32[np.ndarray, "t a"]:
        environment, one, policy = self._environment, self._one, self._policy
        if one.condition == "expert":
            return np.asarray(environment.expert_action(), np.float32)[None]
        if one.condition == "noop":
            stays, dim = self._suite.absolute_actions, self._suite.action_dim
            return environment.state[None, :dim] if stays else np.zeros((1, dim), np.float32)
        assert policy is not None
        seen = self._images(), environment.state, one.instruction, self._looks
        if self._memory is not None:
            return self._memory.predict(*seen, continuing=continuing, history=self._past)
        return policy.predict(*seen) if continuing is None else policy.predict(*seen, continuing=continuing)

    def _images(self) -> dict[str, UInt8[np.ndarray, "h w 3"]] | None:
        if self._looks and self._seen is None:
            self._seen = dict(zip(self._suite.views, self._environment.render(), strict=True))
        return self._seen


class RolloutWorker:
    """Plays blocks of rollouts in one process; builds its policy once and reuses its last environments.

    Picklable until it has played something, so it can be sent to another process.
    """

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        self._policy: RolloutPolicy | None = None
        self._environments = KeptEnvironments()

    def __call__(self, block: Sequence[PlannedRollout]) -> dict[PlannedRollout, Rollout]:
        """All rollouts of the block, each saved as it ends.

        One torch thread: then the sums of a forward pass never depend on the machine's load or core count.
        """
        torch.set_num_threads(1)
        rollouts: dict[PlannedRollout, Rollout] = {}
        for one in block:
            rollouts[one] = self._rollout(one)
            path = self.spec.record_path(one)
            if path is not None:
                write_atomically(path, rollouts[one].to_json())
        return rollouts

    def close(self) -> None:
        """Close every renderer."""
        self._environments.close()

    def _rollout(self, one: PlannedRollout) -> Rollout:
        spec, environment = self.spec, self._environments.of(self.spec.environments, one.task)
        environment.reset(one.seed)
        start = start_of(environment)
        controller = self._controller(environment, one)
        actions: list[np.ndarray] = []

        def finite(continuing: Continuation | None) -> Float32[np.ndarray, "t a"]:
            return require_finite(controller(continuing), one, len(actions))

        runner = self._runner(one.condition)
        while len(actions) < spec.max_decisions and not environment.success:
            controller.look(len(actions))
            actions.append(runner.act(finite))
            environment.step(actions[-1])
        executed = np.array(actions, dtype=np.float32).reshape(len(actions), spec.environments.action_dim)
        return Rollout(
            **one._asdict(),
            success=bool(environment.success),
            decisions=len(actions),
            queries=runner.queries,
            chunk=runner.horizon,
            start=start,
            identity=spec.identity(one),
            actions=executed,
            reached=environment.reached,
            closest=environment.closest,
        )

    def _runner(self, condition: Condition) -> ChunkRunner:
        if condition in ("noop", "expert"):
            return QueueRunner(1)
        return self.spec.chunks.build(self.spec.actions_per_query)

    def _controller(self, environment: Environment, one: PlannedRollout) -> _Controller:
        if one.condition not in ("expert", "noop") and self._policy is None:
            self._policy = self.spec.policy()
        return _Controller(self.spec.environments, environment, one, self._policy)


def start_of(environment: Environment) -> str:
    """The hash of all that a simulator knows after a reset."""
    return hashlib.sha256(np.ascontiguousarray(environment.privileged).tobytes()).hexdigest()[:16]


def require_finite(
    chunk: Float32[np.ndarray, "t a"], one: PlannedRollout, step: int
) -> Float32[np.ndarray, "t a"]:
    """The chunk. Raises: UserError if a number of it is none."""
    if not np.isfinite(chunk).all():
        raise UserError(
            f"non-finite action on {one.task}, seed {one.seed}, control step {step}. "
            "The checkpoint's weights or its normalizer are damaged: evaluate an earlier checkpoint."
        )
    return chunk


def count_of(workers: int | Literal["auto"]) -> int:
    """Processes: "auto" is one for each core that this one may use, at most 8 (each takes about 0.7 GB)."""
    return min(usable_cores(), MAX_WORKERS) if workers == "auto" else workers


def in_parallel(
    function: Callable[[Job], Result],
    jobs: list[Job],
    workers: int | Literal["auto"],
    take: Callable[[list[Job], int], Job] = lambda left, worker: left.pop(0),
) -> Iterator[Result]:
    """The result of each job as it ends; `take` chooses a worker's next job and takes it off the list.

    One worker works in this process. Raises: as `run_jobs`.
    """
    left = list(jobs)
    count = min(count_of(workers), len(left))
    spawned = count if count > 1 else 0
    for _, result in run_jobs(function, spawned, lambda worker: take(left, worker) if left else None):
        yield result
