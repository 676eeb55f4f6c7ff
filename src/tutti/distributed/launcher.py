"""A process of a training ends when the launcher that has started it is gone; loads no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

INTERVAL = 1.0
"""Seconds between two looks for the launcher."""
PATIENCE = 40.0
"""Seconds in which a training may save after its launcher is gone."""
NAME = "tutti launcher watch"


def end_with_launcher() -> None:
    """Under torchrun: as soon as the launcher is gone, SIGTERM for this process; 40 s later, its end.

    A launcher that is killed outright cannot end what it has started: its processes would go on without
    anybody to restart them, or wait for each other. At SIGTERM a training saves after its step and ends.
    """
    watched = any(thread.name == NAME for thread in threading.enumerate())
    if "TORCHELASTIC_RUN_ID" in os.environ and not watched:
        threading.Thread(target=_watch, args=(os.getppid(),), name=NAME, daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(INTERVAL)
    with contextlib.suppress(OSError):  # nobody may be reading any more
        os.write(2, f"the launcher (process {launcher}) is gone: process {os.getpid()} ends\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(128 + signal.SIGTERM)
