"""What does `training.residual: bf16` do to a training? Loss curves of paired seeds, with a float32 control.

python benchmarks/residual_curve.py --run runs/demo trains configs/demo.yaml for a few hundred steps, with its
schedules shortened to them, three times from each seed: products and sum in fp32 (the control), products in
bf16, and the residual sum in bf16 too. The trainings of a seed begin with the same weights and see the same
batches. The run's recorded data are only read. Killed, it goes on. It draws docs/pictures/residual-curve.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from tables import RESULTS, Table, prints_user_errors, publish
from timing import with_training

from tutti.config.run_config import RunConfig, load_config
from tutti.evaluation.statistics.intervals import t_interval
from tutti.report.svg.charts import Series, line_chart
from tutti.runs.build import build_training
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically, write_json
from tutti.training.records import read_records

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "residual-curve.svg"
FP32, BF16, RESIDUAL = "fp32", "bf16", "bf16, residual bf16"
ARMS: dict[str, dict[str, str]] = {
    FP32: {"precision": "fp32"},
    BF16: {"precision": "bf16"},
    RESIDUAL: {"precision": "bf16", "residual": "bf16"},
}
PAIRS = ((RESIDUAL, BF16), (BF16, FP32), (RESIDUAL, FP32))
"""Arm and what it is compared with."""
LOSSES = ("loss/action/raw", "loss/state/raw", "loss/align/raw", "loss/recon/raw")
HELD_OUT = ("valid/metric/action/chunk_l1", "valid/metric/state/key_l1")
WINDOW = 50
"""Steps whose mean loss is one number of the table."""


def cell_config(arm: str, seed: int, steps: int) -> RunConfig:
    """The demo for so many steps from a seed, on one thread of the CPU, with the precision of an arm."""
    config = load_config(ROOT / "configs" / "demo.yaml", [f"seed={seed}"])
    return with_training(
        config,
        steps=steps,
        seed=seed,
        device="cpu",
        threads=1,
        schedule={**config.training.schedule.model_dump(), "warmup": min(100, steps // 6)},
        validation={"every": steps // 2},
        checkpoints={**config.training.checkpoints.model_dump(), "every": steps},
        diagnostics={**config.training.diagnostics.model_dump(), "every": 0},
        **ARMS[arm],
    )


def trained(arm: str, seed: int, steps: int, run: Path, folder: Path) -> dict[str, Any]:
    """The curve of a training and its CPU seconds; trained unless its folder has it."""
    result = folder / "curve.json"
    if not result.is_file():
        print_line(f"{arm}, seed {seed} ...")
        began = time.thread_time()
        training = build_training(cell_config(arm, seed, steps), run, output=folder)
        try:
            training.fit()
        finally:
            training.data.train.close()
        records = read_records(folder)
        curve = {name: [[r["step"], r[name]] for r in records if name in r] for name in (*LOSSES, *HELD_OUT)}
        write_json(result, {"arm": arm, "seed": seed, "cpu_s": time.thread_time() - began, "curve": curve})
    return json.loads(result.read_text(encoding="utf-8"))


def windows(one: dict[str, Any], name: str, steps: int) -> list[float]:
    """The mean of a loss over each WINDOW steps."""
    return [
        fmean(value for step, value in one["curve"][name] if end - WINDOW < step <= end)
        for end in range(WINDOW, steps + 1, WINDOW)
    ]


def difference(ones: list[float], others: list[float]) -> dict[str, Any]:
    """ones - others pair by pair, in % of the mean of the others, with the t interval over the pairs."""
    scale = 100 / fmean(others)
    each = [scale * (one - other) for one, other in zip(ones, others, strict=True)]
    interval = t_interval(each) if len(each) > 1 else None
    return {
        "mean": fmean(each),
        "each": each,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
    }


def shown(found: dict[str, Any]) -> str:
    """A difference in words."""
    within = "" if found["low"] is None else f" ({found['low']:+.1f} to {found['high']:+.1f})"
    return f"{found['mean']:+.2f} %{within}"


def compared(cells: dict[str, list[dict[str, Any]]], steps: int) -> tuple[list[Table], dict[str, Any]]:
    """The differences of the arms in each window and on held-out episodes."""
    found: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for place, end in enumerate(range(WINDOW, steps + 1, WINDOW)):
        for name in LOSSES[:2]:
            of = {arm: [windows(one, name, steps)[place] for one in cells[arm]] for arm in ARMS}
            of_pairs = {f"{one} - {other}": difference(of[one], of[other]) for one, other in PAIRS}
            found[f"{name}, steps {end - WINDOW + 1} to {end}"] = {"values": of, "differences": of_pairs}
            means = (f"{fmean(of[arm]):.4f}" for arm in ARMS)
            label = name.split("/")[1]
            rows.append((f"{label}, {end - WINDOW + 1} to {end}", *means, *map(shown, of_pairs.values())))
    heads = ("loss, steps", *ARMS, *(f"{one} against {other}" for one, other in PAIRS))
    losses = Table(title="Training losses, means over the seeds", heads=heads, rows=tuple(rows))
    rows = []
    for name in HELD_OUT:
        of = {arm: [one["curve"][name][-1][1] for one in cells[arm]] for arm in ARMS}
        of_pairs = {f"{one} - {other}": difference(of[one], of[other]) for one, other in PAIRS}
        found[name] = {"values": of, "differences": of_pairs}
        means = (f"{fmean(of[arm]):.4f}" for arm in ARMS)
        rows.append((name.removeprefix("valid/metric/"), *means, *map(shown, of_pairs.values())))
    held_out = Table(
        title="Held-out error at the end, averaged weights", heads=("error", *heads[1:]), rows=tuple(rows)
    )
    return [losses, held_out], found


def picture(cells: dict[str, list[dict[str, Any]]]) -> str:
    """The action loss over the steps: the mean of an arm's seeds as a line, each of them faint behind it."""
    series: list[Series] = []
    for number, arm in enumerate(ARMS, start=1):
        curves = [one["curve"]["loss/action/raw"] for one in cells[arm]]
        steps, colour = [step for step, _ in curves[0]], f"c{number}"
        each = [[value for _, value in curve] for curve in curves]
        series += [Series(name=arm, xs=steps, ys=ys, colour=colour, kind="faint") for ys in each]
        series.append(
            Series(name=arm, xs=steps, ys=[fmean(of) for of in zip(*each, strict=True)], colour=colour)
        )
    chart = line_chart(f"Action loss, mean of {len(cells[FP32])} seeds and each of them", series, unit="loss")
    return f"{chart._repr_svg_()}\n"


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run with recorded data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[80, 81, 82])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/residual_curve"))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--output", type=Path, default=RESULTS / "residual_curve", help="without suffix")
    return parser.parse_args(given)


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0 if every training is done."""
    arguments = parse(given)
    steps, made, run = arguments.steps, circumstances(), arguments.run.resolve()
    cells: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in arguments.seeds:
        for arm in ARMS:
            folder = arguments.work.resolve() / f"{steps}-{seed}-{arm.replace(', ', '-').replace(' ', '-')}"
            cells[arm].append(trained(arm, seed, steps, run, folder))
    tables, found = compared(cells, steps)
    cost = {arm: [one["cpu_s"] for one in cells[arm]] for arm in ARMS}
    notes = [
        f"configs/demo.yaml, {steps} steps, one thread; seeds {', '.join(map(str, arguments.seeds))}. The "
        "trainings of a seed begin with the same weights and see the same batches. Differences in % of the "
        "second's mean, with the 95 % t interval over the seeds.",
        "CPU seconds of the training's thread, validation included: "
        + "; ".join(f"{arm} {', '.join(f'{s:.0f}' for s in of)}" for arm, of in cost.items())
        + ".",
        made_with(made),
    ]
    publish(
        arguments.output,
        "benchmarks/residual_curve",
        tables,
        notes,
        {**made, "steps": steps, "compared": found, "cpu_s": cost, "cells": cells},
    )
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.picture, picture(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
