"""How fast a training step is, where its time goes, and what the auxiliary terms add to it.

python benchmarks/train_step.py [--run runs/demo] measures what users run: the demo's model, objective and
optimizer under a real Trainer. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import frame
import torch
from tables import Table, publish
from timing import (
    ARMS,
    MATMUL,
    Spread,
    StepFlops,
    matmul_rates,
    ratios,
    shortened,
    spread,
    step_times,
    with_training,
)

from tutti.config.run_config import RunConfig
from tutti.runs.build import build_training
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line, progress_bar
from tutti.training.records import PARTS, read_records
from tutti.types import UserError

LABELS = {
    "action_only": "action",
    "no_state": "action + align + recon",
    "no_align_recon": "action + state",
    "all": "action + align + recon + state",
}
EVERY = 10
"""Steps of the fit between matmuls."""
LEAST_OF_MATMUL, MOST_DATA_WAIT, MOST_ADDED = 0.45, 0.01, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Samples per second after the warm-up, and the share of that time in each part of a step."""

    samples_per_second: float
    shares: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A line of the acceptance: what was measured, and what it must reach."""

    name: str
    value: str
    wanted: str
    passed: bool


def breakdown(records: Sequence[Mapping[str, Any]], warmup: int) -> Breakdown:
    """From a run's records: everything behind step `warmup`, each record weighted by its seconds."""
    train = [record for record in records if record["kind"] == "train"]
    before = [record for record in train if record["step"] <= warmup]
    behind = [record for record in train if record["step"] > warmup]
    if not before or not behind:
        raise UserError("too few records: give more --steps or a --warmup of at least 10.")
    seconds, samples = before[-1]["time/seconds"], before[-1]["data/samples"]
    spent = dict.fromkeys(PARTS, 0.0)
    last = seconds
    for record in behind:
        for part in PARTS:
            spent[part] += record[f"time/{part}_share"] * (record["time/seconds"] - last)
        last = record["time/seconds"]
    whole = last - seconds
    shares = {part: value / whole for part, value in spent.items()}
    shares["other"] = 1.0 - sum(shares.values())
    return Breakdown(samples_per_second=(behind[-1]["data/samples"] - samples) / whole, shares=shares)


def measure_fit(
    config: RunConfig, data_from: Path, run: Path, steps: int, warmup: int
) -> tuple[Breakdown, list[float]]:
    """A real `Trainer.fit` of `warmup` + `steps` steps, without validation, read from its own records.

    Besides, FLOP/s of matmuls made between its steps, outside its clock: what slows the machine for a while
    slows both.
    """
    config = with_training(
        shortened(config, warmup + steps), validation={"every": 0}, checkpoints={"every": 0}, log_every=10
    )
    training = build_training(config, data_from, output=run)
    matmuls: list[float] = []
    with progress_bar("training") as bar:

        def between(step: int, total: int, _: object) -> None:
            bar(step, total)
            if step > warmup and step % EVERY == 0:
                matmuls.extend(matmul_rates(2))

        training.fit(between)
    training.data.train.close()
    return breakdown(read_records(run), warmup), matmuls


def checks(of_matmul: float, data_share: float, added: Spread) -> list[Check]:
    """The acceptance lines. `added` is the time of action + align + recon over that of action alone."""
    more, low, high = (100 * (ratio - 1) for ratio in (added.median, added.low, added.high))
    return [
        Check(
            name="achieved FLOP/s of a step against the matmul",
            value=f"{100 * of_matmul:.1f} %",
            wanted=f"at least {100 * LEAST_OF_MATMUL:.0f} %",
            passed=of_matmul >= LEAST_OF_MATMUL,
        ),
        Check(
            name="time waiting for data",
            value=f"{100 * data_share:.2f} %",
            wanted=f"under {100 * MOST_DATA_WAIT:.0f} %",
            passed=data_share < MOST_DATA_WAIT,
        ),
        Check(
            name="time that align and recon add to action alone",
            value=f"{more:+.1f} % (quartiles {low:+.1f} to {high:+.1f})",
            wanted=f"at most {100 * MOST_ADDED:.0f} %",
            passed=more <= 100 * MOST_ADDED,
        ),
    ]


def speed_table(
    found: Breakdown, flops: StepFlops, ceiling: float, batch: int, threads: int
) -> tuple[Table, float]:
    """The table of the step with all terms, and its achieved FLOP/s as a share of the matmul's."""
    sample = flops.forward + flops.backward
    achieved = sample * found.samples_per_second
    steps = found.samples_per_second / batch
    rows = [
        ("threads", str(threads)),
        ("samples per second", f"{found.samples_per_second:.1f}"),
        ("ms per step", f"{1000 / steps:.1f} (batch {batch})"),
        *((f"time: {part}", f"{100 * share:.2f} %") for part, share in found.shares.items()),
        ("FLOPs per sample, forward", f"{flops.forward / 1e6:.1f} M"),
        ("FLOPs per sample, backward", f"{flops.backward / 1e6:.1f} M"),
        ("FLOPs per step, Newton-Schulz", f"{flops.optimizer / 1e6:.1f} M"),
        ("achieved, forward + backward", f"{achieved / 1e9:.1f} GFLOP/s"),
        (f"matmul float32 {MATMUL}^3", f"{ceiling / 1e9:.1f} GFLOP/s"),
        ("achieved / matmul", f"{100 * achieved / ceiling:.1f} %"),
        ("the same, Newton-Schulz counted", f"{100 * (achieved + flops.optimizer * steps) / ceiling:.1f} %"),
    ]
    return Table(title="A training step", heads=("what", "value"), rows=tuple(rows)), achieved / ceiling


def cost_table(
    times: Mapping[str, Sequence[float]], against: Mapping[str, Spread], flops: Mapping[str, StepFlops]
) -> Table:
    """Time per step of each set of terms, interleaved."""
    rows: list[tuple[str, ...]] = []
    for arm in ARMS:
        one, ratio = spread(times[arm]), against[arm]
        sample = flops[arm].forward + flops[arm].backward
        rows.append(
            (
                *(LABELS[arm], f"{one.median:.1f}", f"{one.low:.1f} - {one.high:.1f}"),
                *(f"{ratio.median:.3f}", f"{ratio.low:.3f} - {ratio.high:.3f}", f"{sample / 1e6:.1f} M"),
            )
        )
    heads = ("terms", "ms per step", "quartiles", "against action", "quartiles", "FLOPs per sample")
    return Table(title="What the terms cost", heads=heads, rows=tuple(rows))


def check_table(lines: Sequence[Check]) -> Table:
    """PASS or FAIL with the figure."""
    rows = tuple((c.name, c.value, c.wanted, "PASS" if c.passed else "FAIL") for c in lines)
    return Table(title="Acceptance", heads=("what", "measured", "wanted", "verdict"), rows=rows)


def benchmark(arguments: argparse.Namespace, config: RunConfig, data_from: Path, scratch: Path) -> bool:
    """Measures, publishes, and says whether every check passed."""
    found_in = circumstances()
    threads = torch.get_num_threads()
    found, matmuls = measure_fit(config, data_from, scratch / "fit", arguments.steps, arguments.warmup)
    print_line(
        f"timing {len(ARMS)} sets of terms, {arguments.rounds} rounds of {arguments.turn} steps each ..."
    )
    times, flops = step_times(config, data_from, scratch / "arms", arguments.rounds, arguments.turn)
    against = ratios(times, "action_only")
    # Both are means over their time: equal products, so the harmonic mean of their rates.
    ceiling, around = harmonic_mean(matmuls), spread(matmuls)
    speed, of_matmul = speed_table(found, flops["all"], ceiling, config.data.batch_size, threads)
    lines = checks(of_matmul, found.shares["data"], against["no_state"])
    tables = [speed, cost_table(times, against, flops), check_table(lines)]
    notes = [
        f"Matmul: {len(matmuls)} products, two after every {EVERY} steps of the training; mean "
        f"{ceiling / 1e9:.1f}, quartiles {around.low / 1e9:.1f} to {around.high / 1e9:.1f} GFLOP/s.",
        made_with(found_in),
    ]
    result = {
        **found_in,
        "data": str(arguments.run) if arguments.run else "synthetic",
        "threads": threads,
        "batch_size": config.data.batch_size,
        **asdict(found),
        "flops": {arm: asdict(counted) for arm, counted in flops.items()},
        "matmul_flops_per_second": matmuls,
        "of_matmul": of_matmul,
        "ms_per_step": times,
        "against_action": {arm: asdict(ratio) for arm, ratio in against.items()},
        "checks": [asdict(check) for check in lines],
    }
    publish(arguments.output, "benchmarks/train_step", tables, notes, result)
    return all(check.passed for check in lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = frame.parser(__doc__, "train_step", rounds=20, turn=4)
    parser.add_argument("--warmup", type=int, default=20, help="first steps of the fit, not counted")
    parser.add_argument("--steps", type=int, default=200, help="counted steps of the fit")
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    """0 if every check passed, 1 if one failed, 2 for a mistake of the user."""
    return frame.run(parse(given), benchmark)


if __name__ == "__main__":
    sys.exit(main())
