"""One rollout, and the worker that plays blocks of them and saves each as it ends.

A record is a function of its identity alone: task, seed, instruction, condition, policy and limits. Which
worker played it, when, and after what, does not enter.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from tutti.storage.files import write_atomically
from tutti.storage.reading import read_text
from tutti.suites.metaworld.environments import Environment, EnvironmentFactory
from tutti.types import UserError

Condition = Literal["policy", "wrong_instruction", "no_image", "noop", "expert"]
CONDITIONS: tuple[Condition, ...] = ("policy", "wrong_instruction", "no_image", "noop", "expert")
KEPT_ENVIRONMENTS = 2  # a Meta-World task with its renderer takes 90 MB


@runtime_checkable
class RolloutPolicy(Protocol):
    """Observation to a chunk of actions in data units. `images` is None where `use_images` is False."""

    def predict(
        self,
        images: UInt8[np.ndarray, "v h w 3"] | None,
        state: Float32[np.ndarray, " s"],
        instruction: str,
        use_images: bool = True,
    ) -> Float32[np.ndarray, "t a"]: ...


@runtime_checkable
class PolicyFactory(Protocol):
    """Builds the policy in the process that uses it; pickles. `fingerprint` changes whenever the weights
    do.
    """

    @property
    def fingerprint(self) -> str: ...
    def __call__(self) -> RolloutPolicy: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Rollouts that one worker plays in a row: a task under a condition, with a (seed, instruction) for
    each.
    """

    task: str
    condition: Condition
    starts: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What happened. `actions` are as executed, (decisions, a) float32; replaying them from the seed gives
    it again.

    `chunk` is the number of actions the policy predicted at once (1 for expert and no-op), `start` the hash
    of the privileged state after the reset, `identity` the hash of everything the rollout depends on.
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

    def to_json(self) -> str:
        """One line of JSON; float32 survives exactly."""
        fields = {key: value for key, value in asdict(self).items() if key != "actions"}
        return json.dumps(fields | {"action_dim": self.actions.shape[1], "actions": self.actions.tolist()})

    @staticmethod
    def from_json(text: str) -> Rollout:
        """The rollout that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        shape = int(fields["decisions"]), int(fields.pop("action_dim"))
        actions = np.asarray(fields.pop("actions"), dtype=np.float32).reshape(shape)
        return Rollout(**fields, actions=actions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """Everything a worker needs to play units; pickles. `folder` None keeps the records in memory only."""

    policy: PolicyFactory
    environments: EnvironmentFactory
    execute: int
    max_decisions: int
    folder: Path | None

    def identity(self, task: str, condition: Condition, seed: int, instruction: str) -> str:
        """The hash of everything a rollout depends on; expert and no-op do not depend on the policy."""
        parts = [self.environments.fingerprint, task, condition, str(seed), str(self.max_decisions)]
        if condition not in ("noop", "expert"):
            parts += [self.policy.fingerprint, instruction, str(self.execute)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def find(self, task: str, condition: Condition, seed: int, instruction: str) -> Rollout | None:
        """The saved record of this very rollout, or None. Another policy's or protocol's is not it."""
        if self.folder is None:
            return None
        path = record_path(self.folder, condition, task, seed)
        try:
            found = Rollout.from_json(read_text(path))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None  # none, or not a record of ours: the rollout is played and the file replaced
        if found.identity != self.identity(task, condition, seed, instruction):
            return None
        return replace(found, instruction=instruction)  # for expert and no-op the text is only a label

    def save(self, rollout: Rollout) -> None:
        """Writes the record atomically; does nothing without a folder."""
        if self.folder is not None:
            path = record_path(self.folder, rollout.condition, rollout.task, rollout.seed)
            write_atomically(path, rollout.to_json())


def record_path(folder: Path, condition: str, task: str, seed: int) -> Path:
    """Where the record of a rollout lies."""
    return folder / condition / task / f"{seed}.json"


class Worker:
    """Plays units in one process: builds its policy once and keeps the environments it used last.

    It pickles as long as it has played nothing, which is how it travels to the process it works in.
    """

    def __init__(self, player: Player) -> None:
        self.player = player
        self._policy: RolloutPolicy | None = None
        self._environments: OrderedDict[str, Environment] = OrderedDict()

    def __call__(self, unit: Unit) -> list[Rollout]:
        """All rollouts of the unit, each saved as it ends.

        One torch thread: then the sums of a forward pass never depend on the machine's load or core count.
        """
        torch.set_num_threads(1)
        environment = self._environment(unit.task)
        done: list[Rollout] = []
        for seed, instruction in unit.starts:
            rollout = self._rollout(environment, unit, seed, instruction)
            self.player.save(rollout)
            done.append(rollout)
        return done

    def close(self) -> None:
        """Close every renderer."""
        while self._environments:
            self._environments.popitem()[1].close()

    def _environment(self, task: str) -> Environment:
        if task not in self._environments:
            if len(self._environments) >= KEPT_ENVIRONMENTS:
                self._environments.popitem(last=False)[1].close()
            self._environments[task] = self.player.environments(task)
        self._environments.move_to_end(task)
        return self._environments[task]

    def _rollout(self, environment: Environment, unit: Unit, seed: int, instruction: str) -> Rollout:
        player = self.player
        environment.reset(seed)
        start = hashlib.sha256(np.ascontiguousarray(environment.privileged).tobytes()).hexdigest()[:16]
        controller = self._controller(environment, unit.condition, instruction)
        execute = 1 if unit.condition in ("noop", "expert") else player.execute
        actions: list[np.ndarray] = []
        queries = chunk_length = 0
        while len(actions) < player.max_decisions and not environment.success:
            chunk = controller()
            queries, chunk_length = queries + 1, len(chunk)
            if not np.isfinite(chunk).all():
                raise UserError(
                    f"non-finite action on {unit.task}, seed {seed}, decision {len(actions)}. "
                    "The checkpoint's weights or its normalizer are damaged: evaluate an earlier checkpoint."
                )
            for action in chunk[:execute]:
                environment.step(action)
                actions.append(action)
                if environment.success or len(actions) >= player.max_decisions:
                    break
        executed = np.array(actions, dtype=np.float32).reshape(len(actions), player.environments.action_dim)
        return Rollout(
            task=unit.task,
            condition=unit.condition,
            seed=seed,
            instruction=instruction,
            success=bool(environment.success),
            decisions=len(actions),
            queries=queries,
            chunk=chunk_length,
            start=start,
            identity=player.identity(unit.task, unit.condition, seed, instruction),
            actions=executed,
        )

    def _controller(
        self, environment: Environment, condition: Condition, instruction: str
    ) -> Callable[[], Float32[np.ndarray, "t a"]]:
        """The function that gives the next chunk. It renders only if the policy will look."""
        if condition == "expert":
            return lambda: np.asarray(environment.expert_action(), np.float32)[None]
        if condition == "noop":
            return lambda: np.zeros((1, self.player.environments.action_dim), np.float32)
        if self._policy is None:
            self._policy = self.player.policy()
        policy = self._policy
        if condition == "no_image":
            return lambda: policy.predict(None, environment.state, instruction, use_images=False)
        return lambda: policy.predict(environment.render(), environment.state, instruction)
