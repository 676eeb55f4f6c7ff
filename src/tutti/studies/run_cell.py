"""Runs one cell of a study in its own process: trains, evaluates, and writes result.json.

python -m tutti.studies.run_cell FOLDER runs the cell that `compare` has described in FOLDER; run again, it
continues. With --attached it ends when its standard input ends, so that it never outlives the study.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tutti import pipeline
from tutti.config.run_config import RunConfig, load_config, to_yaml
from tutti.data.formats.lerobot import ENVIRONMENT_STATE
from tutti.data.sources import LabelsConfig, open_parts, stores_of
from tutti.evaluation.open_loop import tasks_of
from tutti.evaluation.probes.place import place_probes
from tutti.runs.build import build_data, suite_of
from tutti.runs.provenance import commit, machine, versions
from tutti.runs.terminal import print_line, show_logs
from tutti.serving.policy import Policy, find_checkpoint
from tutti.storage.files import write_atomically, write_json
from tutti.storage.reading import read_json
from tutti.studies.cells import RESULT, Cell, Trained
from tutti.suites.environment import Suite
from tutti.training.records import read_records
from tutti.types import UserError

CONFIG, DESCRIPTION = "cell.yaml", "cell.json"
PREDICTIONS = 30
MISTAKE, INTERRUPTED = 2, 130
NICE = 10


def describe_cell(cell: Cell, config: RunConfig) -> None:
    """Writes the files that the cell's process reads."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(cell.folder / CONFIG, to_yaml(config))
    known = {"arm": cell.arm, "level": cell.level, "seed": cell.seed, "identity": cell.identity}
    write_json(cell.folder / DESCRIPTION, known)


def run_cell(folder: Path) -> None:
    """Trains and evaluates the cell in this process, continuing an interrupted try."""
    config = load_config(folder / CONFIG)
    torch.set_num_threads(1)
    # The folder's name is a hash of all that matters: only the path of the data can differ.
    pipeline.train(config, folder, redo="if changed")
    pipeline.evaluate(folder, config.evaluation, redo="if changed", trust_code=config.classes)
    policy = Policy.load(find_checkpoint(folder), config.evaluation.weights, trust_code=config.classes)
    results = read_json(folder / "evaluation" / "results.json")
    successes: dict[str, list[int]] = {}
    starts: dict[str, list[int]] = {}
    for rollout in results["rollouts"]:
        if rollout["condition"] == "policy":
            successes.setdefault(rollout["task"], []).append(int(rollout["success"]))
            starts.setdefault(rollout["task"], []).append(rollout["seed"])
    records = read_records(folder)
    last = next(record for record in reversed(records) if record["kind"] == "train")
    open_loop = folder / "evaluation" / "open_loop.json"
    data = build_data(config, folder)
    suite = suite_of(config)
    groups = tasks_of(data.windows.instructions, suite)
    probed = place_probes(policy.model, data, recorded_places(config, suite), groups)
    result = Trained(
        **read_json(folder / DESCRIPTION),
        steps=config.training.steps,
        samples=round(last["data/samples"]),
        seconds=last["time/seconds"],
        parameters=sum(parameter.numel() for parameter in policy.model.parameters()),
        milliseconds=prediction_time(policy),
        held_out=held_out_values(records),
        open_loop=read_json(open_loop)["overall"]["normalised"]["executed"] if open_loop.is_file() else None,
        successes=successes,
        starts=starts,
        protocol=results["protocol"],
        commit=commit(),
        versions=versions(),
        machine=machine(),
        blind=config.model.vision.withhold,
        measures=control_measures(results["scores"]) | probed,
    )
    write_json(folder / RESULT, asdict(result))


def control_measures(scores: Mapping[str, Any]) -> dict[str, float]:
    """Of each control its task mean; where the scene shows several goals, the shares of rollouts that reached
    the goal of their sentence before any other, and that reached none."""
    found = {f"success/{name}": one["mean"] for name, one in scores.items() if name != "policy"}
    for name, one in scores.items():
        goals = [task["goals"] for task in one["tasks"]]
        if played := sum(sum(of.values()) for of in goals):
            found[f"told_goal_first/{name}"] = sum(of.get("told", 0) for of in goals) / played
            found[f"no_goal/{name}"] = sum(of.get("none", 0) for of in goals) / played
    return found


def recorded_places(config: RunConfig, suite: Suite) -> dict[str, np.ndarray]:
    """The places of the suite for each window of the data; none where a source does not hold them."""
    try:
        read = {"state": ENVIRONMENT_STATE, "labels": LabelsConfig(), "conventions": "none"}
        parts = open_parts([source.model_copy(update=read) for source in config.data.sources])
        known = [store.states for store in stores_of(parts)]
    except UserError:  # recorded by another program
        return {}
    rows = np.concatenate(known).astype(np.float64)
    places = suite.places.items()
    return {name: rows[:, columns] for name, columns in places if columns.stop <= rows.shape[1]}


def held_out_values(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each term at its last validation in which it counted."""
    return {
        name: value
        for record in records
        if record["kind"] == "validation"
        for key, value in record.items()
        if key.startswith("valid/") and key != "valid/total"
        if {*"/@"}.isdisjoint(name := key.removeprefix("valid/"))
    }


def prediction_time(policy: Policy, repeats: int = PREDICTIONS) -> float:
    """Milliseconds of one prediction at batch 1, median of `repeats` after three that do not count.

    Time of the one thread: the study's other cells run beside it. Each picture is new, as at a robot: one
    that came before would be read from what a frozen tower keeps.
    """
    spec, rng = policy.spec, np.random.default_rng(0)
    state = np.zeros(spec.state_dim, np.float32)
    times: list[float] = []
    for _ in range(repeats + 3):
        noise = rng.integers(0, 256, (len(spec.views), spec.image_size, spec.image_size, 3), np.uint8)
        images = dict(zip(spec.views, noise, strict=True))
        started = time.thread_time()
        policy.predict(images, state, "push the puck", time=0.0)
        times.append(1000 * (time.thread_time() - started))
    return median(times[3:])


def _end_with_the_study() -> None:
    """Ends this process at the end of standard input, which comes when the study's process ends."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)  # at any moment: what is on the disk is whole


def run_process(run: Callable[[Path], None], folder: Path, *, attached: bool) -> int:
    """The process of a cell, which is `run` by its folder: 0 if it is finished, 2 for a mistake of the user,
    130 after Ctrl-C."""
    if attached:
        threading.Thread(target=_end_with_the_study, daemon=True).start()
        os.nice(NICE)
    show_logs()
    try:
        run(folder)
    except UserError as error:
        print_line(f"error: {error}")
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(run_process(run_cell, Path(sys.argv[1]), attached="--attached" in sys.argv[2:]))
