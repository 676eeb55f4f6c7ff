"""The frame of a benchmark that times training steps: its command line, its config and threads, its data."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from recorded import check_recorded, require_unchanged, snapshot, synthetic_run
from tables import RESULTS, prints_user_errors
from timing import with_training

from tutti.config.run_config import RunConfig, load_config
from tutti.training.device import resolve_machine

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
Benchmark = Callable[[argparse.Namespace, RunConfig, Path, Path], bool]
"""Measures and publishes: arguments, config, the run whose data to read, a scratch folder. Did it pass?"""


def parser(about: str | None, name: str, *, rounds: int, turn: int) -> argparse.ArgumentParser:
    """The command line that they share. `rounds` and `turn` are defaults, `name` that of the result."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", type=Path, default=DEMO, help="model, objective, optimizer, batch")
    made.add_argument("--run", type=Path, help="read this run's recording; default: a synthetic data set")
    made.add_argument("--threads", type=int, help="CPU threads; default: those of the config")
    made.add_argument("--rounds", type=int, default=rounds, help="rounds over what is compared")
    made.add_argument("--turn", type=int, default=turn, help="steps of each in a round")
    made.add_argument("--output", type=Path, default=RESULTS / name, help="without suffix")
    return made


@prints_user_errors
def run(arguments: argparse.Namespace, benchmark: Benchmark) -> int:
    """Runs it on the CPU. 0 if it passed, 1 if not, 2 for a mistake of the user."""
    config = on_cpu(load_config(arguments.config), arguments.threads)
    with tempfile.TemporaryDirectory(prefix="tutti-benchmark-") as name:
        scratch = Path(name)
        if arguments.run is None:
            made = synthetic_run(scratch / "data", config)
            return 0 if benchmark(arguments, config, made, scratch) else 1
        check_recorded(arguments.run, config)
        before = snapshot(arguments.run)
        passed = benchmark(arguments, config, arguments.run, scratch)
        require_unchanged(before, snapshot(arguments.run))
        return 0 if passed else 1


def on_cpu(config: RunConfig, threads: int | None) -> RunConfig:
    """The config as it trains on the CPU with so many threads (its own if not given); torch gets them now."""
    count = threads or config.training.threads
    torch.set_num_threads(resolve_machine("cpu", count, "fp32").threads)
    return with_training(config, device="cpu", threads=count)
