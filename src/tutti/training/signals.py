"""Delays Ctrl-C, SIGTERM and SIGHUP to the end of a step, so that a whole step is saved."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from tutti.errors import Terminated

log = logging.getLogger("tutti.training")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RELAY = 10.0
"""Seconds within which the same signal may come once more by way of a launcher."""


class Interruptible:
    """Inside the block the first Ctrl-C, SIGTERM or SIGHUP only sets `received`, its number; a second one
    ends it at once.

    At once means: KeyboardInterrupt for Ctrl-C, else Terminated, nothing saved. Outside the main thread
    Python allows no handlers, and all behave as usual; so does a SIGHUP that is ignored (nohup). `relayed`: a
    launcher (torchrun) passes on what also reaches this process itself, so a second signal counts only some
    seconds after the first.
    """

    def __init__(self, *, relayed: bool = False) -> None:
        self.received = 0
        self._patience = RELAY if relayed else 0.0
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def leave(self, step: int, saved: Path, number: int) -> NoReturn:
        """Ends the training after `step` updates, all of which are in `saved`, and says how to go on.
        `number` is the signal, which another process may have had.

        Raises: KeyboardInterrupt after Ctrl-C, else Terminated.
        """
        event = "interrupted" if number == signal.SIGINT else f"{signal.Signals(number).name}: ended"
        log.warning("%s after step %d; saved in %s; the same command goes on from there", event, step, saved)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= self._patience:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ours = [one for one in SIGNALS if (one, signal.getsignal(one)) != (signal.SIGHUP, signal.SIG_IGN)]
            self._previous = {number: signal.signal(number, self._handle) for number in ours}
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
