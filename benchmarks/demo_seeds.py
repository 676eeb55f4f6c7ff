"""One recipe from several named seeds: how far the training seed alone moves the success rate.

python benchmarks/demo_seeds.py --run runs/demo trains `configs/demo.yaml` from each seed on the data that the
run has recorded, which is only read, and plays it on the config's own starts, without controls.
Interrupted, the same command goes on. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from joint_cell import load, make_cell
from joint_scores import BASE, Trained
from joint_training import finish
from recorded import check_recorded, require_unchanged, snapshot
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.config.run_config import load_config
from tutti.runs.provenance import circumstances, made_with


def table(trained: list[Trained]) -> Table:
    """One line a seed: the mean of its tasks' rates, then k of n for each task."""
    rows = [
        (
            *(str(one.seed), f"{100 * one.mean:.1f} %", f"{one.valid_action:.4f}", f"{one.seconds:.0f}"),
            *(f"{sum(bits)}/{len(bits)}" for bits in one.successes.values()),
        )
        for one in trained
    ]
    heads = ("seed", "task mean", "held-out action L1", "training s", *trained[0].successes)
    return Table(title="The same recipe from several seeds", heads=heads, rows=tuple(rows))


def benchmark(arguments: argparse.Namespace) -> None:
    """Trains and plays what is missing, then publishes."""
    run, work = arguments.run.resolve(), arguments.work.resolve()
    found_in = circumstances()
    config = load_config(arguments.config, arguments.set)
    fingerprint = check_recorded(run, load_config(run / "config.yaml"))
    before = snapshot(run)
    config.record.spec.check_rendering()  # before anything long begins
    starts, steps = config.evaluation.episodes, config.training.steps
    cells = [
        make_cell(config, run, work, fingerprint, arm=BASE, seed=seed, steps=steps, starts=starts)
        for seed in arguments.seeds
    ]
    finish(cells, run, arguments.jobs)
    require_unchanged(before, snapshot(run))
    trained = [load(cell) for cell in cells]
    means = [one.mean for one in trained]
    seeds = config.evaluation.seeds
    publish(
        arguments.output,
        "benchmarks/demo_seeds",
        [table(trained)],
        [
            f"Task means: median {100 * np.median(means):.1f} %, lowest {100 * min(means):.1f} %, highest "
            f"{100 * max(means):.1f} %. {steps} steps, {config.training.optimizer.kind} at "
            f"{config.training.optimizer.lr:g}; one thread a training; starts {seeds[0]} to {seeds[-1]}, "
            "sentences never shown, no controls.",
            made_with(found_in),
        ],
        {
            **found_in,
            "config": config.model_dump(mode="json"),
            "data": fingerprint,
            "trained": [asdict(one) for one in trained],
        },
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a run with recorded and decoded data")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="the recipe")
    parser.add_argument("--set", nargs="*", default=[], help="key.sub=value on top of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/demo_seeds"), help="folder of the trainings")
    parser.add_argument("--output", type=Path, default=RESULTS / "demo_seeds", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0 if every seed is done, 2 for a mistake of the user."""
    arguments = parse(given)
    benchmark(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
