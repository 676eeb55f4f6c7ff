"""Trains on several processes under torchrun, one of which kills itself; ships for `tutti verify-resume`.

After every other kill torchrun itself starts all processes anew (`--max-restarts`); after the next one it
gives up, and the command is started again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

from tutti.config.run_config import RunConfig
from tutti.debug.kill_harness import Kill, train_once, train_with_kills
from tutti.types import UserError

RESTARTS = 1
"""How often torchrun starts the processes anew before it gives up."""
SAID = 3000
"""Characters of a failed training's output that are shown."""


def processes_of(config: RunConfig) -> int:
    """How many processes a config is to be tried on: 2 where it names a kind that needs several, else 1."""
    return 2 if config.training.parallel.kind in ("ddp", "fsdp") else 1


def train_through(
    config: RunConfig,
    data_from: Path,
    run: Path,
    kills: Sequence[Kill] = (),
    *,
    processes: int = 1,
    note: Callable[[int], None] = lambda done: None,
) -> int:
    """Trains to the end through all `kills`, on `processes` processes. Gives how many kills took place.

    The arguments and the error are those of `train_with_kills`.
    """
    if processes == 1:
        return train_with_kills(config, data_from, run, kills, note)
    run.parent.mkdir(parents=True, exist_ok=True)
    planned = sorted(kills, key=lambda one: one.step)
    plan = {
        "config": config.model_dump(mode="json"),
        "data_from": str(data_from),
        "run": str(run),
        "kills": [astuple(kill) for kill in planned],
    }
    done = 0
    while True:
        _plan_of(run).write_text(json.dumps(plan | {"done": done}), encoding="utf-8")
        ended = _launch(_plan_of(run), run, processes)
        before, done = done, _taken(run)
        if done > before:
            note(done)
        if ended == 0:
            return done
        if done != before + 1 + RESTARTS:  # it gave up, but not over kills
            raise UserError(f"The training on {processes} processes failed: {_why(run, done)}")


def _plan_of(run: Path) -> Path:
    return run.parent / f"{run.name}.plan.json"


def _kills_of(run: Path) -> Path:
    """A line for each kill that took place."""
    return run.parent / f"{run.name}.kills"


def _taken(run: Path) -> int:
    noted = _kills_of(run)
    return len(noted.read_text(encoding="utf-8").splitlines()) if noted.exists() else 0


def _failure_of(run: Path, attempt: int) -> Path:
    return run.parent / f"{run.name}.failure-{attempt}.txt"


def _log_of(run: Path) -> Path:
    return run.parent / f"{run.name}.log"


def _why(run: Path, attempt: int) -> str:
    """What the first process to fail in that attempt has said, or else the end of all output."""
    said = _failure_of(run, attempt)
    return (said if said.exists() else _log_of(run)).read_text(encoding="utf-8")[-SAID:]


def _launch(plan: Path, run: Path, processes: int) -> int:
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
    with _log_of(run).open("a", encoding="utf-8") as log:
        return subprocess.run(
            [sys.executable, *launcher, "-m", "--", __name__, str(plan)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def main(plan: Path) -> int:
    """One of the processes that torchrun starts. Gives its exit code, if it is not killed."""
    given = json.loads(plan.read_text(encoding="utf-8"))
    run = Path(given["run"])
    attempt = given["done"] + int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    try:
        if attempt != _taken(run):
            raise UserError(f"it was started {attempt + 1} times after {_taken(run)} kills")  # after a fault
        kill = Kill(*given["kills"][attempt]) if attempt < len(given["kills"]) else None

        def note() -> None:
            with _kills_of(run).open("a", encoding="utf-8") as file:
                file.write(f"{attempt}\n")

        logging.getLogger("tutti").setLevel(logging.ERROR)
        config = RunConfig.model_validate(given["config"])
        train_once(config, Path(given["data_from"]), run, kill, note)
    except Exception as error:
        known = isinstance(error, UserError)
        _note_failure(run, attempt, str(error) if known else traceback.format_exc())
        return 2 if known else 1
    return 0


def _note_failure(run: Path, attempt: int, text: str) -> None:
    """The first process that fails says why; the others fail because it has."""
    try:
        with _failure_of(run, attempt).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
