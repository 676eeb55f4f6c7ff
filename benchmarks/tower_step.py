"""What a pre-trained vision tower costs: base with a SigLIP of size B, frozen, with LoRA, or learning.

python benchmarks/tower_step.py computes updates over a small dummy batch on one thread of the CPU, each arm
in a process of its own, and compares its peak memory with what `tutti plan` says before. The tower has random
weights: neither time nor memory depends on them. benchmarks/README.md says what each column means. That FSDP2
on two ranks trains as one process: tests/integration/test_towers_trained.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from frame import DEMO
from memory import MOST_ERROR, planned
from memory_cell import ENVIRONMENT, Cell, forget_peak, resident_peak
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.planning.devices import CPU_PROCESS
from tutti.planning.footprint import LiveMemory, TrialUpdate, count_flops
from tutti.runs.build import expected_spec
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.types import UserError

SIGLIP = {
    "model_type": "siglip_vision_model",
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"patch_size": 16, "image_size": 224},
}
"""google/siglip-base-patch16-224."""
LEARN: dict[str, Any] = {"frozen": "none", "lora 16": {"lora": 16}, "full": "all"}
OWN, PLAIN = "own encoder", "frozen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one arm: parameters, those that learn, CPU seconds of each update, and peak bytes: of live tensors,
    and of the whole process."""

    parameters: int
    learning: int
    seconds: tuple[float, ...]
    live: int
    process: int


def cell_of(arm: str, arguments: argparse.Namespace) -> Cell:
    """The demo's data and loss with the preset and this tower."""
    tower = {"kind": "pretrained", "path": "none", "weights": "random", "architecture": SIGLIP}
    own = [] if arm == OWN else [f"model.vision={json.dumps(tower | {'learn': LEARN[arm]})}"]
    overrides = (
        *("training.device=cpu", "training.precision=fp32", "training.optimizer.kind=adamw"),
        *(f"model.size={arguments.preset}", f"data.image_size={SIGLIP['image_size']}", *own),
        f"data.batch_size={arguments.batch}",
    )
    return Cell(config=str(DEMO), overrides=overrides, rows=arguments.batch)


def measure(cell: Cell, updates: int) -> Cost:
    """An update that makes the optimiser's state, one whose tensors are counted, then those on the clock."""
    config = cell.load()
    seconds: list[float] = []
    with LiveMemory() as memory:
        one = TrialUpdate(config, expected_spec(config))
        live = one.peaks(memory, cell.rows).peak
    batch = one.batch(cell.rows)
    forget_peak()
    for _ in range(updates):
        begin = time.process_time()
        one.backward(one.forward(batch))
        one.step()
        seconds.append(time.process_time() - begin)
    parts = one.parts()
    return Cost(
        parameters=parts.total,
        learning=parts.trainable,
        seconds=tuple(seconds),
        live=live,
        process=resident_peak(),
    )


def in_own_process(cell: Cell, updates: int) -> Cost:
    """`measure` in a process of its own. Raises: UserError if that fails (out of memory)."""
    command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell)), "--updates", str(updates)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{cell.overrides}: exit {done.returncode}: {done.stderr[-500:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def benchmark(arguments: argparse.Namespace) -> bool:
    """Measures, publishes, and says whether every plan of memory is within 10 %."""
    found_in = circumstances()
    arms: dict[str, dict[str, Any]] = {}
    for arm in (OWN, *LEARN):
        cell = cell_of(arm, arguments)
        config = cell.load()
        flops = count_flops(config, expected_spec(config), cell.rows)
        computed = flops.model * cell.rows + flops.optimizer
        arms[arm] = {"flops": computed, "planned": planned(cell)}
        arms[arm] |= asdict(in_own_process(cell, arguments.updates))
        print_line(f"{arm}: {arms[arm]['seconds']} CPU seconds")
    base = arms[PLAIN]
    rows: list[tuple[str, ...]] = []
    errors: list[float] = []
    for arm, one in arms.items():
        process = one["planned"] + CPU_PROCESS["fp32"]
        live, whole = one["planned"] / one["live"] - 1, process / one["process"] - 1
        errors += [live, whole]
        ratio = statistics.median(one["seconds"]) / statistics.median(base["seconds"])
        rows.append(
            (
                *(arm, f"{one['parameters'] / 1e6:.1f}", f"{one['learning'] / 1e6:.1f}"),
                *(f"{ratio:.2f}", f"{one['flops'] / base['flops']:.2f}"),
                *(f"{one['live'] / 1e6:,.0f}", f"{one['planned'] / 1e6:,.0f}", f"{100 * live:+.1f} %"),
                *(f"{one['process'] / 1e6:,.0f}", f"{process / 1e6:,.0f}", f"{100 * whole:+.1f} %"),
            )
        )
    heads = ("vision", "M parameters", "M learn", "time / frozen", "FLOPs / frozen")
    heads += ("live MB", "plan MB", "error", "process MB", "plan MB", "error")
    passed = max(map(abs, errors)) <= MOST_ERROR
    notes = [
        f"Memory by the plan: {100 * min(errors):+.1f} to {100 * max(errors):+.1f} % "
        f"({'PASS' if passed else 'FAIL'}; wanted: at most {100 * MOST_ERROR:.0f} %).",
        f"{arguments.preset}, batch {arguments.batch}, 2 views of {SIGLIP['image_size']} px, AdamW, float32, "
        f"one thread; medians of {arguments.updates} updates, in CPU time. {made_with(found_in)}",
    ]
    if arguments.note:
        notes.append(arguments.note)
    title = "An update with a SigLIP of size B as the vision encoder"
    table = Table(title=title, heads=heads, rows=tuple(rows))
    result = {**found_in, "note": arguments.note, "arms": arms, "passed": passed}
    publish(arguments.output, "benchmarks/tower_step", [table], notes, result)
    return passed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="base", choices=("tiny", "small", "base"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--updates", type=int, default=3, help="on the clock")
    parser.add_argument("--note", default="", help="what is to be said of the machine, such as a shared core")
    parser.add_argument("--cell", help="(its own process) print the cost of this cell")
    parser.add_argument("--output", type=Path, default=RESULTS / "tower_step", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if every plan is within 10 %, 1 if not, 2 for a mistake of the user."""
    arguments = parse(given)
    if arguments.cell is None:
        return 0 if benchmark(arguments) else 1
    torch.set_num_threads(1)
    cell = json.loads(arguments.cell)
    print(
        json.dumps(asdict(measure(Cell(**cell | {"overrides": tuple(cell["overrides"])}), arguments.updates)))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
