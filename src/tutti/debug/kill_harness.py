"""Trains in processes that kill themselves with SIGKILL mid-step; ships for users of `tutti verify-resume`.

One process is forked from a server that has imported the package and done nothing else, so that it starts at
once and inherits no threads. Several are started by torchrun: after every other kill torchrun itself starts
all of them anew (`--max-restarts`); after the next one it gives up, and the command is started again.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from tutti.config.run_config import RunConfig
from tutti.distributed.world import process_group
from tutti.runs.build import build_training, training_threads
from tutti.storage.checkpoint import checkpoints
from tutti.training.trainer import Trainer
from tutti.training.update import Observer, Update
from tutti.types import Features, LossTerms, UserError

WINDOWS = "windows-{rank}.jsonl"
"""Where a rank notes its rows of each batch, in the run's folder."""
PRELOADED = ("torch._dynamo", "torchjd.aggregation")
"""What a training imports on its way, slowly: once for all processes."""
RESTARTS = 1
"""How often torchrun starts the processes anew before it gives up."""
SAID = 3000
"""Characters of a failed training's output that are shown."""


@dataclass(frozen=True, slots=True)
class Kill:
    """After `step` updates the process of `rank` has `share` of the time of a step left to live: the kill
    falls into the next step, or into what follows it (record, validation, checkpoint). A `patient` one waits
    until the run has a checkpoint to go on from: they are written while the training goes on."""

    step: int
    share: float
    rank: int = 0
    patient: bool = False


class NotedWindows(Observer):
    """Notes in a file the windows of each batch that an update is made on."""

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self._trainer, self._path = trainer, path

    def after_forward(self, update: Update, features: Features, terms: LossTerms) -> None:
        if update.number > 0:
            return  # all micro-batches are noted at the first
        first = self._trainer.state.parts["loader"].state_dict()["consumed"] - len(update.batches)
        with self._path.open("a", encoding="utf-8") as file:
            for number, batch in enumerate(update.batches, start=first):
                file.write(json.dumps([number, batch.window.tolist()]) + "\n")


class Killer:
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


def train_through(
    config: RunConfig,
    data_from: Path,
    run: Path,
    kills: Sequence[Kill] = (),
    *,
    processes: int = 1,
    note: Callable[[int], None] = lambda done: None,
) -> int:
    """Trains in `run`, on what the run `data_from` has, to the end through all `kills`, in the order of their
    steps. Gives how many took place.

    One whose step a checkpoint has already passed comes in the next step, one that would come after the end
    behind the last checkpoint. `note` is called with the number of kills so far after each start.

    Raises: UserError with what the training said, if it failed in another way.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    plan = {
        "config": config.model_dump(mode="json"),
        "data_from": str(data_from),
        "run": str(run),
        "kills": [astuple(kill) for kill in sorted(kills, key=lambda one: one.step)],
    }
    file = _beside(run, "plan.json")
    launch, at_once = (_fork, 1) if processes == 1 else (_torchrun, 1 + RESTARTS)
    done = 0
    while True:
        file.write_text(json.dumps(plan | {"done": done}), encoding="utf-8")
        ended = launch(file, _beside(run, "log"), processes)
        before, done = done, _taken(run)
        if done > before:
            note(done)
        if ended == 0:
            return done
        if done != before + at_once:  # it gave up, but not over kills
            said = _beside(run, f"failure-{done}.txt")
            text = (said if said.exists() else _beside(run, "log")).read_text(encoding="utf-8")[-SAID:]
            where = f" on {processes} processes" if processes > 1 else ""
            raise UserError(f"The training{where} failed: {text or f'it ended with code {ended}'}")


def _beside(run: Path, kind: str) -> Path:
    return run.parent / f"{run.name}.{kind}"


def _taken(run: Path) -> int:
    """How many kills took place: each has written a line just before."""
    noted = _beside(run, "kills")
    return len(noted.read_text(encoding="utf-8").splitlines()) if noted.exists() else 0


def _fork(plan: Path, log: Path, processes: int) -> int:
    """One process to its end; gives its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])
    process = context.Process(target=_child, args=(plan, log))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    return process.exitcode or 0


def _child(plan: Path, log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(plan))


def _torchrun(plan: Path, log: Path, processes: int) -> int:
    """torchrun to its end; gives its exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--max-restarts", str(RESTARTS), "--master-port", str(port)]
    # the processes find what this one finds, also modules that a config names
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(
            [sys.executable, *launcher, "-m", "--", __name__, str(plan)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def main(plan: Path) -> int:
    """One process of the training. Gives its exit code, if it is not killed."""
    given = json.loads(plan.read_text(encoding="utf-8"))
    run = Path(given["run"])
    attempt = given["done"] + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    logging.getLogger("tutti").setLevel(logging.ERROR)
    try:
        if attempt != _taken(run):
            raise UserError(f"it was started {attempt + 1} times after {_taken(run)} kills")  # after a fault
        kill = Kill(*given["kills"][attempt]) if attempt < len(given["kills"]) else None
        _train(RunConfig.model_validate(given["config"]), Path(given["data_from"]), run, kill)
    except Exception as error:
        known = isinstance(error, UserError)
        # The first process that fails says why; the others fail because it has.
        with (
            suppress(FileExistsError),
            _beside(run, f"failure-{attempt}.txt").open("x", encoding="utf-8") as file,
        ):
            file.write(str(error) if known else traceback.format_exc())
        return 2 if known else 1
    return 0


def _train(config: RunConfig, data_from: Path, run: Path, kill: Kill | None) -> None:
    """From the newest checkpoint to the end or the kill, as one of the training's processes."""
    run.mkdir(parents=True, exist_ok=True)
    training, device = config.training, config.training.machine().device

    def note() -> None:
        with _beside(run, "kills").open("a", encoding="utf-8") as file:
            file.write("killed\n")

    def fit(rank: int) -> None:  # a function of its own: the training is freed before the process group ends
        built = build_training(config, data_from, output=run)
        noted = NotedWindows(built.trainer, run / WINDOWS.format(rank=rank))
        built.trainer.observers = (noted, *built.trainer.observers)
        killer = Killer(run, kill if kill is not None and kill.rank == rank else None, note)
        built.fit(killer)
        killer.finish()

    with (
        process_group(training.parallel.count, device, training.parallel.timeout) as world,
        training_threads(config),
    ):
        fit(world.ranks.rank)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
