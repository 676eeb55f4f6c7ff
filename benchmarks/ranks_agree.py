"""The same training on 1, 2 and 4 processes, by DDP and by FSDP2: how far do losses and weights differ?

python benchmarks/ranks_agree.py trains configs/smoke.yaml with `tutti train`, alone and under torchrun, on a
synthetic data set, with the same batches on the CPU. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recorded import synthetic_run
from safetensors.torch import load_file
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.config.run_config import RunConfig, load_config
from tutti.evaluation.closed_loop.starts import DATASET
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.training.records import read_records
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[1]
ALONE = "1 process"
TOLERANCE = 1e-3
"""Relative, of a loss in float32 after the last step; the first step's must agree to FIRST."""
FIRST = 1e-5
AGAINST = {"ddp": "DDP", "fsdp": "FSDP2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Largest differences from the training on one process: of L_total at the first and the last step and in
    between, of any raw term, each relative, and of a weight at the end, absolute."""

    first: float
    last: float
    largest: float
    term: float
    weight: float
    same_samples: bool

    @property
    def passed(self) -> bool:
        """As much data, and no loss further away than the tolerance."""
        return self.same_samples and self.first <= FIRST and max(self.largest, self.term) <= TOLERANCE


def relative(one: float, other: float) -> float:
    """|a - b| / max(|a|, |b|); 0 for equal values."""
    return 0.0 if one == other else abs(one - other) / max(abs(one), abs(other))


def compare(one: Path, other: Path) -> Agreement:
    """Two runs of the same config, step by step."""
    alone, several = ([r for r in read_records(run) if r["kind"] == "train"] for run in (one, other))
    totals = [relative(a["loss/total"], b["loss/total"]) for a, b in zip(alone, several, strict=True)]
    terms = [
        relative(value, b[name])
        for a, b in zip(alone, several, strict=True)
        for name, value in a.items()
        if name.startswith("loss/") and name.endswith("/raw")
    ]
    last = [max((run / "checkpoints").glob("step-*")) / "model.safetensors" for run in (one, other)]
    weights = [load_file(path) for path in last]
    furthest = max(float((value - weights[1][name]).abs().max()) for name, value in weights[0].items())
    return Agreement(
        first=totals[0],
        last=totals[-1],
        largest=max(totals),
        term=max(terms),
        weight=furthest,
        same_samples=[r["data/samples"] for r in alone] == [r["data/samples"] for r in several],
    )


def train(config: Path, overrides: Sequence[str], run: Path, processes: int) -> None:
    """`tutti train`, under torchrun for several processes. Raises: UserError with the end of its output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # The "--" keeps torchrun from taking "--run" for one of its own options.
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-port", str(port), "-m", "--"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m"]), "tutti", "train", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *overrides, "--run", str(run)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"{processes} processes: the training failed:\n{(done.stdout + done.stderr)[-3000:]}")


def agreement_table(found: dict[str, Agreement], steps: int) -> Table:
    """One line for each way to spread the training."""
    heads = ("against 1 process", "step 1", f"step {steps}", "largest", "of any term", "weight", "verdict")
    rows = [
        (
            name,
            *(f"{value:.1e}" for value in (one.first, one.last, one.largest, one.term, one.weight)),
            "PASS" if one.passed else "FAIL",
        )
        for name, one in found.items()
    ]
    return Table(title="Relative difference of the loss, float32", heads=heads, rows=tuple(rows))


def benchmark(arguments: argparse.Namespace, config: RunConfig, scratch: Path) -> bool:
    """Trains, compares, publishes. Says whether all agree."""
    made_in = circumstances()
    synthetic_run(scratch, config, per_task=4, length=24)
    given = [*arguments.overrides, f"data.sources=[{{path: {scratch / DATASET}}}]"]
    print_line(f"training on {ALONE} ...")
    train(arguments.config, given, scratch / "alone", 1)
    found: dict[str, Agreement] = {}
    for kind in arguments.kinds:
        for count in arguments.processes:
            name = f"{AGAINST[kind]}, {count} processes"
            print_line(f"training with {name} ...")
            run = scratch / f"{kind}{count}"
            train(arguments.config, [*given, f"training.parallel={{kind: {kind}}}"], run, count)
            found[name] = compare(scratch / "alone", run)
    passed = all(one.passed for one in found.values())
    notes = [
        f"{config.training.steps} steps of batch {config.data.batch_size} (of all processes together), "
        f"{config.training.optimizer.kind}, gloo on the CPU, one thread each. The sums are taken in another "
        "order, and what that changes in the last digit grows from step to step, as with another number of "
        f"threads. Wanted: at most {FIRST:g} at step 1, {TOLERANCE:g} ever: {'PASS' if passed else 'FAIL'}. "
        "In float64 the same trainings agree to 1e-9 (tests/integration/test_ranks.py).",
        made_with(made_in),
    ]
    result: dict[str, Any] = {
        **made_in,
        "steps": config.training.steps,
        "batch_size": config.data.batch_size,
        "differences": {name: asdict(one) for name, one in found.items()},
        "passed": passed,
    }
    table = agreement_table(found, config.training.steps)
    publish(arguments.output, "benchmarks/ranks_agree", [table], notes, result)
    return passed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "smoke.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--kinds", nargs="*", choices=list(AGAINST), default=list(AGAINST))
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks_agree", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if all agree, 1 if not, 2 for a mistake of the user."""
    arguments = parse(given)
    arguments.overrides = [
        *(f"training.steps={arguments.steps}", "training.log_every=1", "training.threads=1"),
        *("training.device=cpu", "training.checkpoints.every=0"),
    ]
    config = load_config(arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory(prefix="tutti-ranks-") as name:
        return 0 if benchmark(arguments, config, Path(name)) else 1


if __name__ == "__main__":
    sys.exit(main())
