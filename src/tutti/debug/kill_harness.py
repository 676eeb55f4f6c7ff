"""Trains in a process that kills itself with SIGKILL mid-step; ships because `tutti verify-resume` uses it.

Processes are forked from a server that has imported the package and done nothing else, so that each starts
at once and none inherits threads. Trainings on several processes are in kill_harness_ranks.py.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.config.run_config import RunConfig
from tutti.data.loader import Loader
from tutti.distributed.ranks import Ranks
from tutti.distributed.world import process_group
from tutti.runs.build import build_training, training_threads
from tutti.storage.checkpoint import checkpoints
from tutti.types import Batch, UserError

WINDOWS = "windows-{rank}.jsonl"
"""Where a rank notes its rows of each batch, in the run's folder."""
FAILURE = "failure.txt"
PRELOADED = ("torch._dynamo", "torchjd.aggregation")
"""What a training imports on its way, slowly: once for all processes."""


@dataclass(frozen=True, slots=True)
class Kill:
    """After `step` updates the process of `rank` has `share` of the time of a step left to live: the kill
    falls into the next step, or into what follows it (record, validation, checkpoint). A `patient` one waits
    until the run has a checkpoint to go on from: they are written while the training goes on."""

    step: int
    share: float
    rank: int = 0
    patient: bool = False


class NotedLoader:
    """A loader that notes in a file which windows it hands out, batch by batch."""

    def __init__(self, loader: Loader, path: Path) -> None:
        self._loader, self._path = loader, path

    def __iter__(self) -> Iterator[Batch]:
        with self._path.open("a", encoding="utf-8") as file:
            while True:
                number = self._loader.state_dict()["consumed"]
                batch = next(self._loader)
                file.write(json.dumps([number, batch.window.tolist()]) + "\n")
                file.flush()
                yield batch

    def share(self, ranks: Ranks, at_once: int = 1) -> None:
        """From now on this rank's rows of each batch, as the loader's."""
        self._loader.share(ranks, at_once)

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """The loader's."""
        self._loader.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class _NotedData:
    train: NotedLoader
    validation: Any


class _Killer:
    """The trainer's `progress` in `run`: kills its own process, and calls `before` just before."""

    def __init__(self, run: Path, kill: Kill | None, before: Callable[[], None]) -> None:
        self._run, self._kill, self._before = run, kill, before
        self._last: float | None = None
        self._timer: threading.Timer | None = None
        self._dying = threading.Lock()

    def __call__(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        duration, self._last = 0.0 if self._last is None else now - self._last, now
        if self._kill is not None and step >= self._kill.step and self._timer is None:
            arguments = (self._kill.patient,)
            self._timer = threading.Timer(self._kill.share * duration, self._die, arguments)
            self._timer.daemon = True
            self._timer.start()

    def finish(self) -> None:
        """The training has come to its end: a kill that would come later comes now."""
        if self._timer is not None:
            self._timer.cancel()
        if self._kill is not None:
            self._die(patient=False)

    def _die(self, patient: bool) -> None:
        while patient and not checkpoints(self._run):
            time.sleep(0.005)
        with self._dying:  # a patient kill and the end may come at once; `before` is for one of them
            self._before()
            os.kill(os.getpid(), signal.SIGKILL)


def train_once(
    config: RunConfig,
    data_from: Path,
    run: Path,
    kill: Kill | None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Trains in `run`, on what the run `data_from` has, from the newest checkpoint to the end or the kill.

    Under torchrun this is one of the processes of the training. `before` is called in the one that is killed,
    just before.
    """
    run.mkdir(parents=True, exist_ok=True)
    training = config.training
    device = training.machine().device
    with (
        process_group(training.parallel.count, device, training.parallel.timeout) as world,
        training_threads(config),
    ):
        own = kill if kill is not None and kill.rank == world.ranks.rank else None
        _train(config, data_from, run, _Killer(run, own, before), WINDOWS.format(rank=world.ranks.rank))


def _train(config: RunConfig, data_from: Path, run: Path, progress: _Killer, windows: str) -> None:
    """A function of its own, so that the training is freed before the process group ends."""
    training = build_training(config, data_from, output=run)
    noted = NotedLoader(training.data.train, run / windows)
    training.fit(progress, _NotedData(noted, training.data.validation))
    progress.finish()


def _child(config: RunConfig, data_from: Path, run: Path, kill: Kill | None) -> None:
    logging.getLogger("tutti").setLevel(logging.ERROR)
    with (run.parent / f"{run.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        train_once(config, data_from, run, kill)
    except UserError as error:
        (run.parent / FAILURE).write_text(str(error), encoding="utf-8")
        sys.exit(2)
    except Exception:
        (run.parent / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


def train_in_process(config: RunConfig, data_from: Path, run: Path, kill: Kill | None = None) -> bool:
    """The same in a process. True if it was killed, False if it came to the end.

    Raises: UserError with what the training said, if it failed in another way.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])
    run.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_child, args=(config, data_from, run, kill))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    if process.exitcode == -signal.SIGKILL and kill is not None:
        return True
    if process.exitcode == 0:
        return False
    said = run.parent / FAILURE
    text = said.read_text(encoding="utf-8") if said.exists() else f"it ended with code {process.exitcode}"
    raise UserError(f"The training failed: {text}")


def train_with_kills(
    config: RunConfig,
    data_from: Path,
    run: Path,
    kills: Sequence[Kill],
    note: Callable[[int], None] = lambda done: None,
) -> int:
    """Trains to the end through all `kills`, in the order of their steps. Gives how many took place.

    One whose step a checkpoint has already passed comes in the next step, one that would come after the end
    behind the last checkpoint. `note` is called with the number of kills so far after each.
    """
    done = 0
    for kill in sorted(kills, key=lambda one: one.step):
        if not train_in_process(config, data_from, run, kill):
            return done
        done += 1
        note(done)
    train_in_process(config, data_from, run)
    return done
