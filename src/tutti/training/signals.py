"""Delays Ctrl-C and SIGTERM to the end of a step, so that a whole step is saved."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

log = logging.getLogger("tutti.training")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RELAY = 10.0
"""Seconds within which the same signal may come once more by way of a launcher."""


class Terminated(SystemExit):
    """A SIGTERM was obeyed and everything is saved: the process ends with exit code 0.

    What sent it (SLURM, Kubernetes, a spot machine) sees a clean end, and starts the same command again.
    """

    def __init__(self) -> None:
        super().__init__(0)


class Interruptible:
    """Inside the block the first Ctrl-C or SIGTERM only sets `requested`; a second one ends it at once.

    At once means: KeyboardInterrupt for Ctrl-C, SystemExit(143) for SIGTERM, nothing saved. Outside the main
    thread Python allows no handlers, and both behave as usual. `relayed`: a launcher (torchrun) passes on
    what also reaches this process itself, so a second signal counts only some seconds after the first.
    """

    def __init__(self, *, relayed: bool = False) -> None:
        self.requested = False
        self._patience = RELAY if relayed else 0.0
        self._since = 0.0
        self.number = signal.SIGINT
        self._previous: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        self._active = threading.current_thread() is threading.main_thread()

    @property
    def received(self) -> int:
        """The number of the signal that has come; 0 for none."""
        return int(self.number) if self.requested else 0

    def leave(self, step: int, saved: Path, number: int = 0) -> NoReturn:
        """Ends the training after `step` updates, all of which are in `saved`, and says how to go on.
        `number` is the signal, where another process has had it.

        Raises: KeyboardInterrupt after Ctrl-C, Terminated after SIGTERM.
        """
        number = number or self.number
        event = "interrupted" if number == signal.SIGINT else "SIGTERM: ended"
        log.warning("%s after step %d; saved in %s; the same command goes on from there", event, step, saved)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._since < self._patience:
            return
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested:
            raise SystemExit(128 + number)
        self.requested, self.number = True, signal.Signals(number)
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        if self._active:
            for number in SIGNALS:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            for number, previous in self._previous.items():
                signal.signal(number, previous)
