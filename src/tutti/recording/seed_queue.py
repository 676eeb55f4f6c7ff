"""Hands out the seeds to record, so that the result does not depend on the speed of the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tutti.errors import UserError

_MIN_TRIES, _TRIES_PER_EPISODE = 20, 5
Block = tuple[str, tuple[int, ...]]
"""A task and some of its seeds."""


class SeedQueue:
    """For each task, the seeds from `first_seed` on until `episodes_per_task` of them have succeeded.

    Seeds are handed out in order, and only while successes plus running seeds are fewer than
    `episodes_per_task`. So the seeds tried are exactly those up to the last success that is needed, in
    whatever order and however late results come in. `tries` (task -> seed -> success) is known already.
    """

    def __init__(
        self,
        episodes_per_task: int | Mapping[str, int],
        first_seed: int,
        tries: Mapping[str, Mapping[int, bool]],
    ) -> None:
        one = episodes_per_task
        self._wanted = dict.fromkeys(tries, one) if isinstance(one, int) else dict(one)
        self._first_seed = first_seed
        self._known = {task: dict(known) for task, known in tries.items()}
        self._next = dict.fromkeys(tries, first_seed)
        self._running: dict[str, set[int]] = {task: set() for task in tries}
        self._successes: dict[str, list[int]] = {task: [] for task in tries}
        for task in tries:
            self._pass_known(task)

    @property
    def total(self) -> int:
        """How many episodes there will be."""
        return sum(self._wanted[task] for task in self._next)

    @property
    def recorded(self) -> int:
        """How many there are."""
        return sum(map(len, self._successes.values()))

    @property
    def missing(self) -> int:
        """How many are not there yet."""
        return self.total - self.recorded

    def take(self, block: int, *, prefer: str | None = None, avoid: Sequence[str] = ()) -> Block | None:
        """The next seeds, at most `block`, of the task `prefer`, or else of the one least often in `avoid`.

        None if there is nothing to hand out now; running seeds may change that.

        Raises:
            UserError: so many tries of a task have failed that something must be wrong.
        """
        wanting = [task for task in self._next if self._wants(task)]
        if not wanting:
            return None
        task = prefer if prefer in wanting else min(wanting, key=avoid.count)
        seeds: list[int] = []
        while len(seeds) < block and self._wants(task):
            self._refuse_endless(task)
            seeds.append(self._next[task])
            self._running[task].add(self._next[task])
            self._next[task] += 1
            self._pass_known(task)
        return task, tuple(seeds)

    def report(self, task: str, results: Mapping[int, bool]) -> None:
        """Notes the results of seeds that were handed out: seed -> success."""
        for seed, success in results.items():
            self._running[task].remove(seed)
            if success:
                self._successes[task].append(seed)
        self._pass_known(task)

    def outcome(self) -> tuple[dict[str, list[int]], dict[str, int]]:
        """When all is done: the successful seeds of each task in order, and how many were tried."""
        assert not any(self._running.values()) and self.missing == 0
        seeds = {task: sorted(successes) for task, successes in self._successes.items()}
        return seeds, {task: following - self._first_seed for task, following in self._next.items()}

    def _wants(self, task: str) -> bool:
        return len(self._successes[task]) + len(self._running[task]) < self._wanted[task]

    def _pass_known(self, task: str) -> None:
        """Goes past seeds whose result is known, as if they had been handed out and reported."""
        while self._wants(task) and self._next[task] in self._known[task]:
            if self._known[task][self._next[task]]:
                self._successes[task].append(self._next[task])
            self._next[task] += 1

    def _refuse_endless(self, task: str) -> None:
        tried = self._next[task] - self._first_seed
        if tried >= max(_MIN_TRIES, _TRIES_PER_EPISODE * self._wanted[task]):
            raise UserError(
                f"The expert of task {task!r} solved only {len(self._successes[task])} of {tried} starts; "
                f"{self._wanted[task]} episodes are wanted. Allow more decisions "
                "(max_decisions), lower action_repeat, or use less noise."
            )
