"""One recipe from several named seeds: how far the training seed alone moves the success rate.

python benchmarks/demo_seeds.py --run runs/demo trains `configs/demo.yaml` from each seed on the data that the
run has recorded, which is only read, and plays it on the config's own starts (or from --first-seed on),
without controls. Interrupted, the same command goes on. benchmarks/README.md says what each column means.

Every look at a block of starts is noted in benchmarks/results/demo_starts.json, with what was looked at: a
recipe that was changed after a look is judged on other starts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from joint_cell import load, make_cell
from joint_scores import BASE, Trained
from joint_training import finish
from recorded import check_recorded, require_unchanged, snapshot
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.config.run_config import load_config
from tutti.key_effects import with_effect
from tutti.nested_dicts import content_hash
from tutti.runs.build import TRAIN_SECTIONS
from tutti.runs.provenance import circumstances, made_with
from tutti.storage.files import write_json

PUCK = ("push", "pick-place")
"""The tasks in which a puck can be lost."""
HALF = 0.5


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


def task_table(trained: list[Trained]) -> Table:
    """Of each task over the trainings: median, lowest and highest rate, and how many fail at over half."""
    rates = {task: [float(np.mean(one.successes[task])) for one in trained] for task in trained[0].successes}
    rows = [
        (
            task,
            *(f"{100 * value:.0f} %" for value in (np.median(of), min(of), max(of))),
            str(sum(rate < HALF for rate in of)),
        )
        for task, of in rates.items()
    ]
    heads = ("task", "median", "lowest", "highest", "trainings below half")
    return Table(title=f"Each task over {len(trained)} trainings", heads=heads, rows=tuple(rows))


def summary(trained: list[Trained]) -> str:
    """Median, range, the worst training task by task, and how many lost the puck."""
    means = [one.mean for one in trained]
    worst = min(trained, key=lambda one: one.mean)
    of_worst = ", ".join(f"{task} {sum(bits)}/{len(bits)}" for task, bits in worst.successes.items())
    lost = [one.seed for one in trained if any(np.mean(one.successes.get(t, [1])) < HALF for t in PUCK)]
    text = (
        f"Task means: median {100 * np.median(means):.1f} %, lowest {100 * min(means):.1f} %, highest "
        f"{100 * max(means):.1f} %. The worst of {len(trained)}, seed {worst.seed}: {of_worst}. "
    )
    which = f": seeds {', '.join(map(str, lost))}" if lost else ""
    return f"{text}{len(lost)} lost the puck ({' or '.join(PUCK)} below half of the starts){which}."


def note_look(path: Path, seeds: range, looked: dict[str, Any]) -> str:
    """Notes in `path` that the starts `seeds` were looked at; the same look again is not noted twice.

    Returns who had looked at any of them before, as a sentence; empty for nobody.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    look = {"first": seeds[0], "last": seeds[-1], **looked}
    others = [one for one in found if one["first"] <= seeds[-1] and seeds[0] <= one["last"]]
    others = [one for one in others if one["recipe"] != look["recipe"]]
    if look not in found:
        write_json(path, [*found, look])
    recipes = sorted({one["recipe"] for one in others})
    return (
        f"These starts were looked at before, with another recipe ({', '.join(recipes)}): take others "
        "(--first-seed) for a recipe that was chosen after that look."
        if recipes
        else ""
    )


def benchmark(arguments: argparse.Namespace) -> None:
    """Trains and plays what is missing, then publishes."""
    run, work = arguments.run.resolve(), arguments.work.resolve()
    found_in = circumstances()
    given = [] if arguments.first_seed is None else [f"evaluation.first_seed={arguments.first_seed}"]
    config = load_config(arguments.config, [*arguments.set, *given])
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
    seeds = config.evaluation.seeds
    recipe = content_hash(with_effect(config.sections("record", *TRAIN_SECTIONS)), 10)
    looked = {
        "recipe": recipe,
        "seeds": arguments.seeds,
        "mean": float(np.mean([one.mean for one in trained])),
    }
    warning = note_look(arguments.looks, seeds, looked)
    publish(
        arguments.output,
        "benchmarks/demo_seeds",
        [table(trained), task_table(trained)],
        [
            summary(trained),
            *filter(None, [warning]),
            f"Recipe {recipe}: {steps} steps, {config.training.optimizer.kind} at "
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
    parser.add_argument("--first-seed", type=int, help="the first start, else the recipe's own")
    parser.add_argument("--looks", type=Path, default=RESULTS / "demo_starts.json", help="who looked at what")
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
