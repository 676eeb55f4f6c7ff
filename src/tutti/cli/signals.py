"""What Ctrl-C, SIGTERM and SIGHUP do to a command, from its first moment on: one line, and an exit code of
128 + the signal's number. Imports nothing that is slow.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from tutti.errors import Terminated

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "SIGTERM: ended", signal.SIGHUP: "SIGHUP: ended"}
STREAMS = ("stdin", "r"), ("stdout", "w"), ("stderr", "w")


def how_to_go_on(number: int) -> str:
    """The line that a command ends with after a signal."""
    return f"\n{WORDS[signal.Signals(number)]}; run the same command again to continue"


def end_at_once(number: int, _: FrameType | None = None) -> None:
    """Ends the process without an exception, which imports turn into tracebacks of their own."""
    with suppress(OSError):
        os.write(2, f"{how_to_go_on(number)}\n".encode())
    os._exit(128 + number)


def end_command(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt or Terminated; inside an import, where nothing is lost, it ends at once."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end_at_once(number)
        frame = frame.f_back
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


@contextmanager
def obeyed(handler: Callable[[int, FrameType | None], None] = end_command) -> Iterator[None]:
    """Inside the block the signals call `handler`, except those that are ignored (nohup). Only the main
    thread may set handlers.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in WORDS if main}
    taken = [one for one, old in before.items() if old not in (signal.SIG_IGN, None)]
    for one in taken:
        signal.signal(one, handler)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, before[one])


def open_streams() -> None:
    """Gives a process that was started with closed streams empty ones: the next file that is opened would
    otherwise be taken for one, and warnings written into it.
    """
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
