"""Tells the trackers of a run: TensorBoard here, each other one in a process of its own.

No tracker can stop, slow or change a training: what it is told waits in a queue, which a thread empties into
the process's pipe.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutti.nested_dicts import without_addresses
from tutti.trackers.config import CustomLoggerConfig, LoggerConfig, TensorBoardConfig
from tutti.trackers.logger import FOLDER, Logger, Start
from tutti.trackers.process import IN_A_ROW, call, first_lines

log = logging.getLogger("tutti.trackers")

GRACE = 60.0
"""Seconds that the end of a training waits for its trackers."""
PICTURES: tuple[str, ...] = ("first_batch",)
"""Pictures that a training writes into its folder; each is told when it is there."""


class Trackers:
    """Several trackers at once. Each call is made to all that work; none raises."""

    def __init__(self, configs: Sequence[LoggerConfig], start: Start) -> None:
        self.run = start.run
        start = replace(start, config=without_addresses(start.config))
        self._told = [one for config in configs if (one := _begin(config, start)) is not None]
        self._pictures = [] if start.step else list(PICTURES)

    def scalars(self, step: int, kind: str, values: Mapping[str, float], seconds: float) -> None:
        """The values after `step` updates, and the pictures that there are since the last call."""
        self._tell({"call": "scalars", "step": step, "kind": kind, "values": values, "seconds": seconds})
        for name in [one for one in self._pictures if (self.run / f"{one}.png").exists()]:
            self._pictures.remove(name)
            self.picture(name, self.run / f"{name}.png", step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text, such as the config."""
        self._tell({"call": "text", "name": name, "text": text, "step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG file."""
        self._tell({"call": "picture", "name": name, "path": str(path.absolute()), "step": step})

    def video(self, name: str, path: Path, step: int) -> None:
        """An MP4 file."""
        self._tell({"call": "video", "name": name, "path": str(path.absolute()), "step": step})

    def rewind(self, step: int) -> None:
        """The run goes on from `step` again."""
        self._tell({"call": "rewind", "step": step})

    def close(self) -> None:
        """Waits for what is still to be sent, GRACE seconds at most for all of them together."""
        for one in self._told:
            one.close()
        deadline = time.monotonic() + GRACE
        for one in self._told:
            if isinstance(one, Elsewhere):
                one.wait(deadline - time.monotonic())
        self._told = []

    def _tell(self, told: dict[str, Any]) -> None:
        for one in self._told:
            one.tell(dict(told))


class Here:
    """TensorBoard in this process: its own thread writes its files, and it draws nothing."""

    def __init__(self, name: str, logger: Logger) -> None:
        self.name, self.logger, self.failures = name, logger, 0

    def tell(self, told: dict[str, Any]) -> None:
        """The call, unless it has failed IN_A_ROW times."""
        if self.failures >= IN_A_ROW:
            return
        try:
            call(self.logger, told)
            self.failures = 0
        except Exception as error:
            self.failures += 1
            end = "is switched off" if self.failures == IN_A_ROW else "is tried again"
            if self.failures in (1, IN_A_ROW):
                log.warning("tracker %s failed, and %s: %s", self.name, end, error)

    def close(self) -> None:
        """Closes its files."""
        with suppress(Exception):
            self.logger.close()


class Elsewhere:
    """A tracker in a process of its own."""

    def __init__(self, name: str, config: LoggerConfig, start: Start) -> None:
        self.name = name
        folders = os.pathsep.join(dict.fromkeys(str(Path(one).absolute()) for one in sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tutti.trackers.process", str(start.run.absolute()), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": folders},
            start_new_session=True,  # Ctrl-C is for the training, which then closes it
        )
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=one, name=f"tutti-tracker-{name}", daemon=True)
            for one in (self._send, self._listen)
        ]
        for line in first_lines(config, start):
            self._queue.put(line)
        for thread in self._threads:
            thread.start()

    def tell(self, told: dict[str, Any]) -> None:
        """Puts the call behind those that wait."""
        self._queue.put(json.dumps(told))

    def close(self) -> None:
        """Nothing more will come."""
        self._queue.put(None)

    def wait(self, seconds: float) -> None:
        """Until all is sent. A process that takes longer is left to end by itself."""
        try:
            self._process.wait(seconds)
            self._threads[1].join(1.0)  # what it said last
        except subprocess.TimeoutExpired:
            log.warning("tracker %s is still sending; it goes on without this training", self.name)

    def _send(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError, ValueError):  # it has ended, and said why
            while (line := self._queue.get()) is not None:
                pipe.write(line + "\n")
                pipe.flush()
        with suppress(OSError, ValueError):
            pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            log.warning("tracker %s %s", self.name, line.rstrip())


def _begin(config: LoggerConfig, start: Start) -> Here | Elsewhere | None:
    """The tracker, begun; None, with a warning, where that fails."""
    name = re.sub(r"\W", "-", config.kind)
    try:
        if isinstance(config, TensorBoardConfig):
            return Here(name, config.build(start))
        if isinstance(config, CustomLoggerConfig):
            config.check_trusted(config.key)
        (start.run / FOLDER).mkdir(parents=True, exist_ok=True)
        return Elsewhere(name, config, start)
    except Exception as error:
        log.warning("tracker %s cannot be started, and is switched off: %s", name, error)
        return None
