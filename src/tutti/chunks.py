"""Chunks: how predicted chunks become one action a control step, in the simulator and on the robot.

A policy predicts H actions at once (its horizon); n of them (`actions_per_query`) are executed of each chunk.
Control steps are counted by the calls of `ChunkRunner.act`, so what is executed never depends on a clock.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import Field

from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig

Chunk = Float32[np.ndarray, "t a"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a new chunk must go on from. Row i of `actions` is what the chunk before does at the control step
    of row i of the new one, in data units; `weights`, 0 to 1, say how much that binds it. `guidance` bounds
    the correction of the velocity."""

    actions: Float32[np.ndarray, "t a"]
    weights: Float32[np.ndarray, " t"]
    guidance: float

    def padded(self, horizon: int) -> Continuation:
        """The same for a longer chunk, whose further rows nothing binds."""
        more = horizon - len(self.weights)
        rows = np.pad(self.actions, ((0, more), (0, 0)), mode="edge")
        return replace(self, actions=rows, weights=np.pad(self.weights, (0, more)))


Predict = Callable[[Continuation | None], Chunk]
"""Looks at the robot and gives the next chunk; called only where a chunk is needed."""


class ChunkRunner(ABC):
    """Gives the action of each control step. It has a history: one for each robot, `reset` for each episode.

    Where `predict` raises, nothing has changed: `act` may be called again for the same step.
    `queries` counts the chunks that were asked for since then, `horizon` is the length of the last one.
    """

    def __init__(self) -> None:
        self.queries = self.horizon = 0

    @abstractmethod
    def act(self, predict: Predict) -> Float32[np.ndarray, " a"]:
        """The action of this control step."""

    def reset(self) -> None:
        """Forgets everything: the next step begins an episode."""
        self.queries = self.horizon = 0


class QueueRunner(ChunkRunner):
    """Executes n actions of each chunk, one after the other.

    With a delay of d steps the robot goes on while the model computes: the chunk that was looked for at step
    t is taken at t + d, from its row d on, for its rows before that are of steps that have passed. The first
    chunk of an episode is waited for, and so is one that is asked for again after an error: no step has
    passed since. With an `executor` it is computed in the background, and waited for at
    t + d where it is not there yet: the actions are the same, however long a prediction takes.

    With `guidance` each chunk is told what the one before has left (real-time chunking, 2506.07339): with
    E = H - n and e Euler's number, row i has the weight

        1 for i < d,   c (e^c - 1) / (e - 1) with c = (E - i) / (E - d + 1) for d <= i < E,   0 after.
    """

    def __init__(
        self, steps: int, delay: int = 0, guidance: float | None = None, executor: Executor | None = None
    ) -> None:
        super().__init__()
        self.steps, self.delay, self.guidance, self._executor = steps, delay, guidance, executor
        self._chunk: Chunk | None = None
        self._next = self._end = self._passed = 0
        self._coming: Future[Chunk] | None = None

    def reset(self) -> None:
        """Forgets everything; what is still computed is dropped."""
        super().reset()
        self._chunk, self._next, self._end = None, 0, 0
        if self._coming is not None:
            self._coming.cancel()
        self._coming = None

    def act(self, predict: Predict) -> Float32[np.ndarray, " a"]:
        """The action of this control step.

        Raises: UserError if the chunks are shorter than d + n, and whatever `predict` raises, in the
        background at the step that needs its chunk.
        """
        if self._next == self._end:
            if self._coming is None:
                self._ask(predict)
            self._take()
        if self._coming is None and self._end - self._next <= self.delay:
            self._ask(predict)
        assert self._chunk is not None
        self._next += 1
        return self._chunk[self._next - 1]

    def _ask(self, predict: Predict) -> None:
        before, passed = self._left(), self._end - self._next
        if self._executor is not None:
            self._coming = self._executor.submit(predict, before)
        else:
            chunk = predict(before)
            self._coming = Future()
            self._coming.set_result(chunk)
        self._passed = passed
        self.queries += 1

    def _take(self) -> None:
        assert self._coming is not None
        coming, self._coming = self._coming, None
        first, self._chunk = self._passed, coming.result()
        chunk = self._chunk
        self.horizon = len(chunk)
        if self.delay and len(chunk) < self.delay + self.steps:
            raise UserError(
                f"chunks: {self.steps} actions of each are executed after a delay of {self.delay} steps, but "
                f"the policy predicts {len(chunk)} at once. Choose a delay and an actions_per_query that "
                f"together are at most {len(chunk)}."
            )
        self._next, self._end = first, min(first + self.steps, len(chunk))

    def _left(self) -> Continuation | None:
        if self.guidance is None or self._chunk is None:
            return None
        left, horizon = self._chunk[self._next :], len(self._chunk)
        if not len(left):  # all of it is done
            return None
        rows = np.minimum(np.arange(horizon), len(left) - 1)  # a last row again where the weight is 0
        weights = prefix_weights(horizon, self.steps, self.delay)
        return Continuation(actions=left[rows], weights=weights, guidance=self.guidance)


def prefix_weights(horizon: int, steps: int, delay: int) -> Float32[np.ndarray, " t"]:
    """The weights of `QueueRunner`, of rows 0 to H - 1."""
    end = horizon - steps

    def weight(row: int) -> float:
        share = (end - row) / (end - delay + 1)
        soft = share * math.expm1(share) / math.expm1(1.0) if row < end else 0.0
        return 1.0 if row < delay else soft

    return np.array([weight(row) for row in range(horizon)], np.float32)


class EnsembleRunner(ChunkRunner):
    """Predicts at every step and averages what all chunks say of it (ACT, 2304.13705):

    a(t) = sum_i w_i a_i(t) / sum_i w_i,   w_i = exp(-m i),   i = 0 for the oldest chunk that covers t.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._step = 0
        self._chunks: list[tuple[int, Chunk]] = []

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._step, self._chunks = 0, []

    def act(self, predict: Predict) -> Float32[np.ndarray, " a"]:
        """The action of this control step."""
        chunk = predict(None)
        self.queries, self.horizon = self.queries + 1, len(chunk)
        known = [(start, one) for start, one in self._chunks if self._step - start < len(one)]
        self._chunks = [*known, (self._step, chunk)]
        rows = np.stack([one[self._step - start] for start, one in self._chunks]).astype(np.float64)
        weights = np.exp(-self.decay * np.arange(len(rows)))[:, None]
        self._step += 1
        return ((weights * rows).sum(axis=0) / weights.sum()).astype(np.float32)


class QueueConfig(FrozenConfig):
    """`kind: queue`."""

    kind: Literal["queue"] = "queue"
    delay: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="control steps from an observation to the first action of its chunk that is executed; "
        "the rows before it are dropped",
    )

    def build(self, actions_per_query: int, executor: Executor | None = None) -> ChunkRunner:
        """The runner. Raises: UserError if the delay is longer than `actions_per_query`."""
        _check_delay(self.delay, actions_per_query)
        return QueueRunner(actions_per_query, self.delay, executor=executor)

    def __str__(self) -> str:
        return "queue" + f", delay {self.delay}" * bool(self.delay)


class EnsembleConfig(FrozenConfig):
    """`kind: ensemble`."""

    kind: Literal["ensemble"] = "ensemble"
    decay: float = Field(
        default=0.01, ge=0, description="m of the weights exp(-m i), i = 0 for the oldest chunk"
    )

    def build(self, actions_per_query: int, executor: Executor | None = None) -> ChunkRunner:
        """The runner. Raises: UserError if `actions_per_query` is not 1, or there is an executor."""
        if actions_per_query != 1:
            raise UserError(
                f"chunks.kind is ensemble, which predicts at every control step, but actions_per_query is "
                f"{actions_per_query}. Set actions_per_query to 1, or take kind queue."
            )
        if executor is not None:
            raise UserError(
                "chunks.kind is ensemble, which needs each chunk at once; only queue and real_time compute "
                "in the background. Leave out background, or take one of these."
            )
        return EnsembleRunner(self.decay)

    def __str__(self) -> str:
        return f"ensemble, decay {self.decay:g}"


class RealTimeConfig(FrozenConfig):
    """`kind: real_time`, for the flow decoder."""

    kind: Literal["real_time"] = "real_time"
    delay: int = Field(
        default=1, ge=0, le=4096, description="control steps from an observation to its chunk, as of queue"
    )
    guidance: float = Field(
        default=10.0, gt=0, description="beta, the largest factor of the correction of the velocity"
    )

    def build(self, actions_per_query: int, executor: Executor | None = None) -> ChunkRunner:
        """The runner. Raises: UserError if the delay is longer than `actions_per_query`."""
        _check_delay(self.delay, actions_per_query)
        return QueueRunner(actions_per_query, self.delay, self.guidance, executor)

    def __str__(self) -> str:
        return f"real-time chunking, delay {self.delay}, guidance {self.guidance:g}"


ChunksConfig = Annotated[QueueConfig | EnsembleConfig | RealTimeConfig, Field(discriminator="kind")]
QUEUE = QueueConfig()
"""Without a delay: the default."""


def _check_delay(delay: int, actions_per_query: int) -> None:
    if delay > actions_per_query:
        raise UserError(
            f"chunks.delay is {delay}, but a new chunk is asked for every {actions_per_query} steps. Set it "
            "to at most actions_per_query: one chunk is computed at a time."
        )
