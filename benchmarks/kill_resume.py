"""Random kill -9 points in every mode of training: how many values differ from an undisturbed run?

python benchmarks/kill_resume.py trains a tiny model on a synthetic data set in each mode twice: undisturbed,
and killed with SIGKILL at random moments and resumed after each. On several processes it is one of them that
is killed. benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recorded import synthetic_run
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.config.run_config import RunConfig, build_config
from tutti.debug.kill_harness import train_through
from tutti.debug.verify_resume import compare_runs, kill_plan
from tutti.nested_dicts import merge
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically

POINTS = 100
STEPS = 40

TINY: dict[str, Any] = {
    "name": "kill-resume",
    "record": {"tasks": ["faucet-open", "drawer-close"]},
    "data": {"horizon": 4, "batch_size": 4, "image_size": 32, "prefetch": 0, "validation_windows": 8},
    "model": {
        "vision": {"stem": {"channels": [8, 16, 16], "strides": [1, 1, 2]}, "width": 16, "heads": 2},
        "language": {"width": 16, "depth": 1, "heads": 2},
        "fusion": {"width": 16, "depth": 1, "heads": 2},
        "action": {"hidden": 16},
    },
    "objective": {
        "align": {"weight": {"start": 0.3, "end": 0.1}},
        "recon": {"weight": 0.1, "width": 16, "heads": 2, "depth": 1},
        "state": {"weight": 0.3, "offsets": [2, 4], "hidden": 16},
    },
    "training": {
        "steps": STEPS,
        "threads": 1,
        "device": "cpu",
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "wsd", "warmup": 3},
        "ema": "off",
        "log_every": 3,
        "validation": {"every": 14},
        "checkpoints": {"every": 5},
        "diagnostics": {"every": 7},
    },
}
SHARES = {name: {"weight": None, "share": 0.2} for name in ("align", "recon", "state")}
MODES: dict[str, dict[str, Any]] = {
    "plain (AdamW)": {},
    "Muon, EMA": {"training": {"optimizer": {"kind": "muon"}, "ema": 0.99}},
    "accumulation 3, EMA": {"training": {"accumulation": 3, "ema": 0.99}},
    "prefetch 3, colour augmentation": {"data": {"prefetch": 3, "augmentation": {"kind": "colour"}}},
    "two stages": {"strategy": {"kind": "two_stage"}, "training": {"ema": 0.99}},
    "K gradients": {"backward": {"kind": "k_gradients", "aggregator": {"kind": "cosine_gate"}}},
    "shares": {"balancing": {"kind": "shares", "start": 5, "steps": 20}, "objective": SHARES},
    "FAMO, prefetch 3": {"balancing": {"kind": "famo"}, "data": {"prefetch": 3}},
    "RLW, flow decoder": {"balancing": {"kind": "rlw"}, "model": {"action": {"kind": "flow"}}},
    "sharded, Muon, EMA": {
        "training": {"optimizer": {"kind": "muon"}, "ema": 0.99, "checkpoints": {"format": "sharded"}}
    },
    "keep best and every 10": {
        "training": {
            "checkpoints": {"keep_best": {"metric": "valid/total"}, "keep_every": 10, "keep": 1},
            "validation": {"every": 5},
        }
    },
    "DDP, 2 processes": {"training": {"parallel": {"kind": "ddp"}}},
    "FSDP, 2 processes": {"training": {"parallel": {"kind": "fsdp"}, "optimizer": {"kind": "muon"}}},
    "FSDP, 2 processes, sharded": {
        "training": {"parallel": {"kind": "fsdp"}, "checkpoints": {"format": "sharded"}, "ema": 0.99}
    },
    "DDP, 2 processes, accumulation 3, EMA, prefetch 3": {
        "data": {"prefetch": 3},
        "training": {
            "parallel": {"kind": "ddp"},
            "accumulation": 3,
            "ema": 0.99,
            "validation": {"raw": True},
        },
    },
}
"""What each mode changes of TINY. A kind of parallel that needs several processes is given two."""


def config_of(mode: str, steps: int = STEPS) -> RunConfig:
    """The config of a mode."""
    values = merge(TINY, MODES[mode])
    return build_config(merge(values, {"training": {"steps": steps}}), mode)


def measure(mode: str, kills: int, scratch: Path, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """One run undisturbed and one with `kills` kills, compared; as plain values."""
    config, folder = config_of(mode, steps), scratch / mode.replace(" ", "-").replace(",", "")
    data = scratch / "data"
    started = time.monotonic()
    processes = 2 if config.training.parallel.kind in ("ddp", "fsdp") else 1
    train_through(config, data, folder / "undisturbed", processes=processes)
    plan = kill_plan(steps, kills, seed, processes)
    done = train_through(config, data, folder / "killed", plan, processes=processes)
    found = compare_runs(folder / "undisturbed", folder / "killed")
    kept = [sorted(p.name for p in (folder / r / "checkpoints").iterdir()) for r in ("undisturbed", "killed")]
    found.add("checkpoints that are left", *kept)
    return {
        "kills": done,
        "planned": [[kill.step, kill.share, kill.rank] for kill in plan],
        "values": found.num_values,
        "differ": found.num_differing,
        "first": str(found.first) if found.first else None,
        "sections": found.values,
        "seconds": time.monotonic() - started,
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line for each mode, and the sum."""
    rows = [
        (mode, str(one["kills"]), f"{one['values']:,}", f"{one['differ']:,}") for mode, one in results.items()
    ]
    sums = [sum(one[key] for one in results.values()) for key in ("kills", "values", "differ")]
    rows.append(("all", *(f"{value:,}" for value in sums)))
    return Table(
        title="Killed with SIGKILL and resumed, against an undisturbed run",
        heads=("mode", "kills", "values compared", "values that differ"),
        rows=tuple(rows),
    )


def shares(points: int, modes: Sequence[str]) -> dict[str, int]:
    """`points` kills spread over the modes as evenly as can be, at least one each."""
    return {
        mode: max(1, points // len(modes) + (place < points % len(modes))) for place, mode in enumerate(modes)
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=POINTS, help="kills in all")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--only", nargs="*", default=[], help="modes whose name contains one of these")
    parser.add_argument("--work", type=Path, help="keep finished modes here, and find them again")
    parser.add_argument("--output", type=Path, default=RESULTS / "kill_resume", help="without suffix")
    return parser.parse_args(arguments)


def benchmark(arguments: argparse.Namespace, scratch: Path, work: Path) -> bool:
    """Measures every mode, publishes; True if nothing differs."""
    found_in = circumstances()
    chosen = [mode for mode in MODES if not arguments.only or any(o in mode for o in arguments.only)]
    planned = shares(arguments.points, chosen)
    synthetic_run(scratch / "data", config_of(chosen[0]), per_task=6, length=16)
    results: dict[str, Any] = {}
    for number, mode in enumerate(chosen):
        seed = 1000 * arguments.seed + number
        kept = (
            work
            / f"{mode.replace(' ', '-')}-{planned[mode]}-{arguments.steps}-{seed}-{found_in['commit']}.json"
        )
        if kept.exists():
            results[mode] = json.loads(kept.read_text(encoding="utf-8"))
            continue
        results[mode] = measure(mode, planned[mode], scratch, seed, arguments.steps)
        write_atomically(kept, json.dumps(results[mode]))
        one = results[mode]
        print_line(
            f"{mode}: {one['kills']} kills, {one['differ']} of {one['values']:,} values differ "
            f"({one['seconds']:.0f} s)"
        )
    kills, differ, values = (sum(o[k] for o in results.values()) for k in ("kills", "differ", "values"))
    notes = [
        f"{kills} kills; {differ} of {values:,} values differ. The kills of a line happened in one run, one "
        f"after the other: it was resumed after each, and compared at its end after {arguments.steps} steps. "
        "A kill comes at a random moment of a step after a random one. Each value counts of the last "
        "checkpoint, all records but their times, the order of windows, and which checkpoints are "
        f"left. {made_with(found_in)}"
    ]
    notes += [
        f"{mode}: the first that differs: {one['first']}" for mode, one in results.items() if one["first"]
    ]
    publish(
        arguments.output, "benchmarks/kill_resume", [table(results)], notes, {**found_in, "modes": results}
    )
    return differ == 0


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if no value differs, 1 if one does, 2 for a mistake of the user."""
    arguments = parse(given)
    with tempfile.TemporaryDirectory(prefix="tutti-benchmark-") as name:
        work = arguments.work or Path(name) / "work"
        work.mkdir(parents=True, exist_ok=True)
        return 0 if benchmark(arguments, Path(name), work) else 1


if __name__ == "__main__":
    sys.exit(main())
