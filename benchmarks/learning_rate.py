"""Which peak learning rate? Halvings of one optimizer's rate, each for the first steps of the whole training.

python benchmarks/learning_rate.py --run runs/demo trains every rate from several seeds on the data that the
run has recorded, which is only read, with the schedules of the whole training, and stops each after `--until`
steps. What is compared are errors on held-out episodes; nothing is played, so the choice uses up no start.
Interrupted, the same command goes on. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joint_training import ONE_THREAD
from recorded import check_recorded, require_unchanged, snapshot
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.config.run_config import RunConfig, build_config, load_config, to_yaml
from tutti.evaluation.closed_loop.starts import DATASET
from tutti.runs.build import build_training
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically
from tutti.training.records import read_records
from tutti.types import UserError

KEY_FRAME, ACTION = "valid/metric/state/key_l1", "valid/action"
LABELS = {KEY_FRAME: "held-out key-frame error", ACTION: "held-out action L1"}


class _Enough(Exception):
    """The last step that is wanted is recorded and validated."""


def cell_config(
    base: RunConfig, run: Path, rate: float, seed: int, arguments: argparse.Namespace
) -> RunConfig:
    """The run's config with this rate and seed, one thread, and a validation where the screen ends."""
    values = base.model_dump(mode="json")
    values["name"], values["seed"] = f"lr-{rate:g}", seed
    values["data"] |= {"seed": seed, "sources": [{"path": str((run / DATASET).resolve())}]}
    values["training"] |= {"seed": seed, "threads": 1, "device": "cpu"}
    values["training"] |= {"validation": {"every": arguments.until // 2}}
    values["training"] |= {"checkpoints": {"every": arguments.until}, "diagnostics": {"every": 0}}
    values["training"]["optimizer"] |= {"lr": rate}
    if arguments.size:
        dropout = base.model.fusion.state_dropout
        values["model"] = {"size": arguments.size, "fusion": {"state_dropout": dropout}}
    if arguments.batch:
        values["data"]["batch_size"] = arguments.batch
    return build_config(values, source=f"rate {rate:g}")


def run_cell(folder: Path, until: int) -> None:
    """Trains one cell in this process up to step `until` of its schedule, and writes result.json."""
    config = load_config(folder / "cell.yaml")
    torch.set_num_threads(1)

    def stop(step: int, steps: int, latest: dict[str, float]) -> None:
        if step >= until:
            raise _Enough

    with contextlib.suppress(_Enough):
        build_training(config, folder).fit(stop)
    records = read_records(folder)
    curves = [
        {"step": one["step"], **{name: one[name] for name in (KEY_FRAME, ACTION)}}
        for one in records
        if one["kind"] == "validation" and one["step"] <= until
    ]
    trains = [one for one in records if one["kind"] == "train" and one["step"] <= until]
    result = {
        "rate": config.training.optimizer.lr,
        "seed": config.seed,
        "seconds": trains[-1]["time/seconds"],
        "validation": curves,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1))


def start_cell(folder: Path, run: Path, until: int) -> dict[str, Any]:
    """Runs a cell in a process of its own. Gives its result.

    Raises: UserError with the end of its output if it failed.
    """
    command = [sys.executable, __file__, "--cell", str(folder), "--until", str(until), "--run", str(run)]
    log = folder / "output.log"
    with log.open("a", encoding="utf-8") as output:
        code = subprocess.run(
            command, env=os.environ | ONE_THREAD, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code or not (folder / "result.json").is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise UserError(f"{folder.name} failed (exit {code}); the end of {log}:\n{tail}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def screen(arguments: argparse.Namespace) -> None:
    """Trains what is missing, then publishes."""
    run, work = arguments.run.resolve(), arguments.work.resolve()
    found_in = circumstances()
    base = load_config(run / "config.yaml", arguments.set)
    fingerprint = check_recorded(run, base)
    before = snapshot(run)
    cells: list[Path] = []
    for seed in arguments.seeds:
        for rate in arguments.rates:
            config = cell_config(base, run, rate, seed, arguments)
            text = to_yaml(config)
            key = hashlib.sha256(f"{text} {arguments.until} {fingerprint}".encode()).hexdigest()[:10]
            folder = work / f"lr{rate:g}-seed{seed}-{key}"
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "cell.yaml", text)
            cells.append(folder)
    missing = [folder for folder in cells if not (folder / "result.json").is_file()]
    print_line(f"{len(cells)} trainings, {len(missing)} to do, {arguments.jobs} at a time")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(start_cell, folder, run, arguments.until) for folder in missing]
        for future in as_completed(waiting):
            one = future.result()
            print_line(
                f"rate {one['rate']:g}, seed {one['seed']}: {one['validation'][-1]} ({one['seconds']:.0f} s)"
            )
    require_unchanged(before, snapshot(run))
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in cells]
    publish(
        arguments.output,
        "benchmarks/learning_rate",
        [table(results, arguments, base)],
        [
            f"The first {arguments.until} of {base.training.steps} steps, schedules of the whole training; "
            "one thread a training; errors of the averaged weights on held-out episodes; nothing was played. "
            f"Each figure: mean over the seeds {', '.join(map(str, arguments.seeds))} (each seed's).",
            made_with(found_in),
        ],
        {**found_in, "data": fingerprint, "until": arguments.until, "cells": results},
    )


def table(results: list[dict[str, Any]], arguments: argparse.Namespace, base: RunConfig) -> Table:
    """One line a rate: each error's mean over the seeds, and each seed's."""
    rows: list[tuple[str, ...]] = []
    for rate in arguments.rates:
        own = [one for one in results if one["rate"] == rate]
        row = [f"{rate:g}"]
        for name in (KEY_FRAME, ACTION):
            for place in range(len(own[0]["validation"])):
                values = [one["validation"][place][name] for one in own]
                row.append(f"{np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        rows.append((*row, f"{np.mean([one['seconds'] for one in own]):.0f}"))
    steps = [one["step"] for one in results[0]["validation"]]
    heads = [f"{LABELS[name]}, step {step}" for name in (KEY_FRAME, ACTION) for step in steps]
    size = arguments.size or base.model.size
    title = f"Peak rate of {base.training.optimizer.kind}, model {size}"
    return Table(title=title, heads=("rate", *heads, "training s"), rows=tuple(rows))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a run with recorded and decoded data")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.005, 0.0025, 0.00125])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12], help="training seeds")
    parser.add_argument("--until", type=int, default=1000, help="steps of each training")
    parser.add_argument("--size", default="", help="another model size than the run's")
    parser.add_argument("--batch", type=int, default=0, help="another batch size than the run's")
    parser.add_argument("--set", nargs="*", default=[], help="key.sub=value on top of the run's config")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/learning_rate"), help="folder of the trainings"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "learning_rate", help="without suffix")
    parser.add_argument("--cell", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0 if the screen is complete, 2 for a mistake of the user."""
    arguments = parse(given)
    if arguments.cell is not None:
        run_cell(arguments.cell, arguments.until)
    else:
        screen(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
