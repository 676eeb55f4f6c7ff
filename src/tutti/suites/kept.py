"""The environments that a process keeps between episodes: those of the tasks that it played last."""

from __future__ import annotations

from tutti.suites.environment import Environment, Suite

MOST = 2
"""One with its renderer may take 100 MB."""


class KeptEnvironments:
    """At most `MOST`, or one where a process can hold no second one; the others are closed first. Empty, it
    can be sent to another process."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], Environment] = {}

    def of(self, suite: Suite, task: str) -> Environment:
        """The environment of a task, made where it is not kept."""
        key = suite.name, suite.fingerprint, task
        environment = self._kept.pop(key, None)
        most = 1 if suite.one_a_process else MOST
        while self._kept and len(self._kept) >= most:
            self._kept.pop(next(iter(self._kept))).close()
        self._kept[key] = environment or suite.make(task)  # the last one is the one used last
        return self._kept[key]

    def close(self) -> None:
        """Closes all of them."""
        while self._kept:
            self._kept.popitem()[1].close()
