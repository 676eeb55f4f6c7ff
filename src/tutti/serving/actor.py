"""Actor: a policy as a robot calls it, one action a control step."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Float32

from tutti.chunks import ChunksConfig, Continuation
from tutti.serving.front_door import FrontDoor, Given
from tutti.serving.observation import Pictures, State, Text
from tutti.types import DataSpec, History


@runtime_checkable
class Remembering(Protocol):
    """What an actor needs of a policy, which is that of its robot alone."""

    @property
    def spec(self) -> DataSpec: ...
    def reset(self) -> None: ...
    def observe(self, images: Pictures, state: State, time: float) -> History | None: ...
    def predict(
        self,
        images: Pictures,
        state: State,
        instruction: Text,
        use_images: bool = True,
        *,
        continuing: Continuation | None = None,
        history: History | None = None,
    ) -> Float32[np.ndarray, "t a"]: ...


class Actor:
    """Gives the action of each control step. It has a history: one for each robot, `reset` for each episode.

    In the background a thread of its own predicts; what is executed is the same (`tutti.chunks`). `close`, or
    the end of a `with` block, ends the thread.
    """

    def __init__(
        self,
        policy: Remembering,
        front_door: FrontDoor,
        actions_per_query: int,
        chunks: ChunksConfig,
        background: bool,
    ) -> None:
        """Raises: UserError if `chunks` do not fit `actions_per_query`."""
        self._policy, self._front_door, self._background = policy, front_door, background
        self._step = 0
        self._executor: Executor | None = ThreadPoolExecutor(1, "tutti-act") if background else None
        self._runner = chunks.build(actions_per_query, self._executor)

    def act(self, observation: Given) -> Float32[np.ndarray, " a"]:
        """The action of this control step. `observation` is a mapping with pictures, state and instruction,
        as `FrontDoor` takes it; it is read at once, so its arrays may be used again.

        Raises: UserError as `Policy.predict`.
        """
        seen = self._front_door(observation)
        if self._background:
            seen = seen.copied()

        images, state, _ = seen
        history = self._policy.observe(images, state, self._step / self._policy.spec.fps)

        def predict(continuing: Continuation | None) -> Float32[np.ndarray, "t a"]:
            return self._policy.predict(*seen, continuing=continuing, history=history)

        action = self._runner.act(predict)
        self._step += 1  # where it raises, the same step may be asked for again
        return action

    def reset(self) -> None:
        """The next `act` begins an episode."""
        self._runner.reset()
        self._policy.reset()
        self._step = 0

    def close(self) -> None:
        """Ends the thread of the background."""
        self.reset()
        if self._executor is not None:
            self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
